// What the bindings of the kernels and of the I/O share: the Python face of a Span, and the dtype
// codes.
#pragma once
#include <pybind11/pybind11.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "isa/table.h"
#include "sink.h"
#include "tensor.h"

namespace fastmerge {

// The GIL let go of until the end of a block. Up to Python 3.13 a daemon thread that wants it back
// after the interpreter's end is unwound, through destructors that do not let that pass: the
// process ended with SIGABRT. Here it waits for the end of the process, as it does from Python 3.14
// on.
class Released {
   public:
    Released() : state_(PyEval_SaveThread()) {}
    Released(const Released&) = delete;
    Released& operator=(const Released&) = delete;
    ~Released() {
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        }
    }

   private:
    PyThreadState* const state_;
};

// fastmerge._C.View: a span and the Python object that keeps its memory alive.
struct View {
    Span span;
    pybind11::object owner;
    std::shared_ptr<const Elements> elements = nullptr;  // span.elements
};

// A sink and what keeps its memory alive. Not py::keep_alive: where its table finds no memory, the
// process ends.
struct HeldSink {
    HeldSink(const View& out, bool checked)
        : held(out),
          sink(const_cast<void*>(out.span.data), out.span.count, out.span.dtype, checked) {}
    View held;
    MemorySink sink;
};

inline DType parse_dtype(const std::string& code) {
    if (code == "F32") return DType::kF32;
    if (code == "F16") return DType::kF16;
    if (code == "BF16") return DType::kBF16;
    if (code == "RAW") return DType::kRaw;
    throw std::invalid_argument("dtype must be F32, F16, BF16 or RAW, not '" + code + "'");
}

inline Votes votes_of(int number) {
    if (number < 0 || number > static_cast<int>(Votes::kLast))
        throw std::invalid_argument("votes are 0 (weighted), 1 (plain) or 2 (frequency)");
    return static_cast<Votes>(number);
}

inline const char* dtype_code(DType dtype) {
    static const char* const kCodes[] = {"F32", "F16", "BF16", "RAW"};
    return kCodes[static_cast<int>(dtype)];
}

// Gives a new Python object what it holds. pybind11 enters it in a table then; where that finds no
// memory, py::init and return values end the process: what was made throws past the last handler,
// and a holder is freed by both sides. Here neither has it yet, and Python gets a MemoryError.
template <class Holder>
void give(pybind11::detail::value_and_holder self, Holder made) {
    self.value_ptr() = made.get();
    try {
        self.type->init_instance(self.inst, &made);
    } catch (...) {
        self.value_ptr() = nullptr;
        throw;
    }
}

// py::init of a function that makes the class's holder, with the GIL; `bound` again.
template <class Class, class... Args, class... Extra>
Class def_init(Class bound, typename Class::holder_type (*make)(Args...), const Extra&... extra) {
    const auto init = [make](pybind11::detail::value_and_holder& self, Args... args) {
        give(self, make(std::forward<Args>(args)...));
    };
    bound.def("__init__", init, pybind11::detail::is_new_style_constructor(), extra...);
    return bound;
}

// A return value that Python shares; T is bound with std::shared_ptr<T>.
template <class T>
pybind11::object shared(std::shared_ptr<T> made) {
    const auto* type = pybind11::detail::get_type_info(typeid(T));
    auto self = pybind11::reinterpret_steal<pybind11::object>(
        pybind11::detail::make_new_instance(type->type));
    auto* instance = reinterpret_cast<pybind11::detail::instance*>(self.ptr());
    give(instance->get_value_and_holder(type), std::move(made));
    return self;
}

}  // namespace fastmerge

void bind_calls(pybind11::module_& m);
void bind_io(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);

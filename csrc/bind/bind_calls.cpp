// What repeated calls of fastmerge.ops need not do again in Python: 2 us a tensor, where the
// kernels of 4 Ki entries take 1.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "sink.h"

namespace py = pybind11;
using namespace fastmerge;

namespace {

// torch's attributes and methods, as Python looks them up.
struct Names {
    py::str dtype = name("dtype"), shape = name("shape"), layout = name("layout"),
            is_cpu = name("is_cpu"), is_nested = name("is_nested"), is_neg = name("is_neg"),
            is_contiguous = name("is_contiguous"), data_ptr = name("data_ptr"),
            untyped_storage = name("untyped_storage"), nbytes = name("nbytes"),
            storage_offset = name("storage_offset");

   private:
    static py::str name(const char* text) {
        return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text));
    }
};

const Names& names() {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<Names> stored;
    return stored.call_once_and_store_result([] { return Names(); }).get_stored();
}

py::object attribute(py::handle of, const py::str& name) {
    PyObject* found = PyObject_GetAttr(of.ptr(), name.ptr());
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

py::object asked(py::handle of, const py::str& name) {
    PyObject* found = PyObject_CallMethodNoArgs(of.ptr(), name.ptr());
    if (!found) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(found);
}

uint64_t number(py::handle of, const py::str& name) {
    const uint64_t found = PyLong_AsUnsignedLongLong(asked(of, name).ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return found;
}

// Tensors of one shape in the CPU's memory that a call has taken: whatever is like them, in all
// that was checked, is taken again by a comparison.
class Alike {
   public:
    Alike(const py::list& tensors, const std::vector<std::string>& codes) {
        if (tensors.empty() || tensors.size() != codes.size())
            throw std::invalid_argument("one dtype per tensor is needed");
        shape_ = tensors[0].attr("shape");
        for (const py::handle length : shape_) {
            lengths_.push_back(length.cast<int64_t>());
            count_ *= lengths_.back();
        }
        for (size_t i = 0; i < codes.size(); ++i) {
            const py::handle tensor = tensors[i];
            One one;
            one.type = py::type::of(tensor);
            one.dtype = attribute(tensor, names().dtype);
            one.code = parse_dtype(codes[i]);
            one.is_array = py::isinstance<py::array>(tensor);
            if (!one.is_array) one.layout = attribute(tensor, names().layout);
            each_.push_back(std::move(one));
        }
    }

    // A view of each, or None where one is not as it was.
    py::object views(const py::list& tensors) const {
        if (tensors.size() != each_.size()) return py::none();
        py::list found(each_.size());
        for (size_t i = 0; i < each_.size(); ++i) {
            const std::optional<Span> span = taken(tensors[i], each_[i], false);
            if (!span) return py::none();
            found[i] = View{*span, py::reinterpret_borrow<py::object>(tensors[i])};
        }
        return found;
    }

    // Where a tensor like the first is written, or None where it is another, is not to be written,
    // or shares a part of a view's memory; all of it may be shared.
    py::object sink(const py::handle& tensor, const std::vector<View>& views) const {
        const std::optional<Span> span = taken(tensor, each_[0], true);
        if (!span) return py::none();
        const auto end = [](const Span& s) { return s.at(s.count); };
        for (const View& view : views) {
            if (view.elements) continue;
            const bool same = span->at(0) == view.span.at(0) && end(*span) == end(view.span);
            if (!same && span->at(0) < end(view.span) && view.span.at(0) < end(*span))
                return py::none();
        }
        auto made = std::make_shared<HeldSink>(
            View{*span, py::reinterpret_borrow<py::object>(tensor)}, false);
        return shared(std::shared_ptr<MemorySink>(made, &made->sink));
    }

   private:
    struct One {
        py::object type, dtype, layout;
        DType code;
        bool is_array;
    };

    std::optional<Span> taken(py::handle tensor, const One& one, bool written) const {
        if (py::type::handle_of(tensor).ptr() != one.type.ptr()) return {};
        const void* data = nullptr;
        if (one.is_array) {
            const auto array = py::reinterpret_borrow<py::array>(tensor);
            if (array.dtype().ptr() != one.dtype.ptr() || !(array.flags() & py::array::c_style) ||
                (written && !array.writeable()) ||
                array.ndim() != static_cast<py::ssize_t>(lengths_.size()) ||
                !std::equal(lengths_.begin(), lengths_.end(), array.shape()))
                return {};
            data = array.data();
        } else {
            try {
                data = memory(tensor, one);
            } catch (py::error_already_set& error) {  // inside vmap, grad and functionalize
                if (!error.matches(PyExc_Exception)) throw;
            }
        }
        if (!data) return {};
        return Span{data, count_, one.code};
    }

    // Of a torch tensor: what models/memory.py's check_torch and view_of ask for.
    const void* memory(py::handle tensor, const One& one) const {
        const Names& n = names();
        if (!attribute(tensor, n.dtype).is(one.dtype) ||
            !attribute(tensor, n.layout).is(one.layout) ||
            !attribute(tensor, n.is_cpu).is(py::handle(Py_True)) ||
            !attribute(tensor, n.is_nested).is(py::handle(Py_False)) ||
            !asked(tensor, n.is_neg).is(py::handle(Py_False)) ||
            !asked(tensor, n.is_contiguous).is(py::handle(Py_True)))
            return nullptr;
        const int same =
            PyObject_RichCompareBool(attribute(tensor, n.shape).ptr(), shape_.ptr(), Py_EQ);
        if (same < 0) throw py::error_already_set();
        const uint64_t held = number(asked(tensor, n.untyped_storage), n.nbytes);
        const uint64_t end = number(tensor, n.storage_offset) + static_cast<uint64_t>(count_);
        if (!same || held < end * item_bytes(one.code)) return nullptr;
        return reinterpret_cast<const void*>(number(tensor, n.data_ptr));
    }

    std::vector<One> each_;
    py::object shape_;
    std::vector<int64_t> lengths_;
    int64_t count_ = 1;
};

// How many CPUs this process may use; 0 where FASTMERGE_NUM_THREADS or nobody says how many.
int usual_threads() {
    const char* said = std::getenv("FASTMERGE_NUM_THREADS");
    if (said && *said) return 0;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return 0;
}

}  // namespace

void bind_calls(py::module_& m) {
    using namespace pybind11::literals;

    def_init(
        py::class_<Alike>(m, "Alike"),
        +[](const py::list& tensors, const std::vector<std::string>& codes) {
            return std::make_unique<Alike>(tensors, codes);
        },
        "tensors"_a, "dtypes"_a)
        .def("views", &Alike::views, "tensors"_a)
        .def("sink", &Alike::sink, "tensor"_a, "views"_a);
    m.def("usual_threads", &usual_threads);
}

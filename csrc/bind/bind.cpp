// The one Python module: types shared by every part here, each part's own in its bind_*.cpp.
#include "bind/bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>

#include "primitives/rows.h"
#include "sink.h"

namespace py = pybind11;
using namespace fastmerge;

namespace {

template <class T>
using Column = py::array_t<T, py::array::c_style | py::array::forcecast>;

View gathered(const Column<uint64_t>& rows, const std::vector<std::string>& types,
              const Column<uint8_t>& kinds, int64_t cols, const std::string& dtype,
              py::object owner) {
    auto table = std::make_shared<RowTable>();
    const DType wanted = parse_dtype(dtype);
    if (kinds.size() != rows.size()) throw std::invalid_argument("one kind per row is needed");
    if (cols < 1) throw std::invalid_argument("rows must have at least one element");
    std::vector<DType> known;
    for (const std::string& type : types) known.push_back(parse_dtype(type));
    table->cols = cols;
    for (py::ssize_t i = 0; i < rows.size(); ++i) {
        const uint8_t kind = kinds.data()[i];
        if (kind >= known.size()) throw std::invalid_argument("a kind that is no type");
        const DType type = known[kind];
        if (type != wanted && (type == DType::kRaw || wanted != DType::kF32))
            throw std::invalid_argument("rows of another type are widened to F32 only");
        table->rows.push_back(reinterpret_cast<const char*>(rows.data()[i]));
        table->types.push_back(type);
    }
    const auto count = static_cast<int64_t>(rows.size() * cols);
    return View{{nullptr, count, wanted, table.get()}, std::move(owner), table};
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    def_init(
        py::class_<View>(m, "View"),
        +[](uintptr_t address, int64_t count, const std::string& dtype, py::object owner) {
            if (count < 0) throw std::invalid_argument("count must not be negative");
            const Span span{reinterpret_cast<const void*>(address), count, parse_dtype(dtype)};
            return std::unique_ptr<View>(new View{span, std::move(owner)});
        },
        py::arg("address"), py::arg("count"), py::arg("dtype"), py::arg("owner"))
        .def_property_readonly("is_gathered", [](const View& v) { return v.elements != nullptr; })
        .def_property_readonly(
            "address", [](const View& v) { return reinterpret_cast<uintptr_t>(v.span.at(0)); })
        .def_property_readonly("count", [](const View& v) { return v.span.count; })
        .def_property_readonly("dtype", [](const View& v) { return dtype_code(v.span.dtype); })
        .def_property_readonly("nbytes",
                               [](const View& v) {
                                   return v.span.count *
                                          static_cast<int64_t>(item_bytes(v.span.dtype));
                               })
        .def(
            "slice",
            [](const View& v, int64_t begin, int64_t end) {
                if (begin < 0 || end < begin || end > v.span.count)
                    throw std::invalid_argument("slice outside the view");
                Span part = v.span;
                part.count = end - begin;
                if (v.elements)
                    part.first += begin;
                else
                    part.data = v.span.at(begin);
                return View{part, v.owner, v.elements};
            },
            py::arg("begin"), py::arg("end"));

    py::class_<Sink, std::shared_ptr<Sink>>(m, "Sink")
        .def_property_readonly("count", [](const Sink& s) { return s.count(); })
        .def_property_readonly("dtype", [](const Sink& s) { return dtype_code(s.dtype()); });
    def_init(
        py::class_<MemorySink, Sink, std::shared_ptr<MemorySink>>(m, "MemorySink"),
        +[](const View& out, bool checked) {
            auto made = std::make_shared<HeldSink>(out, checked);
            return std::shared_ptr<MemorySink>(made, &made->sink);
        },
        py::arg("out"), py::kw_only(), py::arg("checked") = true);

    m.def(
        "zeros",
        [](int64_t count, const std::string& dtype) {
            if (count < 0) throw std::invalid_argument("count must not be negative");
            auto all = std::make_shared<Zeros>();
            return View{{nullptr, count, parse_dtype(dtype), all.get()}, py::none(), all};
        },
        py::arg("count"), py::arg("dtype"));
    m.def("gathered", &gathered, py::arg("rows"), py::arg("types"), py::arg("kinds"),
          py::arg("cols"), py::arg("dtype"), py::arg("owner"));

    bind_kernels(m);
    bind_io(m);
    bind_calls(m);
}

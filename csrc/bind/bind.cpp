// The one Python module: types shared by every part here, each part's own in its bind_*.cpp.
#include "bind/bind.h"

#include <memory>

#include "sink.h"

namespace py = pybind11;
using namespace fastmerge;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
    py::class_<View>(m, "View")
        .def(py::init([](uintptr_t address, int64_t count, const std::string& dtype,
                         py::object owner) {
                 if (count < 0) throw std::invalid_argument("count must not be negative");
                 return View{{reinterpret_cast<const void*>(address), count, parse_dtype(dtype)},
                             std::move(owner)};
             }),
             py::arg("address"), py::arg("count"), py::arg("dtype"), py::arg("owner"))
        .def_property_readonly(
            "address", [](const View& v) { return reinterpret_cast<uintptr_t>(v.span.data); })
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
                return View{{v.span.at(begin), end - begin, v.span.dtype}, v.owner};
            },
            py::arg("begin"), py::arg("end"));

    py::class_<Sink, std::shared_ptr<Sink>>(m, "Sink")
        .def_property_readonly("count", [](const Sink& s) { return s.count(); })
        .def_property_readonly("dtype", [](const Sink& s) { return dtype_code(s.dtype()); });
    py::class_<MemorySink, Sink, std::shared_ptr<MemorySink>>(m, "MemorySink")
        .def(py::init([](const View& out) {
                 return std::make_shared<MemorySink>(const_cast<void*>(out.span.data),
                                                     out.span.count, out.span.dtype);
             }),
             py::arg("out"), py::keep_alive<1, 2>());

    bind_kernels(m);
    bind_io(m);
}

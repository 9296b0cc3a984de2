#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>

#include "bind/bind.h"
#include "io/error.h"
#include "io/mapping.h"
#include "io/staging.h"

namespace py = pybind11;
using namespace fastmerge;

namespace {

using NoGil = py::call_guard<Released>;

void raise_io_errors(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const IoError& e) {
        // OSError picks its subclass (FileNotFoundError, ...) from the arguments it is called with.
        py::object made = py::handle(PyExc_OSError)(e.code, std::strerror(e.code), e.path);
        PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
    }
}

StagedFile::Io parse_io(const std::string& name) {
    if (name == "auto") return StagedFile::Io::kAuto;
    if (name == "direct") return StagedFile::Io::kDirect;
    if (name == "buffered") return StagedFile::Io::kBuffered;
    throw std::invalid_argument("io must be auto, direct or buffered, not '" + name + "'");
}

}  // namespace

void bind_io(py::module_& m) {
    py::register_local_exception_translator(raise_io_errors);

    def_init(
        py::class_<Mapping>(m, "Mapping"),
        +[](const std::string& path) {
            Released release;
            return std::make_unique<Mapping>(path);
        },
        py::arg("path"))
        .def_property_readonly("size", &Mapping::size)
        .def_property_readonly("torn", &Mapping::torn)
        .def(
            "view",
            [](py::object self, int64_t offset, int64_t count, const std::string& code) {
                const DType dtype = parse_dtype(code);
                const auto& mapping = self.cast<const Mapping&>();
                const auto item = static_cast<int64_t>(item_bytes(dtype));
                if (count < 0 || count > mapping.size() / item)
                    throw std::invalid_argument("range outside the mapped file");
                return View{{mapping.at(offset, count * item), count, dtype}, self};
            },
            py::arg("offset"), py::arg("count"), py::arg("dtype"))
        .def("prefetch", &Mapping::prefetch, py::arg("offset"), py::arg("nbytes"), NoGil())
        .def("drop", &Mapping::drop, py::arg("offset"), py::arg("nbytes"), NoGil());

    def_init(
        py::class_<Checksum, std::shared_ptr<Checksum>>(m, "Checksum"),
        +[](int64_t nbytes) { return std::make_shared<Checksum>(nbytes); }, py::arg("nbytes"))
        .def_property_readonly("nbytes", &Checksum::nbytes)
        .def(
            "add_all",
            [](Checksum& checksum, Pool& pool, const View& tensor) {
                add_all(pool, tensor.span, checksum);
            },
            py::arg("pool"), py::arg("tensor"), NoGil())
        .def("sums", [](const Checksum& checksum) {
            const std::vector<uint64_t> found = checksum.sums();
            return py::array_t<uint64_t>(static_cast<py::ssize_t>(found.size()), found.data());
        });

    def_init(
        py::class_<Staging, std::shared_ptr<Staging>>(m, "Staging"),
        +[](int64_t buffer_bytes, int buffers, int threads) {
            return std::shared_ptr<Staging>(new Staging(buffer_bytes, buffers, threads),
                                            [](Staging* staging) {
                                                if (!staging->inherited()) delete staging;
                                            });
        },
        py::arg("buffer_bytes"), py::arg("buffers"), py::arg("threads"))
        .def_property_readonly("bytes_written", &Staging::bytes_written)
        .def_property_readonly("spills", &Staging::spills)
        .def("close", &Staging::close, NoGil());

    def_init(
        py::class_<StagedFile, std::shared_ptr<StagedFile>>(m, "StagedFile"),
        +[](std::shared_ptr<Staging> staging, const std::string& path, int64_t size,
            const std::string& io, bool resume) {
            const auto mode = parse_io(io);
            Released release;
            return std::shared_ptr<StagedFile>(
                new StagedFile(std::move(staging), path, size, mode, resume), [](StagedFile* file) {
                    if (!file->staging().inherited()) delete file;
                });
        },
        py::arg("staging"), py::arg("path"), py::arg("size"), py::kw_only(), py::arg("io") = "auto",
        py::arg("resume") = false)
        .def_property_readonly("direct", &StagedFile::direct)
        .def(
            "sink",
            [](StagedFile& file, int64_t offset, int64_t count, const std::string& dtype,
               std::shared_ptr<Checksum> checksum, int64_t first) {
                return shared<Sink>(
                    file.sink(offset, count, parse_dtype(dtype), std::move(checksum), first));
            },
            py::arg("offset"), py::arg("count"), py::arg("dtype"), py::kw_only(),
            py::arg("checksum") = nullptr, py::arg("first") = 0)
        .def(
            "write",
            [](StagedFile& file, int64_t offset, const py::bytes& data) {
                char* bytes = nullptr;
                py::ssize_t nbytes = 0;
                if (PyBytes_AsStringAndSize(data.ptr(), &bytes, &nbytes))
                    throw py::error_already_set();
                Released release;
                file.write(offset, bytes, nbytes);
            },
            py::arg("offset"), py::arg("data"))
        .def("done", &StagedFile::done, py::arg("offset"), py::arg("nbytes"), NoGil())
        .def("keep", &StagedFile::keep, py::arg("offset"), py::arg("nbytes"), NoGil())
        .def("finish", &StagedFile::finish, NoGil())
        .def("abandon", &StagedFile::abandon, NoGil());
}

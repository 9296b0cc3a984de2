// What the bindings of the kernels and of the I/O share: the Python face of a Span, and the dtype
// codes.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace fastmerge {

// fastmerge._C.View: a span and the Python object that keeps its memory alive.
struct View {
    Span span;
    pybind11::object owner;
    std::shared_ptr<const Elements> elements = nullptr;  // span.elements
};

inline DType parse_dtype(const std::string& code) {
    if (code == "F32") return DType::kF32;
    if (code == "F16") return DType::kF16;
    if (code == "BF16") return DType::kBF16;
    if (code == "RAW") return DType::kRaw;
    throw std::invalid_argument("dtype must be F32, F16, BF16 or RAW, not '" + code + "'");
}

inline const char* dtype_code(DType dtype) {
    static const char* const kCodes[] = {"F32", "F16", "BF16", "RAW"};
    return kCodes[static_cast<int>(dtype)];
}

}  // namespace fastmerge

void bind_io(pybind11::module_& m);
void bind_kernels(pybind11::module_& m);

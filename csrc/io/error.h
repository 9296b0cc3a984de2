#pragma once
#include <stdexcept>
#include <string>

namespace fastmerge {

// A failed system call on a file; becomes OSError(code, text, path) in Python.
struct IoError : std::runtime_error {
    int code;  // errno
    std::string path;
    IoError(int code, const std::string& path) : std::runtime_error(path), code(code), path(path) {}
};

}  // namespace fastmerge

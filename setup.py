"""Builds fastmerge._C. Everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

# setuptools compiles one extension's files one after another; this spreads them over threads.
ParallelCompile("FASTMERGE_BUILD_JOBS", max=8).install()

setup(
    ext_modules=[
        Pybind11Extension(
            "fastmerge._C",
            sorted(glob("csrc/**/*.cpp", recursive=True)),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inl", recursive=True)),
            cxx_std=17,
            # No -march: kernels pick their instruction set at run time.
            # No contraction: results must not depend on whether the CPU has FMA.
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra"],
        )
    ]
)

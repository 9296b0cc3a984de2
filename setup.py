"""Builds fastmerge._C, maps kernels/ to fastmerge.kernels; the rest is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# setuptools compiles one extension's files one after another; this spreads them over threads.
ParallelCompile("FASTMERGE_BUILD_JOBS", max=8).install()

HEADERS = [*glob("csrc/**/*.h", recursive=True), *glob("csrc/**/*.inl", recursive=True)]

setup(
    packages=[*find_packages(include=["fastmerge", "fastmerge.*"]), "fastmerge.kernels"],
    package_dir={"fastmerge": "fastmerge", "fastmerge.kernels": "kernels"},
    ext_modules=[
        Pybind11Extension(
            "fastmerge._C",
            sorted(glob("csrc/**/*.cpp", recursive=True)),
            include_dirs=["csrc"],
            depends=sorted(HEADERS),
            cxx_std=17,
            # No -march: kernels pick their instruction set at run time.
            # No contraction: results must not depend on whether the CPU has FMA.
            # Traps are off: loops with comparisons vectorise on AVX2 then (8 x), same bits.
            extra_compile_args=[
                "-O3",
                "-pthread",
                "-ffp-contract=off",
                "-fno-trapping-math",
                "-Wall",
                "-Wextra",
            ],
            extra_link_args=["-pthread"],
        )
    ],
)

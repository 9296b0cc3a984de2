"""Builds fastmerge._C, maps kernels/ to fastmerge.kernels, writes README.md for an index page; the
rest is in pyproject.toml.
"""

import re
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# setuptools compiles one extension's files one after another; this spreads them over threads.
ParallelCompile("FASTMERGE_BUILD_JOBS", max=8).install()

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def readme() -> str:
    """README.md for an index page, which has none of the files beside it: links lead into the
    repository that pyproject.toml names; where it names none they are their text, and pictures are
    left out.
    """
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    address = project.get("urls", {}).get("Repository", "").rstrip("/")

    def one(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if "://" in target:
            return match[0]
        if not address:
            return "" if mark else text
        return f"{mark}[{text}]({address}/{'raw' if mark else 'blob'}/main/{target})"

    return re.sub(r"(!?)\[([^]]+)\]\(([^)\s]+)\)", one, Path("README.md").read_text())


HEADERS = [*glob("csrc/**/*.h", recursive=True), *glob("csrc/**/*.inl", recursive=True)]

setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
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

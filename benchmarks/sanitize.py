"""The extension under the compiler's sanitizers: address, undefined behaviour, threads.

    make sanitize                                            all three: half an hour
    make sanitize SANITIZE="thread --save"                   one, and its figures to results/
    python benchmarks/sanitize.py address --tests tests/test_staging.py

Each is a build of its own in build/sanitize-NAME, of setup.py with its flags. Every object file of
csrc/ has to call the sanitizer. Then a fault is planted (a write past the heap, a shift by too
much, two threads that write one variable), which has to be found in the same interpreter with the
same options. Then the tests run, each file in a process of its own, with the sanitizer's library
preloaded, as neither Python nor NumPy is built with it: what they do to memory is not seen, but
their locks and allocations are. Nothing is suppressed. Every process writes what it finds to a
file; any ends the run with exit code 1.

Where the kernel spreads addresses further than gcc's thread sanitizer knows ("unexpected memory
mapping"): `setarch -R make sanitize`.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# They reach every file of csrc/ without torch, which takes minutes to import under these.
TESTS = [
    f"tests/test_{name}.py"
    for name in ("staging", "kernels", "kernel_isa", "kernel_select", "gathered", "pointwise",
                 "low_precision", "checksum", "torn", "trims", "processes", "writer")
]  # fmt: skip
FOUND = 66  # exit code of a process that has a finding


@dataclass(frozen=True)
class Sanitizer:
    flags: str
    library: str  # preloaded
    calls: str  # what every function that is watched calls
    options: str  # a variable, and what it says beside what all have
    planted: str  # C++ with a fault
    said: str  # of that fault, in the report
    without: tuple[str, ...] = ()  # tests that it cannot run


SANITIZERS = {
    # Leaks are not looked for: the interpreter leaves its own at its end. A forked child inherits
    # its allocator's lock where another thread has it, as a pool's that just starts, and hangs.
    "address": Sanitizer(
        "-fsanitize=address -fno-omit-frame-pointer",
        "libasan.so",
        "__asan_report_",
        "ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1",
        "void fault() { volatile char* data = new char[64]; data[64] = 1; }",
        "heap-buffer-overflow",
        without=("tests/test_processes.py",),
    ),
    "undefined": Sanitizer(
        "-fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all",
        "libubsan.so",
        "__ubsan_handle_",
        "UBSAN_OPTIONS=print_stacktrace=1",
        "void fault() { volatile int bits = 40; bits = 1 << bits; }",
        "shift exponent 40 is too large",
    ),
    # It loses count of the threads that a forked child starts ("dup thread with used id").
    "thread": Sanitizer(
        "-fsanitize=thread",
        "libtsan.so",
        "__tsan_func_entry",
        "TSAN_OPTIONS=history_size=4",
        "#include <thread>\n"
        "static volatile int shared;\n"
        "void fault() { std::thread other([] { shared = 1; }); shared = 2; other.join(); }",
        "data race",
        without=("tests/test_processes.py",),
    ),
}


class FailedError(Exception):
    """A finding, or why a run does not count."""


def output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Build:
    """The package, built with one sanitizer, and an interpreter that has its library."""

    def __init__(self, name: str) -> None:
        self.place, self._sanitizer = ROOT / "build" / f"sanitize-{name}", SANITIZERS[name]
        self._compiler = os.environ.get("CXX", "g++")
        self._reports = self.place / "reports"
        self.place.mkdir(parents=True, exist_ok=True)
        # The flags come last: -O3 takes the address sanitizer ten minutes on one file.
        adding = self.place / "compiler"
        adding.write_text(
            f'#!/bin/sh\nexec {self._compiler} "$@" {self._sanitizer.flags} -g1 -O1\n'
        )
        adding.chmod(0o755)
        built = subprocess.run(
            [sys.executable, "setup.py", "-q", "build", "--build-lib", self.place / "lib",
             "--build-temp", self.place / "objects"],
            env=os.environ | {"CC": str(adding), "CXX": str(adding)},
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if built.returncode:
            raise FailedError(f"not built\n{built.stdout}{built.stderr}")
        variable, options = self._sanitizer.options.split("=", 1)
        common = (
            f"halt_on_error=1:handle_sigbus=0:exitcode={FOUND}:log_path={self._reports / 'report'}"
        )
        # libstdc++ too: the sanitizer stands before its exceptions only where it is there first.
        libraries = (self._sanitizer.library, "libstdc++.so")
        self._env = os.environ | {
            "LD_PRELOAD": " ".join(self._library(library) for library in libraries),
            variable: f"{common}:{options}",
            "PYTHONPATH": str(self.place / "lib"),
            "PYTHONSAFEPATH": "1",
            "PYTHONMALLOC": "malloc",  # each object of the interpreter is a piece of its own
            "OPENBLAS_NUM_THREADS": "1",
        }

    def _library(self, name: str) -> str:
        path = output([*shlex.split(self._compiler), f"-print-file-name={name}"]).strip()
        if not os.path.isabs(path):
            raise FailedError(f"{self._compiler} has no {name}")
        return os.path.realpath(path)

    def instrumented(self) -> str:
        """Which files are; those of another machine's instruction set hold no function."""
        sources = sorted((ROOT / "csrc").rglob("*.cpp"))
        empty: list[str] = []
        bare: list[str] = []
        for source in sources:
            path = (self.place / "objects" / source.relative_to(ROOT)).with_suffix(".o")
            symbols = output(["nm", str(path)])
            if self._sanitizer.calls not in symbols:
                (bare if re.search(" [TtW] _Z", symbols) else empty).append(source.name)
        if bare:
            raise FailedError(f"not instrumented: {', '.join(bare)}")
        return (
            f"{len(sources) - len(empty)} of {len(sources)} files of csrc/ call "
            f"{self._sanitizer.calls}; nothing to watch in {', '.join(empty) or 'none'}"
        )

    def control(self) -> None:
        """Finds the planted fault."""
        source, library = self.place / "planted.cpp", self.place / "planted.so"
        source.write_text(self._sanitizer.planted.replace("void fault", 'extern "C" void fault'))
        shared = ["-std=c++17", "-shared", "-fPIC", "-pthread", "-g", "-o", str(library)]
        flags = [*self._sanitizer.flags.split(), *shared, str(source)]
        subprocess.run([*shlex.split(self._compiler), *flags], check=True)
        code = f"import ctypes, fastmerge._C as c; print(c.__file__); ctypes.CDLL({str(library)!r})"
        ran, report = self._run(["-c", f"{code}.fault()"])
        if ran.returncode != FOUND or self._sanitizer.said not in report:
            raise FailedError(
                f"the planted fault is not found: exit code {ran.returncode}\n{report}{ran.stderr}"
            )

    def test(self, path: str) -> tuple[int, float]:
        """(tests that passed, seconds)."""
        begun = time.monotonic()
        ran, report = self._run(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path])
        passed = re.search(r"(\d+) passed", ran.stdout)
        if report or ran.returncode or not passed:
            raise FailedError(f"{path}: exit code {ran.returncode}\n{ran.stdout[-4000:]}{report}")
        return int(passed[1]), time.monotonic() - begun

    def _run(self, words: list[str]) -> tuple[subprocess.CompletedProcess[str], str]:
        """With what any process that it started reported."""
        shutil.rmtree(self._reports, ignore_errors=True)
        self._reports.mkdir()
        command = [sys.executable, *words]
        ran = subprocess.run(
            command, env=self._env, cwd=ROOT, capture_output=True, text=True, check=False
        )
        return ran, "".join(path.read_text() for path in sorted(self._reports.iterdir()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SANITIZERS)}")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="other files")
    parser.add_argument("--save", action="store_true", help="the figures to results/sanitize-NAME")
    words = parser.parse_args()
    if unknown := set(words.names) - SANITIZERS.keys():
        parser.error(f"{', '.join(unknown)}: none of {', '.join(SANITIZERS)}")
    for name in words.names or SANITIZERS:
        rows: list[tuple[str, int, int, int]] = []
        try:
            build = Build(name)
            instrumented = build.instrumented()
            print(f"{name}: {instrumented}", flush=True)
            build.control()
            print(f"{name}: the planted fault is found", flush=True)
            for path in words.tests:
                if path in SANITIZERS[name].without:
                    continue
                passed, seconds = build.test(path)
                rows.append((path, passed, round(seconds), 0))
                print(f"{name}: {path}: {passed} tests, {seconds:.0f} s, clean", flush=True)
        except FailedError as failed:
            print(f"{name}: FAILED: {failed}")
            return 1
        if words.save:
            from record import record

            about = {"instrumented": instrumented, "planted fault": "found"}
            title = f"Tests under the {name} sanitizer"
            head = "| tests | passed | seconds | findings |"
            record(f"sanitize-{name}", title, head, rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())

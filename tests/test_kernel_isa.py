"""The instruction set: the best by default, forced by FASTMERGE_ISA; the pool it runs on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from fastmerge import _C

KNOWN = ("avx512", "avx2", "neon", "scalar")


def run(code: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "FASTMERGE_ISA"}
    if isa is not None:
        environment["FASTMERGE_ISA"] = isa
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


PRINT_ISA = "from fastmerge import _C; print(_C.isa())"


@pytest.mark.parametrize("isa", [None, "", "auto", *_C.isas()])
def test_the_forced_one_runs(isa):
    done = run(PRINT_ISA, isa)
    assert done.stdout.strip() == (isa if isa in KNOWN else _C.isas()[0]), done.stderr


UNUSABLE = ["sse9", "AVX2", *(name for name in KNOWN if name not in _C.isas())]


@pytest.mark.parametrize("isa", UNUSABLE)
def test_an_unusable_one_is_an_error_that_names_the_others(isa):
    done = run(PRINT_ISA, isa)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode != 0
    assert "FASTMERGE_ISA" in last
    assert f"'{isa}'" in last
    assert all(name in last for name in _C.isas())


def test_set_isa_refuses_unknown_names():
    before = _C.isa()
    with pytest.raises(ValueError, match="avx2"):
        _C.set_isa("mmx")
    assert _C.isa() == before


def test_isas_are_known_and_end_with_scalar():
    assert _C.isas()[-1] == "scalar"
    assert set(_C.isas()) <= set(KNOWN)


def test_one_pool_serves_several_callers_at_once(memory):
    """Jobs that overlap on one pool give what they give alone."""
    pool = _C.Pool(3)
    x = memory.put(np.linspace(-1, 1, 500_000, dtype=np.float32), "F32")
    alone = _C.gram(pool, [x, x])
    found = [np.zeros((2, 2)) for _ in range(6)]

    def job(i: int) -> None:
        for _ in range(5):
            found[i] = _C.gram(pool, [x, x])

    threads = [threading.Thread(target=job, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(alone, other) for other in found)


def test_an_error_inside_a_job_reaches_the_caller(memory, tmp_path):
    """A sink that is closed for writing fails on a worker; the caller gets the exception, and the
    pool still works."""
    pool = _C.Pool(2)
    x = memory.put(np.ones(100_000, np.float32), "F32")
    staging = _C.Staging(4096, 8, 1)
    file = _C.StagedFile(staging, str(tmp_path / "out"), 400_000, io="buffered")
    sink = file.sink(0, 100_000, "F32")
    file.abandon()
    with pytest.raises(Exception, match=r".+"):
        _C.combine(pool, [x], np.ones(1), sink)
    assert _C.gram(pool, [x])[0, 0] == 100_000

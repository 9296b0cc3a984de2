"""Calls that fail, processes that die, and many that work at once: nothing is lost or half-written.

FASTMERGE_FAULTS=0 fails every point of every scenario (minutes) instead of a few of each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fastmerge

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "faults.py"
SAMPLE = os.environ.get("FASTMERGE_FAULTS", "3")


def faults(*more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--sample", SAMPLE, *more],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


@pytest.mark.parametrize(
    "scenario",
    [
        "merge",
        "overwrite",
        "overwrite in two steps",
        "resume",
        "parts",
        "walk",
        "sweep",
        "adapters",
    ],
)
def test_no_fault_leaves_half_a_model_or_blocks_the_next_run(scenario: str) -> None:
    ran = faults("--only", scenario, "--interrupts", "2")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # 3 points or more in each of 9 ways, of which the last and the first count.
    assert int(ran.stdout.split()[-7]) > 25, ran.stdout


def test_no_object_of_the_extension_needs_memory_to_fail() -> None:
    """pybind11's own py::init, return values and keep_alive ended the process (SIGABRT)."""
    ran = faults("--only", "objects")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "objects: no memory from then on: MemoryError" in ran.stdout


# --- many at once ---

STRESS = """
import multiprocessing, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import fastmerge
from fastmerge import ops

root = Path(sys.argv[1])
rng = np.random.default_rng(5)
base, a, b = (rng.normal(size=70_001).astype(np.float32) for _ in range(3))
models = [str(root / name) for name in ("base", "one", "two")]
recipe = {"merge_method": "ties", "base_model": models[0],
          "parameters": {"density": 0.5, "weight": 1.0},
          "models": [{"model": model} for model in models[1:]]}

def made_on(threads):
    return ops.ties(base, [a, b], [1.0, 0.5], density=0.5, threads=threads)

wanted = made_on(2)

def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}

def work(number):
    if number % 4 == 0:
        out = root / f"made-{number}" / "out"
        out.parent.mkdir()
        fastmerge.merge(recipe, out, threads=1 + number % 3)
        return bytes_of(out) == reference
    return bool((made_on(1 + number % 5) == wanted).all())

def worker(start):
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(start, start + 8)))

if __name__ == "__main__":
    (root / "reference").mkdir()
    fastmerge.merge(recipe, root / "reference" / "out", threads=1)
reference = bytes_of(root / "reference" / "out")

if __name__ == "__main__":
    gate = threading.Barrier(32)
    def late(number):
        gate.wait()
        return work(number)
    with ThreadPoolExecutor(32) as pool:
        busy = [pool.submit(late, number) for number in range(32)]
        # Children are forked while all of those threads are at work.
        started = []
        for number, method in enumerate(("fork", "spawn")):
            process = multiprocessing.get_context(method).Process(
                target=worker, args=(100 + 10 * number,))
            process.start()
            started.append(process)
        assert all(future.result(120) for future in busy)
    for process in started:
        process.join(120)
        assert process.exitcode == 0, process
    left = [path.name for path in root.glob("made-*/.*")]
    assert not left, left
"""


def test_threads_and_workers_at_once(zoo: Any, tmp_path: Path) -> None:
    """32 threads in operations and merges, and processes forked and spawned meanwhile."""
    base = zoo.base("base", layers=2)
    for seed, name in enumerate(("one", "two")):
        zoo.tune(base, name, seed=seed)
    script = tmp_path / "stress.py"
    script.write_text(STRESS)
    ran = subprocess.run(
        [sys.executable, str(script), str(zoo.root)],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_two_merges_to_one_place_are_told(zoo: Any, tmp_path: Path) -> None:
    """Eight threads with one output: one writes it, the others are refused, in one line."""
    base = zoo.base("place-base", layers=2)
    tune = zoo.tune(base, "place-tune", seed=1)
    recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    recipe |= {"models": [{"model": str(base)}, {"model": str(tune)}]}

    def work(_: int) -> str:
        try:
            fastmerge.merge(recipe, tmp_path / "out", threads=1)
        except fastmerge.FastmergeError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(work, range(8)))
    assert told.count("") == 1
    assert all("another merge" in text or "exists" in text for text in told if text)
    assert (tmp_path / "out" / "model.safetensors").is_file()

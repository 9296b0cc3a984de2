"""Inputs that lose pages while they are read: an error in one line, and the process lives."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmerge import _C

# What every script begins with: a mapping of four pages, and a way to read them all.
_BEGIN = """
import ctypes, faulthandler, mmap, os, signal, sys
from fastmerge import _C
PAGE = mmap.PAGESIZE
path = sys.argv[1]
def file(name=path):
    with open(name, "wb") as out:
        out.write(b"x" * 4 * PAGE)
    return name
def read(mapping):
    view = mapping.view(0, mapping.size, "RAW")
    return ctypes.string_at(view.address, view.nbytes)
def shrunk():
    mapping = _C.Mapping(file())
    os.truncate(path, PAGE)
    return mapping
def elsewhere():
    other = open(file(path + "2"), "r+b")
    memory = mmap.mmap(other.fileno(), 4 * PAGE)
    os.truncate(path + "2", 0)
    return memory[PAGE]
"""


def run(tmp_path: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", _BEGIN + text, str(tmp_path / "file")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def read(mapping: _C.Mapping, nbytes: int) -> bytes:
    view = mapping.view(0, nbytes, "RAW")
    return ctypes.string_at(view.address, nbytes)


def test_a_page_that_is_gone_reads_as_zeros_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    size = 4 * os.sysconf("SC_PAGESIZE")
    path.write_bytes(b"x" * (size + 1))
    mapping = _C.Mapping(str(path))
    other = _C.Mapping(str(path))
    os.truncate(path, size // 4)
    assert not mapping.torn
    assert read(mapping, size // 4) == b"x" * (size // 4) and not mapping.torn
    assert read(mapping, size + 1) == b"x" * (size // 4) + bytes(size * 3 // 4 + 1)
    assert mapping.torn and not other.torn
    del mapping
    path.write_bytes(b"y" * size)
    assert [_C.Mapping(str(path)).torn for _ in range(300)] == [False] * 300


def test_many_threads_fall_into_it_at_once(tmp_path: Path) -> None:
    answer = run(
        tmp_path,
        """
from concurrent.futures import ThreadPoolExecutor
mappings = [shrunk() for _ in range(50)]
with ThreadPoolExecutor(8) as pool:
    for _ in range(3):
        list(pool.map(read, mappings * 4))
print(sum(m.torn for m in mappings))
""",
    )
    assert (answer.returncode, answer.stdout) == (0, "50\n"), answer.stderr


def test_a_fork_is_guarded_too(tmp_path: Path) -> None:
    answer = run(
        tmp_path,
        """
mapping = shrunk()
child = os.fork()
read(mapping)
if child == 0:
    os._exit(3 if mapping.torn and _C.Mapping(file(path + "3")).size else 4)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), mapping.torn)
""",
    )
    assert (answer.returncode, answer.stdout) == (0, "3 True\n"), answer.stderr


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("", "", ""),
        ("faulthandler.enable()", "", "Bus error"),
        ("", "faulthandler.enable()", "Bus error"),
        ("", "faulthandler.enable(); _C.Mapping(file())", "Bus error"),
        ("signal.signal(signal.SIGBUS, signal.SIG_IGN)", "", ""),
    ],
)
def test_faults_elsewhere_end_the_process_as_ever(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    text = f"{before}\nread(shrunk())\n{after}\nelsewhere()\nprint('alive')\n"
    answer = run(tmp_path, text)
    assert answer.returncode == -signal.SIGBUS and "alive" not in answer.stdout
    assert said in answer.stderr


def test_faulthandler_does_not_see_what_is_handled(tmp_path: Path) -> None:
    text = "m = shrunk()\nread(m)\nprint(m.torn)\n"
    answer = run(tmp_path, text, "-X", "faulthandler")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "True\n", "")


@pytest.mark.parametrize(
    ("before", "code", "said"),
    [
        ("signal.signal(signal.SIGBUS, lambda *_: print('mine'))", 0, "mine\nalive\n"),
        ("signal.signal(signal.SIGBUS, signal.SIG_IGN)", 0, "alive\n"),
        ("", -signal.SIGBUS, ""),
    ],
)
def test_a_signal_that_is_sent_reaches_who_it_is_for(
    tmp_path: Path, before: str, code: int, said: str
) -> None:
    text = f"{before}\n_C.Mapping(file())\nos.kill(os.getpid(), signal.SIGBUS)\nprint('alive')\n"
    answer = run(tmp_path, text)
    assert (answer.returncode, answer.stdout) == (code, said), answer.stderr


_SHRINK = """
import os, sys
import fastmerge
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.diff import compare
a, b, how = sys.argv[1:]
file = b + "/model.safetensors"
whole = open(file, "rb").read()
recipe = {"merge_method": "linear", "models": [
    {"model": m, "parameters": {"weight": 0.5}} for m in (a, b)]}
try:
    if how == "materialise":
        made = fastmerge.materialise(recipe, threads=1)
        next(made)
        os.truncate(file, 4096)
        seen = [1]
        for _ in made:
            seen.append(1)
    elif how == "merge":
        def shrink(*_):
            os.truncate(file, 4096)
        fastmerge.merge(recipe, b + "-out", threads=1, progress=shrink)
    else:
        one, two = Checkpoint.open(fastmerge.api.Path(a)), Checkpoint.open(fastmerge.api.Path(b))
        two.view(next(iter(two.tensors)))
        os.truncate(file, 4096)
        compare(one, two, threads=1)
except fastmerge.FastmergeError as error:
    print(error)
open(file, "wb").write(whole)
fastmerge.merge(recipe, b + "-out", threads=1)
print(os.path.exists(b + "-out/model.safetensors"))
"""


@pytest.mark.parametrize("how", ["materialise", "merge", "compare"])
def test_an_input_that_shrinks_is_one_line(zoo, how: str) -> None:
    base = zoo.base(layers=40)
    tune = zoo.tune(base, "tune")
    answer = subprocess.run(
        [sys.executable, "-c", _SHRINK, str(base), str(tune), how],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    said = (
        f"{tune}/model.safetensors: changed while it was being read; run again when it is complete"
    )
    assert (answer.returncode, answer.stdout) == (0, f"{said}\nTrue\n"), answer.stderr

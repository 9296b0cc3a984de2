"""Where a model may be written: what no folder can take is refused before the first byte."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge import _C
from fastmerge.dtypes import F32
from fastmerge.errors import FastmergeError, OutputError
from fastmerge.output import publish
from fastmerge.output import writer as writer_module
from fastmerge.output.disk import remove_tree
from fastmerge.output.layout import Layout
from fastmerge.output.writer import ModelWriter

LAYOUT = Layout.plan([("x", F32, (2,))], max_shard_bytes=1000, metadata={})


@pytest.mark.parametrize(
    "target, message",
    [
        ("/", "root folder"),
        (".", "current"),
        ("x" * 230, "too long"),
        ("d/" * 3000 + "x", "too long"),
        ("x" * 300 + "/y", "too long"),
        ("\udc80", "not UTF-8"),
        ("a\0b", "no folder can be called that"),
        ("~nobody-here/x", "does not exist"),
    ],
)
def test_places_that_no_model_can_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastmergeError, match=message):
        ModelWriter(Path(target), LAYOUT, key="job")
    assert not list(tmp_path.iterdir())


def put_bytes(writer: ModelWriter, name: str, data: bytes) -> None:
    """Fills a tensor from memory, as the kernels do through its sink."""
    held = np.frombuffer(data, np.uint8)
    view = _C.View(held.ctypes.data, held.size, "RAW", held)
    _C.copy(_C.Pool(1), view, writer.parts(name)(0, held.size))


def test_a_mount_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.ismount("/dev/shm"):
        pytest.skip("no mount to try it on")
    monkeypatch.setattr(writer_module.os, "access", lambda *_: True)
    with pytest.raises(FastmergeError, match="where a disk is mounted"):
        ModelWriter(Path("/dev/shm"), LAYOUT, key="job")


def test_a_removed_working_directory_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with ModelWriter(tmp_path / "out", LAYOUT, key="job") as writer:
        put_bytes(writer, "x", bytes(8))
        writer.computed("x", {})
        writer.finish()


def test_the_folder_we_stand_in_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "out" / "sub")
    with pytest.raises(FastmergeError, match="current"):
        ModelWriter(tmp_path / "out", LAYOUT, key="job", overwrite=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(FastmergeError, match="leads nowhere"):
        ModelWriter(tmp_path / "loop", LAYOUT, key="job")


# --- what a failure leaves ---

PAGES = Layout.plan([(f"t{n}", F32, (4096,)) for n in range(20)], max_shard_bytes=50_000)


def fill(writer: ModelWriter, count: int) -> None:
    for name in writer.pending()[:count]:
        put_bytes(writer, name, bytes(4 * 4096))
        writer.computed(name, {})


def ended(target: Path, how: BaseException) -> None:
    """A run that journals ten tensors and then ends by ``how``."""
    with (
        suppress(type(how)),
        ModelWriter(target, PAGES, key="k", fresh=True, staging_bytes=1) as writer,
    ):
        fill(writer, 15)
        until = time.monotonic() + 30
        while writer._journal.entries < 10:
            assert time.monotonic() < until
            writer.mark()
        raise how


def test_a_failed_run_goes_on_and_blocks_no_other_job(tmp_path: Path) -> None:
    target = tmp_path / "out"
    ended(target, FastmergeError("no"))
    with suppress(KeyboardInterrupt), ModelWriter(target, PAGES, key="k") as writer:
        assert len(writer.resumed) >= 10  # the same job, which from here on is no failure any more
        raise KeyboardInterrupt
    with pytest.raises(FastmergeError, match="unfinished merge"):
        ModelWriter(target, PAGES, key="other")
    ended(target, FastmergeError("no"))
    with ModelWriter(target, PAGES, key="other") as writer:
        assert not writer.resumed
        fill(writer, 20)
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- few descriptors ---

_FEW = """
import importlib.util, os, resource, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("places", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
SHARDS = tests.Layout.plan([(f"t{n}", tests.F32, (4096,)) for n in range(200)], max_shard_bytes=1)
resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
with tests.ModelWriter(Path(sys.argv[2]), SHARDS, key="k", staging_bytes=1 << 20) as writer:
    tests.fill(writer, 200)
    writer.finish()
print(len(list(Path(sys.argv[2]).glob("*.safetensors"))))
"""


def test_hundreds_of_shards_with_few_descriptors(tmp_path: Path) -> None:
    run = [sys.executable, "-c", _FEW, __file__, str(tmp_path / "out")]
    answer = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stdout) == (0, "200\n"), answer.stderr


def test_the_hubs_cache_is_no_place_for_an_output(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    with pytest.raises(OutputError, match=r"lies in the Hub's cache .models--org--name."):
        ModelWriter(snapshot / "out", LAYOUT, key="job")
    assert not list(snapshot.iterdir())


@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupt_as_a_folder_is_removed_comes_out_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    """It closes the folder's descriptor again, which came out as "Bad file descriptor"."""
    close = os.close

    def interrupted(descriptor: int) -> None:
        close(descriptor)
        monkeypatch.undo()
        raise KeyboardInterrupt

    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(os, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_tree(tmp_path / "a", ignore_errors=ignored)
    remove_tree(tmp_path / "a", ignore_errors=ignored)
    assert not (tmp_path / "a").exists()


def test_folders_are_removed_by_what_lets_interrupts_through() -> None:
    sources = Path(publish.__file__).parent.parent.rglob("*.py")
    assert [f.name for f in sources if "rmtree(" in f.read_text()] == ["disk.py"]


def test_a_writer_is_gone_when_nobody_has_it(tmp_path: Path) -> None:
    """In a circle with its own function it kept 2 MiB and more a merge until Python looked."""
    gc.disable()
    try:
        writer = ModelWriter(tmp_path / "out", LAYOUT, key="k")
        writer._give_up()
        gone = weakref.ref(writer)
        del writer
        assert gone() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------- ending


class WrittenLate:
    """A file whose writes are on their way until it is abandoned, which waits for them."""

    def __init__(self, file: Any, slots: list[Any]) -> None:
        self._file, self._slots, self._ended = file, slots, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def done(self, begin: int, nbytes: int) -> bool:
        return self._ended and self._file.done(begin, nbytes)

    def abandon(self) -> None:
        until = time.monotonic() + 30
        while not all(self._file.done(slot.begin, slot.nbytes) for slot in self._slots):
            assert time.monotonic() < until
        self._ended = True
        self._file.abandon()


def test_what_is_written_while_a_run_ends_is_kept(tmp_path: Path) -> None:
    with (
        suppress(KeyboardInterrupt),
        ModelWriter(tmp_path / "out", PAGES, key="k") as writer,
    ):
        slots = writer.layout.slots
        for number, file in writer._files.items():
            own = [slot for slot in slots.values() if slot.shard == number]
            writer._files[number] = WrittenLate(file, own)
        fill(writer, len(slots))
        assert not [name for name in slots if slots[name].nbytes and name in journaled(writer)]
        raise KeyboardInterrupt
    with ModelWriter(tmp_path / "out", PAGES, key="k") as writer:
        assert sorted(writer.resumed) == sorted(slots)


def journaled(writer: ModelWriter) -> list[str]:
    return [name for name, _ in writer._journal._entries()[1]]

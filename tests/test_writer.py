"""Writing models: the exact layout, and that a folder is whole or absent whatever happens."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge import _C
from fastmerge.compute import reference
from fastmerge.dtypes import BY_CODE, DType
from fastmerge.errors import FastmergeError
from fastmerge.models.folder import INDEX
from fastmerge.output import journal, publish
from fastmerge.output.layout import Layout
from fastmerge.output.writer import ModelWriter

F32, F16, BF16, U8 = (BY_CODE[code] for code in ("F32", "F16", "BF16", "U8"))

TENSORS: list[tuple[str, DType, tuple[int, ...]]] = [
    ("half", F16, (3, 5)),
    ("bytes", U8, (7,)),
    ("large", F32, (300, 100)),
    ("none", F16, (0, 4)),
    ("scalar", F16, ()),
    ("line\nand é", F32, (50, 10)),
    *((f"layers.{number}.weight", BF16, (40, 64)) for number in range(60)),
]


def put_bytes(writer: ModelWriter, name: str, data: bytes) -> None:
    """Fills a tensor from memory, as the kernels do through its sink."""
    held = np.frombuffer(data, np.uint8)
    view = _C.View(held.ctypes.data, held.size, "RAW", held)
    _C.copy(_C.Pool(1), view, writer.parts(name)(0, held.size))


def content(name: str, nbytes: int) -> bytes:
    return random.Random(name).randbytes(nbytes)


def layout(max_shard_bytes: int = 150_000) -> Layout:
    return Layout.plan(TENSORS, max_shard_bytes=max_shard_bytes, metadata={"seed": "1"})


def fill(writer: ModelWriter, names: list[str]) -> None:
    for name in names:
        put_bytes(writer, name, content(name, writer.layout.slots[name].nbytes))
        writer.computed(name, {"of": name})


def result_of(writer: ModelWriter, name: str) -> dict[str, str]:
    data = content(name, writer.layout.slots[name].nbytes)
    return {"of": name, "checksum": reference.checksum(data)}


def settle(writer: ModelWriter, count: int) -> None:
    """Waits until ``count`` tensors are journaled: the I/O threads write behind."""
    until = time.monotonic() + 30
    while writer._journal.entries < count:
        assert time.monotonic() < until
        writer.mark()


def write_model(target: Path, plan: Layout | None = None, **options: Any) -> None:
    with ModelWriter(target, plan or layout(), key="k", **options) as writer:
        fill(writer, writer.pending())
        writer.finish({"config.json": b"{}"})


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def siblings(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def refusal(target: Path, **options: Any) -> str:
    before = siblings(target)
    with pytest.raises(FastmergeError) as caught:
        ModelWriter(target, layout(), **{"key": "k", **options})
    message = str(caught.value)
    assert message.isprintable()
    assert siblings(target) == before
    return message


# --- whole or absent ---


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_io_gives_the_same_bytes(tmp_path: Path, io: str) -> None:
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", io=io, staging_bytes=1)  # one page per buffer
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert siblings(tmp_path / "a") == ["a", "b"]


def test_nothing_to_see_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with ModelWriter(target, layout(), key="k") as writer:
        fill(writer, writer.pending())
        assert not target.exists()
        (writer.partial / "scratch.bin").write_bytes(b"x")
        (tmp_path / "tokenizer.json").write_text("{}")
        writer.finish({"tokenizer.json": tmp_path / "tokenizer.json", "README.md": b"# out"})
    assert {"README.md", "tokenizer.json", INDEX} < set(tree(target))
    assert "scratch.bin" not in tree(target)
    assert siblings(target) == ["out", "tokenizer.json"]


def test_side_files_come_from_elsewhere_than_the_index(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", layout(), key="k") as writer:
        fill(writer, writer.pending())
        writer.finish({INDEX: b"stale"})
    assert tree(tmp_path / "out")[INDEX] == layout().index


def test_failure_before_any_tensor_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ModelWriter(tmp_path / "out", layout(), key="k") as writer:
        writer.sink("no such tensor")
    assert siblings(tmp_path / "out") == []


def test_unwritten_tensor_is_noticed(tmp_path: Path) -> None:
    with ModelWriter(tmp_path / "out", layout(), key="k") as writer:
        fill(writer, writer.pending()[1:])
        with pytest.raises(RuntimeError, match="never written"):
            writer.finish()
    assert not (tmp_path / "out").exists()


def interrupted(target: Path, count: int, **options: Any) -> list[str]:
    """A run that ends after ``count`` tensors as Ctrl-C would end it; returns those kept."""
    with (
        suppress(KeyboardInterrupt),
        ModelWriter(target, layout(), key="k", staging_bytes=1, **options) as writer,
    ):
        fill(writer, writer.pending()[:count])
        settle(writer, count // 2)
        raise KeyboardInterrupt
    with ModelWriter(target, layout(), key="k", **options) as writer:
        return sorted(writer.resumed)


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_resume(tmp_path: Path, io: str) -> None:
    write_model(tmp_path / "whole")
    target = tmp_path / "out"
    kept = interrupted(target, 40, io=io)
    assert len(kept) >= 20
    assert not target.exists()
    with ModelWriter(target, layout(), key="k", io=io) as writer:
        pending = writer.pending()
        assert set(pending) | set(kept) == set(writer.layout.slots)
        assert not set(pending) & set(kept)
        assert writer.results == {name: result_of(writer, name) for name in kept}
        fill(writer, pending)
        assert set(writer.results) == set(writer.layout.slots)
        writer.finish({"config.json": b"{}"})
    assert tree(target) == tree(tmp_path / "whole")
    assert siblings(target) == ["out", "whole"]


def test_resume_with_nothing_pending(tmp_path: Path) -> None:
    write_model(tmp_path / "whole")
    target = tmp_path / "out"
    with suppress(KeyboardInterrupt), ModelWriter(target, layout(), key="k") as writer:
        fill(writer, writer.pending())
        settle(writer, len(TENSORS))
        raise KeyboardInterrupt
    with ModelWriter(target, layout(), key="k") as writer:
        assert writer.pending() == []
        writer.finish({"config.json": b"{}"})
    assert tree(target) == tree(tmp_path / "whole")


def test_another_job_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    kept = interrupted(target, 40)
    for options in ({"key": "other"}, {"key": "other", "overwrite": True}):
        assert "an unfinished merge of other inputs or another recipe" in refusal(target, **options)
    with pytest.raises(FastmergeError, match="unfinished merge"):
        ModelWriter(target, layout(200_000), key="k")
    # Refusals, of this and other kinds, cost nothing of what was done.
    target.mkdir()
    (target / "x").touch()
    assert "exists" in refusal(target)
    (target / "x").unlink()
    with ModelWriter(target, layout(), key="k") as writer:
        assert sorted(writer.resumed) == kept
        fill(writer, writer.pending())
        writer.finish()


def test_fresh_starts_over(tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupted(target, 40)
    with ModelWriter(target, layout(), key="other", fresh=True) as writer:
        assert not writer.resumed
        fill(writer, writer.pending())
        writer.finish()
    assert siblings(target) == ["out"]


def test_deleting_the_folder_starts_over(tmp_path: Path) -> None:
    target = tmp_path / "out"
    interrupted(target, 40)
    shutil.rmtree(tmp_path / ".out.fastmerge-partial")
    with ModelWriter(target, layout(), key="other") as writer:
        assert not writer.resumed
    assert siblings(target) == []


def test_journal_does_not_outlive_the_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not synced may be lost in a power cut: the journal does not count after one."""
    target = tmp_path / "out"
    interrupted(target, 40)
    monkeypatch.setattr(journal, "boot_id", lambda: "another boot")
    with ModelWriter(target, layout(), key="k") as writer:
        assert not writer.resumed
    assert siblings(target) == []


def test_torn_journal_line_is_ignored(tmp_path: Path) -> None:
    target = tmp_path / "out"
    kept = interrupted(target, 40)
    journal = tmp_path / ".out.fastmerge-journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    with ModelWriter(target, layout(), key="k") as writer:
        assert len(writer.resumed) == len(kept) - 1
        fill(writer, writer.pending())
        writer.finish({"config.json": b"{}"})
    write_model(tmp_path / "whole")
    assert tree(target) == tree(tmp_path / "whole")


def test_missing_shard_of_an_unfinished_run(tmp_path: Path) -> None:
    target = tmp_path / "out"
    kept = interrupted(target, 60)
    lost = layout().shards[1].name
    (tmp_path / ".out.fastmerge-partial" / lost).unlink()
    with ModelWriter(target, layout(), key="k") as writer:
        slots = writer.layout.slots
        assert sorted(writer.resumed) == [name for name in kept if slots[name].shard != 1]
        fill(writer, writer.pending())
        writer.finish({"config.json": b"{}"})
    write_model(tmp_path / "whole")
    assert tree(target) == tree(tmp_path / "whole")


# Slow enough that a kill lands anywhere: in the tensors, the headers, the syncs, the renames.
_CHILD = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_writer", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
with tests.ModelWriter(Path(sys.argv[2]), tests.layout(), key="k", staging_bytes=1) as writer:
    print("start", len(writer.resumed), flush=True)
    for name in writer.pending():
        tests.fill(writer, [name])
        time.sleep(0.001)
    writer.finish({"config.json": b"{}"})
"""


def test_sigkill_and_resume(tmp_path: Path) -> None:
    write_model(tmp_path / "whole")
    target, rng = tmp_path / "out", random.Random(11)
    command = [sys.executable, "-c", _CHILD, __file__, str(target)]
    resumed = [0]
    for number in range(30):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line.startswith("start ")
            resumed.append(int(line.split()[1]))
            # Longer in turn: under a sanitizer on a busy machine 30 runs of 40 ms did nothing.
            time.sleep(rng.uniform(0, 0.04 * (1 + number // 5)))
            child.send_signal(signal.SIGKILL)
        if target.exists():
            break
        assert set(siblings(target)) <= {
            ".out.fastmerge-partial",
            ".out.fastmerge-journal",
            "whole",
        }
    else:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert resumed == sorted(resumed)
    assert resumed[-1] > 0
    assert tree(target) == tree(tmp_path / "whole")


# --- overwriting ---


def old_model(target: Path) -> dict[str, bytes]:
    target.mkdir()
    (target / "config.json").write_text('{"old": 1}')
    (target / "model-00001-of-00009.safetensors").write_bytes(b"stale")
    return tree(target)


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    target = tmp_path / "out"
    old = old_model(target)
    with ModelWriter(target, layout(), key="k", overwrite=True) as writer:
        fill(writer, writer.pending())
        assert tree(target) == old
        writer.finish({"config.json": b"{}"})
    write_model(tmp_path / "whole")
    assert tree(target) == tree(tmp_path / "whole")
    assert siblings(target) == ["out", "whole"]


def test_interrupted_overwrite_leaves_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    old = old_model(target)
    interrupted(target, 40, overwrite=True)
    assert tree(target) == old


@pytest.mark.parametrize("step", ["exchange", "old aside", "new shown", "old removed"])
def test_killed_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Stops as a kill would, right after each step of an overwrite; the next run mends it."""

    class Killed(BaseException):
        pass

    target = tmp_path / "out"
    old = old_model(target)
    monkeypatch.setattr(ModelWriter, "_give_up", lambda _: None)
    real_rename, real_exchange, real_remove = (
        Path.rename,
        publish.exchange,
        shutil.rmtree,
    )

    def rename(self: Path, to: Path) -> Path:
        found = real_rename(self, to)
        if (step, to) in (("old aside", writer._old), ("new shown", target)):
            raise Killed
        return found

    def exchange(a: Path, b: Path) -> bool:
        if step != "exchange":
            return False
        assert real_exchange(a, b)
        raise Killed

    def remove(path: Path, **how: Any) -> None:
        real_remove(path, **how)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        patch.setattr(publish, "exchange", exchange)
        patch.setattr(shutil, "rmtree", remove)
        writer = ModelWriter(target, layout(), key="k", overwrite=True)
        fill(writer, writer.pending())
        with pytest.raises(Killed):
            writer.finish({"config.json": b"{}"})
    os.close(writer._journal._descriptor)  # as the kernel would; this frees the lock
    monkeypatch.undo()

    write_model(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    if step == "old aside":
        with ModelWriter(target, layout(), key="k", overwrite=True) as again:
            assert tree(target) == old
            fill(again, again.pending())
            again.finish({"config.json": b"{}"})
    else:
        assert tree(target) == whole
        assert "exists" in refusal_after_mending(target)
    assert tree(target) == whole
    assert siblings(target) == ["out", "whole"]


def refusal_after_mending(target: Path) -> str:
    with pytest.raises(FastmergeError) as caught:
        ModelWriter(target, layout(), key="k")
    return str(caught.value)


# --- refusals ---


def test_refuses_what_exists(tmp_path: Path) -> None:
    target = tmp_path / "out"
    old_model(target)
    assert refusal(target) == f"{target}: exists; choose another output or add overwrite=True"
    (tmp_path / "file").write_text("x")
    assert "not a folder" in refusal(tmp_path / "file", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    assert "not a model folder" in refusal(tmp_path / "home", overwrite=True)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out")
    assert "config.json" in tree(tmp_path / "out")


def test_refuses_inputs(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model)
    (tmp_path / "alias").symlink_to(model)
    (tmp_path / "linked").mkdir()
    for file in model.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    replace = "would replace the input"
    for target, given, words in [
        (model, model, replace),
        (tmp_path / "alias", model, replace),
        (model, tmp_path / "alias", replace),
        (model, tmp_path / "linked", replace),
        (model, model / "model-00001-of-00003.safetensors", replace),
        (tmp_path, model, replace),
    ]:
        message = refusal(target, inputs=[given], overwrite=True)
        assert words in message, (target, given)
    write_model(tmp_path / "beside", inputs=[model, tmp_path / "linked"])
    write_model(model / "merged", inputs=[model, tmp_path / "alias"])  # as trainers' callbacks do


def test_refuses_where_it_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastmergeError, match=re.escape(f"{tmp_path / 'no'} does not exist")):
        ModelWriter(tmp_path / "no" / "out", layout(), key="k")
    # Root may write anywhere, so the answer of access() is what is tested.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "is not writable" in refusal(tmp_path / "out")


def test_refuses_a_second_writer(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with ModelWriter(target, layout(), key="k") as writer:
        fill(writer, writer.pending()[:5])
        for options in ({}, {"fresh": True}, {"overwrite": True}):
            assert "another merge is writing it now" in refusal(target, **options)
        fill(writer, writer.pending()[5:])
        writer.finish()
    assert siblings(target) == ["out"]


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = namedtuple("status", "f_bavail f_frsize")
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: status(1, 4096))
        assert refusal(tmp_path / "out").startswith(f"{tmp_path}: no space left: needs 0.00 GB")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "shard"))

    monkeypatch.setattr(_C, "StagedFile", full)
    assert refusal(tmp_path / "out") == (
        f"{tmp_path / 'shard'}: no space left on the device; free some and run again"
    )
    assert siblings(tmp_path / "out") == []


def test_no_space_for_real(tmp_path: Path) -> None:
    plan = Layout.plan([("a", BF16, (1 << 20, 1 << 24))], max_shard_bytes=1 << 60)  # 32 TiB
    with pytest.raises(FastmergeError, match=r"no space left: needs 35184\.37 GB, [0-9.]+ GB free"):
        ModelWriter(tmp_path / "out", plan, key="k")
    assert siblings(tmp_path / "out") == []


def test_no_direct_io_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: object, path: str, *__: object, io: str, **___: object) -> None:
        assert io == "direct"
        raise OSError(errno.EINVAL, "Invalid argument", path)

    monkeypatch.setattr(_C, "StagedFile", refuses)
    message = refusal(tmp_path / "out", io="direct")
    assert message.endswith("no direct I/O on this file system; use io: auto")
    assert siblings(tmp_path / "out") == []


# The disk fills, or a quota bites, while weights are written: a limit on file size plays it.
_FULL = """
import importlib.util, resource, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("test_writer", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
try:
    with tests.ModelWriter(Path(sys.argv[2]), tests.layout(), key="k", staging_bytes=1) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
        tests.fill(writer, writer.pending())
        writer.finish()
except tests.FastmergeError as error:
    print(error)
"""


def test_disk_full_midway(tmp_path: Path) -> None:
    target = tmp_path / "out"
    run = [sys.executable, "-c", _FULL, __file__, str(target)]
    answer = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60)
    assert re.fullmatch(
        re.escape(str(tmp_path)) + r"/\.out\.fastmerge-partial/model-0000\d-of-0000\d\.safetensors"
        r": larger than this file system or the process may write\n",
        answer.stdout,
    )
    assert not target.exists()
    write_model(target)
    write_model(tmp_path / "whole")
    assert tree(target) == tree(tmp_path / "whole")


def test_threads(tmp_path: Path) -> None:
    """Several threads write a window of tensors each; the folder is the same."""
    write_model(tmp_path / "whole")
    with ModelWriter(tmp_path / "out", layout(), key="k", staging_bytes=1) as writer:
        names = iter(writer.pending())
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    name = next(names, None)
                if name is None:
                    return
                fill(writer, [name])

        threads = [threading.Thread(target=work, daemon=True) for _ in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        writer.finish({"config.json": b"{}"})
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"\0" * 64, b"{", b"[1, 2]\n", b"null\n3\n"])
def test_a_damaged_journal_counts_for_nothing(tmp_path: Path, damage: bytes) -> None:
    target = tmp_path / "out"
    (tmp_path / ".out.fastmerge-partial").mkdir()
    (tmp_path / ".out.fastmerge-journal").write_bytes(damage + b"\n")
    with ModelWriter(target, layout(), key="job") as writer:
        assert not writer.resumed
        fill(writer, writer.pending())
        writer.finish()
    assert target.is_dir() and not (tmp_path / ".out.fastmerge-journal").exists()


def test_a_journal_that_the_disk_has_no_room_for_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def filled() -> None:
        with ModelWriter(tmp_path / "out", layout(), key="job") as writer:
            monkeypatch.setattr(os, "write", full)
            writer._journal.add({"large": {}})

    with pytest.raises(FastmergeError, match="no space left"):
        filled()

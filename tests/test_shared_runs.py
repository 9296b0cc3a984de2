"""What other users, and archives, put into the folders of runs and where results go."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge.cli.files import check_file, write_result
from fastmerge.errors import FastmergeError
from fastmerge.evaluation.journal import Journal
from fastmerge.evaluation.weights import clear
from fastmerge.output.working import WorkingFolder
from fastmerge.retrograde import run
from fastmerge.search.sweep import sweep
from tests.test_shared_folders import ALICE, MALLORY, as_user, shared  # noqa: F401 (a fixture)
from tests.test_writer import tree

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")


def refusal(call: Callable[..., Any], *words: Any, **named: Any) -> str:
    with pytest.raises(FastmergeError) as caught:
        call(*words, **named)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 1700
    return str(caught.value)


@pytest.fixture
def walk(zoo: Any, tmp_path: Path) -> dict[str, Any]:
    zoo.tune(zoo.base("m0", layers=1), "m1", seed=1, size=0.05)
    return {
        "baseline": str(tmp_path / "m0"),
        "pool": [{"model": str(tmp_path / "m1")}],
        "seed": 3,
        "schedule": {
            "cycles": 1,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.4},
            "retrace": {"toward": "baseline", "method": "slerp", "t": 0.3},
        },
    }


@pytest.fixture
def recipe(walk: dict[str, Any]) -> dict[str, Any]:
    models = [walk["baseline"], walk["pool"][0]["model"]]
    return {
        "merge_method": "slerp",
        "base_model": models[0],
        "models": [{"model": model} for model in models],
        "parameters": {"t": 0.5},
    }


def scaled(grams: bytes) -> bytes:
    """Inner products of this very run that nobody measured."""
    with np.load(io.BytesIO(grams)) as file:
        kept = dict(file)
    kept["grams"] = kept["grams"] * np.where(np.eye(kept["grams"].shape[-1], dtype=bool), 1, 0.1)
    made = io.BytesIO()
    np.savez(made, **kept)
    return made.getvalue()


# --- what a run reads back ---


@root
@pytest.mark.parametrize("kind", ["file", "link", "hard link", "pipe", "device"])
@pytest.mark.parametrize("name", ["grams.npz", "run.json", "journal.jsonl"])
def test_a_run_reads_nothing_of_others(
    walk: dict[str, Any], tmp_path: Path, name: str, kind: str
) -> None:
    """Forged inner products made other weights, with exit code 0."""
    out = tmp_path / "out"
    run(walk, out, threads=1)
    place, forged = out / name, tmp_path / "forged"
    data = place.read_bytes() if place.exists() else b""
    forged.write_bytes(scaled(data) if name == "grams.npz" else data)
    place.unlink(missing_ok=True)
    if kind == "file":
        forged.rename(place)
        os.chown(place, MALLORY, MALLORY)
    elif kind == "link":
        place.symlink_to(forged)
        os.lchown(place, MALLORY, MALLORY)
    elif kind == "hard link":
        place.hardlink_to(forged)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    before, status = tree(out / "model"), os.lstat(place)
    assert str(place) in refusal(run, walk, out, resume=True, threads=1)
    assert os.path.samestat(os.lstat(place), status) and tree(out / "model") == before


@pytest.mark.parametrize("name", ["grams.npz", "run.json", "journal.jsonl", "."])
def test_a_run_that_others_may_write_to(walk: dict[str, Any], tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    run(walk, out, threads=1)
    (out / "journal.jsonl").touch(0o600)
    place = out / name
    mode = stat.S_IMODE(place.stat().st_mode)
    place.chmod(mode | stat.S_IWGRP)
    assert f"{place}: other users may write to it" in refusal(run, walk, out, resume=True)
    place.chmod(mode)
    run(walk, out, resume=True, threads=1)


def test_what_a_run_keeps_is_written_by_nobody_else(
    walk: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    """With any umask: it is read back, and believed."""
    before = os.umask(0)
    try:
        (tmp_path / "sweep").mkdir()  # by hand, and empty
        run(walk, tmp_path / "walk", threads=1)
        sweep(recipe, tmp_path / "sweep", [0.5], threads=1)
        Journal(tmp_path / "walk" / "journal.jsonl").put("score:x", 1)
        run(walk, tmp_path / "walk", resume=True, threads=1)
        sweep(recipe, tmp_path / "sweep", [0.5, 0.6], resume=True, threads=1)
    finally:
        os.umask(before)
    kept = ["walk", "walk/journal.jsonl", "walk/grams.npz", "walk/run.json", "walk/report.md"]
    for name in [*kept, "sweep", "sweep/sweep.json"]:
        assert not (tmp_path / name).stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), name


def test_a_run_out_of_an_archive_replaces_no_other_model(
    walk: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A link for the model's name led to the user's own, which a resumed run overwrote."""
    precious = tmp_path / "m1"
    whole = tree(precious)
    run(walk, tmp_path / "walk", threads=1)
    sweep(recipe, tmp_path / "sweep", [0.5], threads=1)
    for link in (tmp_path / "walk" / "model", tmp_path / "sweep" / "t=0.6"):
        if link.exists():
            link.rename(tmp_path / "moved")
        link.symlink_to(precious)
    assert "model: a link" in refusal(run, walk, tmp_path / "walk", resume=True)
    said = refusal(sweep, recipe, tmp_path / "sweep", [0.5, 0.6], resume=True)
    assert "t=0.6: a link" in said
    assert tree(precious) == whole


@pytest.mark.parametrize("model", ["../m1", "/etc", ".", "t=0.7", 7])
def test_a_sweep_knows_its_own_folders(
    recipe: dict[str, Any], tmp_path: Path, model: object
) -> None:
    """A table of an archive said of any folder that it was merged before."""
    sweep(recipe, tmp_path / "out", [0.5], threads=1)
    table = tmp_path / "out" / "sweep.json"
    table.write_text(table.read_text().replace('"t=0.5"', repr(model).replace("'", '"')))
    said = refusal(sweep, recipe, tmp_path / "out", [0.5], resume=True)
    assert "sweep.json: is damaged" in said


@root
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_scorers_read_is_not_made_where_others_put_something(
    tmp_path: Path, kind: str
) -> None:
    scratch = tmp_path / ".scored"
    if kind == "folder":
        scratch.mkdir()
        (scratch / "thesis").write_text("x")
    elif kind == "link":
        scratch.symlink_to(tmp_path)
    else:
        scratch.write_text("x")
    os.lchown(scratch, MALLORY, MALLORY)
    assert ".scored: " in refusal(clear, scratch)
    assert os.path.lexists(scratch) and (kind != "folder" or (scratch / "thesis").exists())


# --- where results go ---


@root
@pytest.mark.parametrize("name", ["report.md", "report.html", "trajectory.json"])
def test_a_report_takes_nobody_else_s_place(
    walk: dict[str, Any], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    run(walk, out, threads=1)
    place = out / name
    os.chown(place, MALLORY, MALLORY)
    said = place.read_bytes()
    assert f"{name}: another user's (uid {MALLORY})" in refusal(run, walk, out, resume=True)
    assert place.read_bytes() == said and place.stat().st_uid == MALLORY
    place.unlink()
    place.mkdir()
    assert f"{name}: cannot be written (Is a directory)" in refusal(run, walk, out, resume=True)


def test_a_journal_on_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "no space left" in refusal(Journal(tmp_path / "journal").put, "score:x", 1)


def test_links_of_others_lead_no_output_anywhere(
    walk: dict[str, Any],
    recipe: dict[str, Any],
    tmp_path: Path,
    shared: Path,  # noqa: F811
) -> None:
    """The kernel refuses them in sticky folders, where it is told to (fs.protected_symlinks)."""
    precious = tmp_path / "m1"
    whole = tree(precious)
    (tmp_path / "home").mkdir()
    for link, to in (("last", precious), ("new", tmp_path / "home" / "new"), ("up", tmp_path)):
        as_user(MALLORY, lambda link=link, to=to: (shared / link).symlink_to(to))  # type: ignore[misc]
    for out in ("last", "new", "up/home/x"):
        said = refusal(fastmerge.merge, recipe, shared / out, overwrite=True)
        assert f"another user's (uid {MALLORY}) where everybody may write" in said
        assert "where everybody may write" in refusal(run, walk, shared / out, resume=True)
        assert "where everybody may write" in refusal(sweep, recipe, shared / out, [0.5])
        assert "where everybody may write" in refusal(write_result, shared / out, b"x")
    assert tree(precious) == whole and not os.listdir(tmp_path / "home")
    # Ours lead where we want; whose folder it is may say where it leads, too.
    (shared / "own").symlink_to(tmp_path / "home")
    fastmerge.merge(recipe, shared / "own" / "out", threads=1)
    assert (tmp_path / "home" / "out").is_dir()


@root
@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
def test_a_result_takes_nobody_else_s_place(tmp_path: Path, kind: str) -> None:
    place, bashrc = tmp_path / "x.json", tmp_path / "bashrc"
    bashrc.write_text("precious")
    tmp_path.chmod(0o777)
    if kind == "file":
        place.write_text("thesis")
    elif kind == "link":
        place.symlink_to(bashrc)
    else:
        os.mkfifo(place)
    os.lchown(place, MALLORY, MALLORY)
    before = os.lstat(place)
    for call in (lambda: write_result(place, b"{}"), lambda: check_file(place, "--json")):
        assert f"another user's (uid {MALLORY})" in refusal(call)
    assert bashrc.read_text() == "precious" and os.path.samestat(os.lstat(place), before)
    assert kind != "file" or place.read_text() == "thesis"


def test_results_go_through_own_links_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real.json")
    for name in ("link", "real.json"):
        check_file(tmp_path / name, "--json")
        write_result(tmp_path / name, name.encode())
        assert (tmp_path / "real.json").read_bytes() == name.encode()
    assert (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    assert "cannot be written" in refusal(write_result, tmp_path / "pipe", b"{}")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    while not got and reader.is_alive():
        try:
            write_result(tmp_path / "pipe", b"{}")
            reader.join()
        except FastmergeError:  # it has not opened it yet
            continue
    assert got == [b"{}"]
    write_result(Path("/dev/null"), b"{}")


def test_another_user_finds_our_results_where_they_were(shared: Path) -> None:  # noqa: F811
    """Alice writes what she may; Mallory's file of that name stays Mallory's."""
    as_user(MALLORY, lambda: (shared / "x.json").write_text("thesis"))
    as_user(ALICE, lambda: refusal(write_result, shared / "x.json", b"{}"))
    as_user(ALICE, lambda: write_result(shared / "y.json", b"{}"))
    assert (shared / "x.json").read_text() == "thesis"
    assert (shared / "y.json").stat().st_uid == ALICE


# --- what a run that died left, and where it died ---


@pytest.mark.parametrize("name", [".run.json.0123456789abcdef", ".journal.jsonl.fedcba9876543210"])
def test_what_was_half_written_is_in_nobody_s_way(
    walk: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """A run that was killed before its header had its name could not be begun again."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{")
    run(walk, out, evaluate=False, threads=1)
    assert not (out / name).exists()


def test_a_walk_again_is_the_same_bits(zoo: Any, tmp_path: Path, walk: dict[str, Any]) -> None:
    """In fp32 the sums of matrices that were kept showed: another output of the same command."""
    for number in range(2):
        zoo.write(f"m{number}", zoo.read(tmp_path / f"m{number}"), dtype="F32")
    first = run(walk, tmp_path / "out", evaluate=False, threads=1).out
    assert first is not None
    wanted = tree(first / "model")
    run(walk, first, evaluate=False, threads=1, resume=True)
    assert tree(first / "model") == wanted


def test_a_lock_that_cannot_be_closed_hides_no_error(
    walk: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may say EIO or ENOSPC there, which was raised in place of what had happened."""
    close = os.close

    def failing(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        close(descriptor)
        if ".at-work" in name:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "close", failing)
    run(walk, tmp_path / "out", evaluate=False, threads=1)


def test_an_error_of_an_unfinished_folder_names_it(tmp_path: Path) -> None:
    """And not /proc/self/fd/7."""
    folder = WorkingFolder.make(tmp_path / "made")
    for inside, shown in ((folder.inside, folder.path), (folder.inside / "x", folder.path / "x")):
        error = folder.named(PermissionError(errno.EACCES, "Permission denied", str(inside)))
        assert error.filename == str(shown)
    other = OSError(errno.EACCES, "Permission denied", f"{folder.inside}0/x")
    assert folder.named(other) is other
    folder.close()


def test_a_sweep_without_memory_is_one_line(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("fastmerge.search.sweep.Sweep", none)
    assert "no more memory" in refusal(sweep, recipe, tmp_path / "out", [0.5])

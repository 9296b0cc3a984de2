"""A Hub cache that comes from somebody else: nothing in it leads out of it, or never ends."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge.errors import FastmergeError

COMMIT = "0" * 40


@pytest.fixture
def repository(zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cached repository of `a/b`, beside a folder that is no business of its."""
    constants = pytest.importorskip("huggingface_hub.constants")
    folder = tmp_path / "cache" / "models--a--b"
    snapshot = folder / "snapshots" / COMMIT
    for part in (snapshot, folder / "blobs", folder / "refs" / "pr", folder / "trees"):
        part.mkdir(parents=True)
    for number, name in enumerate(("model.safetensors", "config.json")):
        shutil.copy(zoo.base() / name, folder / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "pr" / "1").write_text(COMMIT)
    zoo.base("secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder.parent))
    return folder


def planned(revision: str = "main") -> Path | None:
    recipe = {"merge_method": "passthrough", "models": [{"model": f"a/b@{revision}"}]}
    return fastmerge.plan(recipe).models[0].folder


def refusal(revision: str = "main") -> str:
    with pytest.raises(FastmergeError) as caught:
        planned(revision)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1700
    return str(caught.value)


def test_a_cache_as_the_library_writes_it(repository: Path) -> None:
    for revision in ("main", "pr/1", COMMIT):
        assert planned(revision) == repository / "snapshots" / COMMIT


@pytest.mark.parametrize("text", ["../../../secret", "ABSOLUTE", "..", ".", "", "0/../../.."])
def test_a_branch_is_at_a_commit_and_no_path(repository: Path, tmp_path: Path, text: str) -> None:
    text = text.replace("ABSOLUTE", str(tmp_path / "secret"))
    (repository / "refs" / "main").write_text(text)
    assert "refs/main: names no commit" in refusal()


def _pipe(place: Path) -> None:
    os.mkfifo(place)


def _zero(place: Path) -> None:
    place.symlink_to("/dev/zero")


def _folder(place: Path) -> None:
    place.mkdir()


def _large(place: Path) -> None:
    place.touch()
    os.truncate(place, 200 << 30)


@pytest.mark.parametrize("name", ["refs/main", f"trees/{COMMIT}.json"])
@pytest.mark.parametrize("plant", [_pipe, _zero, _folder, _large])
def test_what_the_library_opens_is_a_small_file(
    repository: Path, name: str, plant: Callable[[Path], None]
) -> None:
    (repository / name).unlink(missing_ok=True)
    plant(repository / name)
    said = refusal()
    assert name in said and ("not a regular file" in said or "leads elsewhere" in said)


@pytest.mark.parametrize("what", ["snapshots", f"snapshots/{COMMIT}", "refs", "trees"])
def test_a_cache_s_folders_are_its_own(repository: Path, tmp_path: Path, what: str) -> None:
    (repository / what).rename(tmp_path / "moved")
    (repository / what).symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / "x.json").touch()
    assert "leads elsewhere" in refusal()


@pytest.mark.parametrize("revision", ["../../../secret/config.json", "/etc/hostname", "..", "a\0b"])
@pytest.mark.usefixtures("repository")
def test_a_revision_is_below_refs(revision: str) -> None:
    assert "leads elsewhere" in refusal(revision)

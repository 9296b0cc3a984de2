"""Weight files that go to an object store one by one, where the disk has no room for all."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge.errors import FastmergeError, OutputError, ResourceError
from fastmerge.output import part, upload, writer
from fastmerge.output.shipping import Shipping
from tests.test_remote import Proxy, bucket, obstore, recipe, server  # noqa: F401 (fixtures)
from tests.test_upload import (  # noqa: F401 (fixtures)
    Killed,
    dying,
    emptied,
    files,
    models,
    objects,
    there,
)

INDEX = "model.safetensors.index.json"
SHARDS = {"max_shard_bytes": 7000}
FILES = 6


@pytest.fixture
def tight(models: list[Path], tmp_path: Path, monkeypatch: Any) -> dict[str, Any]:
    """A disk with room for three weight files; ``seen``: the most that lay there at a time."""
    fastmerge.merge(recipe(models), tmp_path / "out", **SHARDS)
    seen: dict[str, Any] = {"files": files(tmp_path / "out"), "most": 0}
    sizes = {name: len(data) for name, data in seen["files"].items()}
    weights = [size for name, size in sizes.items() if name.endswith(".safetensors")]
    beside = sum(sizes.values()) - sum(weights)
    room = 3 * max(weights) + beside
    assert len(weights) == FILES and room < sum(weights)

    def free(_: Path) -> int:
        here = [f for f in Path(tempfile.gettempdir()).rglob("*.safetensors") if f.is_file()]
        seen["most"] = max(seen["most"], len(here))
        return room - sum(f.stat().st_size for f in here)

    monkeypatch.setattr(writer, "free_bytes", free)
    seen["free"] = free
    return seen


def sending(monkeypatch: Any, at: int, *, after: bool) -> list[str]:
    """The ``at``-th weight file ends the process before or after it is sent; those that were."""
    send, sent = upload.Upload.send_file, list[str]()

    def killed(self: Any, path: Path, key: str) -> None:
        if len(sent) == at and not after:
            raise Killed
        send(self, path, key)
        sent.append(path.name)
        if len(sent) == at + 1 and after:
            raise Killed

    monkeypatch.setattr(upload.Upload, "send_file", killed)
    return sent


def test_weight_files_go_one_by_one_where_the_disk_has_no_room(
    models: list[Path],
    tight: dict[str, Any],
    tmp_path: Path,
    bucket: Proxy,
    monkeypatch: Any,
) -> None:
    sent = sending(monkeypatch, 99, after=False)
    may = Shipping.may
    monkeypatch.setattr(Shipping, "may", lambda *given: (may(*given), tight["free"](tmp_path))[0])
    bucket.reset()
    report = fastmerge.merge(recipe(models), there, **SHARDS)
    assert objects(there) == tight["files"] and len(sent) == FILES and tight["most"] <= 3
    assert any("no room for all weight files" in note for note in report.notes)
    order = list(bucket.asked)
    assert order.index(INDEX) > max(order.index(name) for name in tight["files"] if name != INDEX)
    assert not list((tmp_path / "tmp").iterdir())
    merged = tmp_path / "again"
    merged.mkdir()
    for name, data in objects(there).items():
        (merged / name).write_bytes(data)
    assert not fastmerge.verify(merged).differences


@pytest.mark.parametrize(
    ("at", "after", "old"), [(0, False, False), (1, True, True), (3, False, True), (4, True, False)]
)
def test_what_was_sent_one_by_one_is_not_sent_again(
    models: list[Path],
    tight: dict[str, Any],
    tmp_path: Path,
    monkeypatch: Any,
    at: int,
    after: bool,
    old: bool,
) -> None:
    if old:
        with monkeypatch.context() as patched:
            patched.setattr(writer, "free_bytes", lambda _: 1 << 30)
            fastmerge.average(models, there, weights=[3, 1])
    with monkeypatch.context() as patched:
        first = sending(patched, at, after=after)
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there, overwrite=old, **SHARDS)
    assert INDEX not in objects(there) and "model.safetensors" not in objects(there)
    with monkeypatch.context() as patched:
        again = sending(patched, 99, after=False)
        report = fastmerge.merge(recipe(models), there, overwrite=old, **SHARDS)
    assert objects(there) == tight["files"]
    assert report.resumed > 0 or at == 0
    assert not set(first) & set(again) and len(first) + len(again) == FILES
    assert not list((tmp_path / "tmp").iterdir())


def test_what_others_did_to_what_was_sent_one_by_one(
    models: list[Path], tight: dict[str, Any], monkeypatch: Any
) -> None:
    store = obstore.store.from_url(there)
    with monkeypatch.context() as patched:
        sending(patched, 2, after=True)
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there, **SHARDS)
    name = f"model-00001-of-0000{FILES}.safetensors"
    obstore.delete(store, name)  # it is merged again
    fastmerge.merge(recipe(models), there, **SHARDS)
    assert objects(there) == tight["files"]
    emptied(there)
    with monkeypatch.context() as patched:
        dying(patched, 0, after=False)  # what lies beside the weights, when those are gone
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there, **SHARDS)
    obstore.put(store, name, b"another's")
    with pytest.raises(OutputError, match=rf"{name}: was sent, and is not there or is another"):
        fastmerge.merge(recipe(models), there, overwrite=True, **SHARDS)
    assert INDEX not in objects(there)
    fastmerge.merge(recipe(models), there, overwrite=True, fresh=True, **SHARDS)
    assert objects(there) == tight["files"]


def test_another_merge_after_one_that_sent_some_files(
    models: list[Path], tight: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patched:
        sending(patched, 1, after=True)
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there, **SHARDS)
    other = {**recipe(models), "parameters": {"t": 0.9}}
    with pytest.raises(OutputError, match=r"out: holds 2 objects already"):
        fastmerge.merge(other, there, **SHARDS)
    fastmerge.merge(other, there, overwrite=True, fresh=True, max_shard_bytes=12_000)
    (tmp_path / "other").mkdir()
    fastmerge.merge(other, tmp_path / "other" / "out", max_shard_bytes=12_000)
    assert objects(there) == files(tmp_path / "other" / "out") != tight["files"]


def test_a_disk_with_no_room_for_two_weight_files(
    models: list[Path], tight: dict[str, Any], monkeypatch: Any
) -> None:
    assert tight
    monkeypatch.setattr(writer, "free_bytes", lambda _: 20_000)
    monkeypatch.setattr(fastmerge.output.place, "free_bytes", lambda _: 20_000)
    with pytest.raises(FastmergeError, match=r"no space left: needs 0\.\d+ GB, 0.00 GB free"):
        fastmerge.merge(recipe(models), there, **SHARDS)
    assert not objects(there)


def test_parts_need_room_for_all_of_them_before_the_first(
    models: list[Path], tight: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Until finish they lie there whole: the one that finds no room is not the last one."""
    with monkeypatch.context() as patched:
        patched.setattr(part, "free_bytes", tight["free"])
        with pytest.raises(ResourceError, match=r"for all parts, .* set TMPDIR .* part out") as no:
            fastmerge.merge(recipe(models), there, part="1/3", **SHARDS)
    assert "\n" not in str(no.value) and not list((tmp_path / "tmp").iterdir())
    assert fastmerge.merge(recipe(models), there, **SHARDS).url  # as the line says
    assert objects(there) == tight["files"]
    emptied(there)
    # What other parts have written is room that is not needed again.
    weights = [len(data) for name, data in tight["files"].items() if name.endswith(".safetensors")]
    written: list[Path] = []

    def free(_: Path) -> int:
        written[:] = Path(tempfile.gettempdir()).rglob("*.safetensors")
        return sum(weights) - sum(file.stat().st_size for file in written)

    monkeypatch.setattr(part, "free_bytes", free)
    for number in (3, 1, 2, 3):
        fastmerge.merge(recipe(models), there, part=(number, 3), **SHARDS)
    assert len(written) == FILES
    assert fastmerge.finish(there).url and objects(there) == tight["files"]

"""Merges to an object store: whole or not loadable, the same bytes, one line for each fault."""

from __future__ import annotations

import http.client
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge import api
from fastmerge.cli import main
from fastmerge.errors import FastmergeError, OutputError
from fastmerge.models import store
from fastmerge.output import upload
from tests.test_bad_input_cli import refused
from tests.test_remote import (  # noqa: F401 (fixtures)
    SILENCE,
    Proxy,
    bucket,
    obstore,
    recipe,
    server,
)

there = "s3://models/out"


@pytest.fixture
def models(zoo: Any, bucket: Proxy, tmp_path: Path, monkeypatch: Any) -> list[Path]:  # noqa: F811
    bucket.reset()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(upload, "_PART_BYTES", 5 << 20)
    base = zoo.base("base", shards=2)
    (base / "tokenizer.json").write_text('{"a": 1}')
    emptied(there)
    return [base, zoo.tune(base, "tune")]


def emptied(url: str) -> None:
    store = obstore.store.from_url(url)
    for name in objects(url):
        obstore.delete(store, name)


def objects(url: str) -> dict[str, bytes]:
    store = obstore.store.from_url(url)
    names = [entry["path"] for batch in obstore.list(store) for entry in batch]
    return {name: bytes(obstore.get(store, name).bytes()) for name in names}


def files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*.*")}


def test_the_bytes_of_a_folder_and_the_index_last(
    models: list[Path],
    tmp_path: Path,
    bucket: Proxy,  # noqa: F811
) -> None:
    fastmerge.merge(recipe(models), tmp_path / "out", max_shard_bytes=20_000)
    bucket.reset()
    report = fastmerge.merge(recipe(models), there, max_shard_bytes=20_000)
    assert report.url == there and objects(there) == files(tmp_path / "out")
    order = list(bucket.asked)
    assert order.index("model.safetensors.index.json") > order.index("tokenizer.json")
    assert order.index("config.json") > order.index("model-00001-of-00002.safetensors")
    assert not list((tmp_path / "tmp").iterdir())
    assert all(b"very-secret" not in data for data in objects(there).values())
    again = api.plan(recipe([there, models[0]], "slerp"))
    assert again.models[0].label == there


def test_the_command_takes_a_url(models: list[Path], tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["average", *map(str, models), "-o", there, "-q"])
    assert not ended.value.code
    assert "model.safetensors" in objects(there)
    refused(capsys, ["average", *models, "-o", there], r"s3://models/out: holds \d+ objects al")
    fastmerge.average(models, tmp_path / "out", weights=[3, 1])
    obstore.put(obstore.store.from_url(there), "notes.txt", b"mine")
    fastmerge.average(models, there, weights=[3, 1], overwrite=True)
    assert objects(there) == {**files(tmp_path / "out"), "notes.txt": b"mine"}


def test_parts_meet_in_the_folder_for_temporary_files(models: list[Path], tmp_path: Path) -> None:
    fastmerge.merge(recipe(models), tmp_path / "out", max_shard_bytes=20_000)
    for number in (2, 1):
        report = fastmerge.merge(recipe(models), there, part=(number, 2), max_shard_bytes=20_000)
        assert report.url == there and not objects(there)
    assert fastmerge.finish(there).url == there
    assert objects(there) == files(tmp_path / "out")


@pytest.mark.parametrize("wrong", ["500", "cut"])
def test_what_fails_is_sent_again(
    models: list[Path],
    tmp_path: Path,
    bucket: Proxy,  # noqa: F811
    wrong: str,
) -> None:
    bucket.reset(lambda path, number: wrong if number % 3 == 1 else None, ("GET", "HEAD", "PUT"))
    fastmerge.merge(recipe(models), there)
    bucket.reset()
    fastmerge.merge(recipe(models), tmp_path / "out")
    assert objects(there) == files(tmp_path / "out")


def test_a_store_that_takes_its_time_is_not_sent_all_again(
    models: list[Path],
    bucket: Proxy,  # noqa: F811
    monkeypatch: Any,
) -> None:
    """The parts of 5 GB are joined before the answer comes, which took a server of Node's 40 s."""
    monkeypatch.setattr(store, "_SILENT_SECONDS", SILENCE / 4)
    bucket.reset()
    fastmerge.merge(recipe(models), there)
    asked = bucket.asked["model.safetensors"]
    emptied(there)
    bucket.reset(lambda name, number: "silent" if name == "model.safetensors" else None, ("PUT",))
    fastmerge.merge(recipe(models), there)
    assert bucket.asked["model.safetensors"] == asked
    assert store._WHOLE_SECONDS >= 600


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("500", "cannot be written, tried 4 times"),
        ("503", "cannot be written, tried 4 times"),
        ("409", "cannot be written, tried 4 times"),
        ("403", "refuses to take it; set credentials"),
        ("412", "cannot be written .*412 Precondition.*; run again when nobody else writes there"),
    ],
)
def test_a_store_that_fails_shows_nothing_and_the_upload_goes_on(
    models: list[Path],
    bucket: Proxy,  # noqa: F811
    monkeypatch: Any,
    wrong: str,
    said: str,
) -> None:
    monkeypatch.setattr(fastmerge.models.store, "_RETRIES", 1)
    down = ("model.safetensors",)
    bucket.reset(lambda path, number: wrong if path in down else None, ("PUT",))
    with pytest.raises(OutputError, match=f"out/model.safetensors: .*{said}") as no:
        fastmerge.merge(recipe(models), there)
    assert "\n" not in str(no.value) and "very-secret" not in str(no.value)
    assert len(str(no.value)) < 400  # obstore repeats the answer, and itself
    assert "model.safetensors" not in objects(there)
    bucket.reset()
    monkeypatch.setattr(api, "merge_plan", None)  # it is not merged again
    fastmerge.merge(recipe(models), there, overwrite=True)
    assert "model.safetensors" in objects(there)


def test_an_object_that_another_writes_is_noticed(models: list[Path], monkeypatch: Any) -> None:
    put = upload.Upload._put

    def meddled(self: Any, name: str) -> str:
        tag = put(self, name)
        if name == "config.json":
            obstore.put(obstore.store.from_url(there), name, b"{}")
        return tag

    monkeypatch.setattr(upload.Upload, "_put", meddled)
    with pytest.raises(OutputError, match=r"out/config.json: somebody else wrote it meanwhile"):
        fastmerge.merge(recipe(models), there)
    assert "model.safetensors" not in objects(there)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://no-such-bucket/m", r"s3://no-such-bucket/m: there is no such bucket"),
        ("s3://key:word@models/m", r"s3://models/m: a URL with credentials"),
        ("https://host/m", r"https://host/m: cannot be written to; give a folder"),
        ("hf://owner/name", r"hf://owner/name: cannot be written to"),
    ],
)
def test_what_cannot_be_written_is_one_line(models: list[Path], url: str, said: str) -> None:
    with pytest.raises(FastmergeError, match=said) as no:
        fastmerge.merge(recipe(models), url)
    assert "\n" not in str(no.value) and "word" not in str(no.value)


def test_an_upload_that_fails_is_aborted(
    models: list[Path],
    bucket: Proxy,  # noqa: F811
    monkeypatch: Any,
) -> None:
    monkeypatch.setattr(fastmerge.models.store, "_RETRIES", 1)
    assert models
    made = upload.Upload(there)
    made.folder.mkdir()
    (made.folder / "model.safetensors").write_bytes(bytes(12 << 20))
    bucket.reset(lambda path, number: "500" if number >= 3 else None, ("PUT",))
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot be written, tried 4"):
        made.send()
    assert bucket.asked["model.safetensors"] > 8
    listing = http.client.HTTPConnection(*bucket.behind)
    listing.request("GET", "/models?uploads")
    left = listing.getresponse().read()
    assert b"ListMultipartUploadsResult" in left and b"<UploadId>" not in left
    assert not objects(there)


class Killed(BaseException):
    """What ends a process at this point."""


def dying(monkeypatch: Any, at: int, *, after: bool) -> list[str]:
    """Uploads end as if killed before or after the ``at``-th object; the names that were sent."""
    put, sent = upload.Upload._put, list[str]()

    def killed(self: Any, name: str) -> str:
        if len(sent) == at and not after:
            raise Killed
        tag = put(self, name)
        sent.append(name)
        if len(sent) == at + 1 and after:
            raise Killed
        return tag

    monkeypatch.setattr(upload.Upload, "_put", killed)
    return sent


# Of 8 objects: before or after a shard, another, one beside them, the index; over an old model.
@pytest.mark.parametrize(
    ("at", "after", "old"),
    [(0, False, True), (1, True, False), (4, False, True), (7, False, False), (7, True, True)],
)
def test_the_same_command_goes_on_where_an_upload_was_killed(
    models: list[Path], tmp_path: Path, monkeypatch: Any, at: int, after: bool, old: bool
) -> None:
    said = {"max_shard_bytes": 20_000, "overwrite": old}
    fastmerge.merge(recipe(models), tmp_path / "out", max_shard_bytes=20_000)
    if old:  # of more files, and what is left of it without its index is no model
        fastmerge.merge(recipe(models), there, max_shard_bytes=10_000)
        for name in ("config.json", "README.md"):
            obstore.delete(obstore.store.from_url(there), name)
    with monkeypatch.context() as patched:
        sent = dying(patched, at, after=after)
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there, **said)
    index = "model.safetensors.index.json"
    assert (index in objects(there)) == (after and at == 7)
    with monkeypatch.context() as patched:
        again = dying(patched, 99, after=False)
        fastmerge.merge(recipe(models), there, **said)
    assert objects(there) == files(tmp_path / "out")
    assert set(again) == set(files(tmp_path / "out")) - set(sent[: at + 1 - after])
    assert not list((tmp_path / "tmp").iterdir())


def test_a_note_of_what_was_sent_that_is_torn(models: list[Path], monkeypatch: Any) -> None:
    """Of a full disk: what it says is not known, what comes after it is."""
    with monkeypatch.context() as patched:
        dying(patched, 1, after=True)
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there)
    (note,) = Path(tempfile.gettempdir()).glob(f"fastmerge-*/{upload._SENT}")
    lines = note.read_text().splitlines()
    note.write_text("\n".join([*lines[:-1], lines[-1][:9]]))
    with pytest.raises(OutputError, match=r"out: holds 1 objects already"):
        fastmerge.merge(recipe(models), there)
    with monkeypatch.context() as patched:
        dying(patched, 1, after=True)
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there, overwrite=True)
    fastmerge.merge(recipe(models), there, overwrite=True)
    assert "model.safetensors" in objects(there)


def test_what_others_wrote_meanwhile_is_not_taken_for_ones_own(
    models: list[Path], monkeypatch: Any
) -> None:
    with monkeypatch.context() as patched:
        dying(patched, 1, after=True)
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there)
    name = next(iter(objects(there)))
    obstore.put(obstore.store.from_url(there), name, b"another's")
    with pytest.raises(OutputError, match=r"out: holds 1 objects already; choose another"):
        fastmerge.merge(recipe(models), there)
    fastmerge.merge(recipe(models), there, overwrite=True)


def test_another_merge_does_not_replace_one_that_was_killed_when_whole(
    models: list[Path], monkeypatch: Any
) -> None:
    with monkeypatch.context() as patched:
        dying(patched, 5, after=True)
        with pytest.raises(Killed):
            fastmerge.merge(recipe(models), there)
    first = objects(there)
    assert "model.safetensors" in first
    other = {**recipe(models), "parameters": {"t": 0.9}}
    with pytest.raises(OutputError, match=r"out: holds 6 objects already"):
        fastmerge.merge(other, there)
    assert objects(there) == first
    fastmerge.merge(other, there, overwrite=True)
    assert objects(there)["model.safetensors"] != first["model.safetensors"]


def test_finish_goes_on_with_an_upload_that_failed(
    models: list[Path], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    fastmerge.merge(recipe(models), tmp_path / "out", max_shard_bytes=20_000)
    for number in (1, 2):
        fastmerge.merge(recipe(models), there, part=(number, 2), max_shard_bytes=20_000)
    with monkeypatch.context() as patched:
        dying(patched, 1, after=True)
        with pytest.raises(Killed):
            fastmerge.finish(there)
    waits = r"out: a whole merge waits in .* to be sent there; `fastmerge finish s3://models/out` s"
    with pytest.raises(OutputError, match=waits):
        fastmerge.merge(recipe(models), there, part=(1, 2), max_shard_bytes=20_000)
    report = fastmerge.finish(there)
    assert (report.parts, report.files, report.tensors) == (0, 2, 21) and "joined" in report.notes[
        0
    ]
    assert objects(there) == files(tmp_path / "out")
    emptied(there)
    refused(capsys, ["finish", there], r"s3://models/out: no part of it lies in .* same TMPDIR")


def test_a_merge_in_parts_is_named_by_its_url(models: list[Path]) -> None:
    fastmerge.merge(recipe(models), there, part=(1, 2))
    with pytest.raises(OutputError, match=r"in parts; end that with `fastmerge finish s3://mod"):
        fastmerge.merge(recipe(models), there)


def test_a_tokenizer_that_changed_since_is_not_the_old_one(
    models: list[Path],
    bucket: Proxy,  # noqa: F811
) -> None:
    bucket.reset(lambda path, number: "403", ("PUT",))
    with pytest.raises(OutputError, match="refuses"):
        fastmerge.merge(recipe(models), there)
    bucket.reset()
    (models[0] / "tokenizer.json").write_text('{"a": 2}')
    fastmerge.merge(recipe(models), there)
    assert objects(there)["tokenizer.json"] == b'{"a": 2}'


def test_two_merges_to_one_place_at_once(models: list[Path], monkeypatch: Any) -> None:
    other = {**recipe(models), "parameters": {"t": 0.9}}
    send, seen = upload.Upload.send, []

    def interrupted(self: Any) -> None:
        monkeypatch.setattr(upload.Upload, "send", send)
        for again in (
            lambda: fastmerge.merge(other, there, overwrite=True),
            lambda: fastmerge.finish(there, overwrite=True),
        ):
            with pytest.raises(OutputError, match="another merge or finish here is at work on it"):
                again()
            seen.append(again)
        send(self)

    monkeypatch.setattr(upload.Upload, "send", interrupted)
    fastmerge.merge(recipe(models), there)
    assert len(seen) == 2 and "model.safetensors" in objects(there)


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link"])
def test_what_lies_where_uploads_are_merged(models: list[Path], tmp_path: Path, kind: str) -> None:
    """Anybody can make a name in a folder for temporary files."""
    begun = upload.Upload(there)
    place = begun._place
    begun.close()
    assert not place.exists()
    if kind == "file":
        place.write_text("x")
    else:
        place.symlink_to(tmp_path if kind == "link" else "nothing")
    with pytest.raises(FastmergeError, match=f"{place.name}: (not a folder|a link)"):
        fastmerge.merge(recipe(models), there)
    assert not objects(there)


@pytest.mark.parametrize("text", [b"", b'{"key": "', b"[]", b"{}", b"[" * 5000])
def test_a_note_that_is_damaged_counts_for_nothing(models: list[Path], text: bytes) -> None:
    """Of a disk that was full, and JSON that no upload writes."""
    begun = upload.Upload(there)
    begun.close()
    begun._place.mkdir(mode=0o700)
    (begun._place / upload._MERGED).write_bytes(text)
    begun.folder.mkdir()
    assert fastmerge.merge(recipe(models), there).url == there
    assert not begun._place.exists()


@pytest.mark.parametrize(
    "line",
    [b"{}", b"7", b'{"name": 7}', b"\xff\xfe", b"[" * 5000, b"[7]", b'{"name": [], "tag": 1}'],
)
def test_a_note_of_what_was_sent_that_no_upload_writes(models: list[Path], line: bytes) -> None:
    begun = upload.Upload(there)
    begun.close()
    begun._place.mkdir(mode=0o700)
    (begun._place / upload._SENT).write_bytes(line + b"\n")
    assert fastmerge.merge(recipe(models), there).url == there


@pytest.mark.parametrize("name", [upload._SENT, upload._MERGED, upload._LOCK])
def test_a_disk_that_fails_beside_an_upload_is_one_line(
    models: list[Path], tmp_path: Path, monkeypatch: Any, name: str
) -> None:
    """What cannot be noted is said as any full disk is, from Python too; the next run is right."""
    opened, made = Path.open, os.open

    def full(self: Path, *words: Any, **named: Any) -> Any:
        if self.name == name:
            raise OSError(28, "No space left on device", str(self))
        return opened(self, *words, **named)

    def unmade(path: Any, *words: Any, **named: Any) -> int:
        if str(path).endswith(name):
            raise OSError(28, "No space left on device", str(path))
        return made(path, *words, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        patched.setattr(os, "open", unmade)
        with pytest.raises(FastmergeError, match=rf"{name}: no space left on the device"):
            fastmerge.merge(recipe(models), there)
    assert "model.safetensors" not in objects(there)
    fastmerge.merge(recipe(models), there)
    assert "model.safetensors" in objects(there) and not list((tmp_path / "tmp").iterdir())


def test_a_model_that_another_writes_into_at_the_end_does_not_load(
    models: list[Path], monkeypatch: Any
) -> None:
    """The line says so; the index stood there all the same."""
    put = upload.Upload._put

    def meddled(self: Any, name: str) -> str:
        tag = put(self, name)
        if name == "model.safetensors.index.json":
            obstore.put(obstore.store.from_url(there), "config.json", b"{}")
        return tag

    monkeypatch.setattr(upload.Upload, "_put", meddled)
    with pytest.raises(OutputError, match=r"config.json: somebody else wrote .* nothing there loa"):
        fastmerge.merge(recipe(models), there, max_shard_bytes=20_000)
    assert "model.safetensors.index.json" not in objects(there)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_uploads_are_merged_where_nobody_renames_them(
    models: list[Path], tmp_path: Path, mode: int
) -> None:
    (tmp_path / "tmp").chmod(mode)
    if mode & 0o1000:
        fastmerge.merge(recipe(models), there)
        return
    with pytest.raises(OutputError, match=r"tmp: others may write .* set TMPDIR"):
        fastmerge.merge(recipe(models), there)
    assert not objects(there) and not os.listdir(tmp_path / "tmp")


def test_a_merge_that_waited_for_the_lock_goes_on_from_there(
    models: list[Path],
) -> None:
    """Its folder was removed by the one that had it, after both had looked at the store."""
    second = upload.Upload(there)
    fastmerge.merge(recipe(models), there)
    second.lock()
    second.close()
    with pytest.raises(OutputError, match=r"holds \d objects already"):
        fastmerge.merge(recipe(models), there)


@pytest.mark.parametrize("parts", [False, True])
def test_a_model_that_is_half_removed_is_not_sent(
    models: list[Path], tmp_path: Path, monkeypatch: Any, parts: bool
) -> None:
    """Killed when all was sent: what lay there still was sent again as the whole model."""
    remove, removed = shutil.rmtree, list[str]()

    def killed(path: Any, *words: Any, **named: Any) -> None:
        if (Path(path) / "fastmerge.json").is_file() and not removed:
            for name in sorted(os.listdir(path))[1:4]:
                removed.append(name)
                (Path(path) / name).unlink()
            raise Killed
        remove(path, *words, **named)

    said = {"max_shard_bytes": 20_000}
    fastmerge.merge(recipe(models), tmp_path / "out", **said)
    if parts:
        fastmerge.merge(recipe(models), there, part=(1, 1), **said)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            fastmerge.finish(there) if parts else fastmerge.merge(recipe(models), there, **said)
    assert removed and objects(there) == files(tmp_path / "out")
    if parts:
        with pytest.raises(OutputError, match="nothing to finish"):
            fastmerge.finish(there)
    else:
        with pytest.raises(OutputError, match="holds 8 objects already"):
            fastmerge.merge(recipe(models), there, **said)
    assert objects(there) == files(tmp_path / "out")
    fastmerge.merge(recipe(models), there, overwrite=True, **said)
    assert objects(there) == files(tmp_path / "out")
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("part", [None, "1/1"])
@pytest.mark.parametrize("url", [there, f"{there}/", "s3://models/x/../out"])
def test_an_input_is_not_replaced(models: list[Path], url: str, part: str | None) -> None:
    """As of a folder: the model that is read would be gone."""
    fastmerge.merge(recipe(models), there)
    before = objects(there)
    for named in (there, f"{there}/model.safetensors"):
        with pytest.raises(OutputError, match="out: the output would replace the input s3://mod"):
            fastmerge.average([named, models[1]], url, overwrite=True, part=part)
    assert objects(there) == before

"""Malformed safetensors files and indexes: each refused with one line that names the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from fastmerge.errors import FastmergeError
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.folder import INDEX
from fastmerge.models.header import _any_header, _plain_header


def entry(
    begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8"
) -> dict[str, Any]:
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_of(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def refusal(path: Path) -> str:
    """The message, having checked that it is one line and names what is at fault."""
    with pytest.raises(FastmergeError) as caught:
        Checkpoint.open(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    return message


A4 = entry(0, 4)
BIG = 2**63

# What the file holds; a word of the message; whether the safetensors library refuses it too.
MALFORMED = {
    "empty": (b"", "truncated", True),
    "seven-bytes": (b"\x02" + bytes(6), "truncated", True),
    "length-only": (struct.pack("<Q", 2), "truncated", True),
    "length-huge": (file_of({}, length=2**64 - 1), "header length", True),
    "length-over-limit": (file_of({}, length=100_000_001), "header length", True),
    "length-past-end": (file_of({}, length=3), "truncated", True),
    "length-zero": (struct.pack("<Q", 0), "'{'", True),
    "length-cuts-json": (file_of({"a": A4}, bytes(4), length=9), "not JSON", True),
    "html": (b"<!DOCTYPE html><html>not found</html>", "header length", True),
    "lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull", True),
    "zip": (b"PK\x03\x04" + bytes(40), "truncated", True),
    "not-json": (file_of(b"{nonsense}"), "not JSON", True),
    "not-utf8": (file_of(b'{"\xff":1}'), "UTF-8", True),
    "array": (file_of(b"[]"), "'{'", True),
    "leading-space": (file_of(b" {}"), "'{'", False),  # the format's text forbids it
    "trailing-text": (file_of(b"{} x"), "not JSON", True),
    "nested-deeply": (file_of(b'{"a":' + b"[" * 100_000), "nested", True),
    "nan": (file_of(b'{"a":NaN}'), "NaN", True),
    "duplicate-tensor": (
        file_of(f'{{"a":{json.dumps(A4)},"a":{json.dumps(A4)}}}'.encode(), bytes(4)),
        "duplicate key 'a'",
        False,  # the library takes the last one
    ),
    "duplicate-field": (
        file_of(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        "duplicate key 'dtype'",
        True,
    ),
    "duplicate-metadata": (
        file_of(b'{"__metadata__":{"k":"1","k":"2"}}'),
        "duplicate key 'k'",
        False,
    ),
    "metadata-number": (file_of({"__metadata__": {"k": 1}}), "__metadata__", True),
    "metadata-list": (file_of({"__metadata__": ["k"]}), "__metadata__", True),
    "entry-number": (file_of({"a": 1}), "'a' must have", True),
    "field-missing": (file_of({"a": {"dtype": "U8", "shape": [0]}}), "'a' must have", True),
    "field-unknown": (file_of({"a": {**A4, "extra": 1}}, bytes(4)), "'a' must have", False),
    "dtype-unknown": (file_of({"a": entry(0, 4, dtype="BF17")}, bytes(4)), "'BF17'", True),
    "dtype-lower": (file_of({"a": entry(0, 4, dtype="u8")}, bytes(4)), "'u8'", True),
    "dtype-list": (file_of({"a": entry(0, 4, dtype=["U8"])}, bytes(4)), "dtype", True),
    "shape-negative": (file_of({"a": entry(0, 4, [-2, -2])}, bytes(4)), "shape", True),
    "shape-float": (file_of({"a": entry(0, 4, [4.0])}, bytes(4)), "shape", True),
    "shape-bool": (file_of({"a": entry(0, 1, [True])}, bytes(1)), "shape", True),
    "shape-string": (file_of({"a": {**A4, "shape": "4"}}, bytes(4)), "shape", True),
    "shape-too-big": (file_of({"a": entry(0, 4, [2**64])}, bytes(4)), "shape", True),
    "shape-overflows": (file_of({"a": entry(0, 0, [2**32, 2**32])}), "overflows", True),
    "shape-overflows-to-0": (file_of({"a": entry(0, 0, [2**62, 4, 0])}), "overflows", True),
    "bits-overflow": (file_of({"a": entry(0, 8, [2**60], "F64")}, bytes(8)), "overflows", True),
    "bits-left-over": (file_of({"a": entry(0, 1, [3], "F4")}, bytes(1)), "whole bytes", True),
    "size-mismatch": (file_of({"a": entry(0, 4, [2, 2], "F32")}, bytes(4)), "needs 16", True),
    "offsets-one": (file_of({"a": {**A4, "data_offsets": [4]}}, bytes(4)), "data_offsets", True),
    "offsets-reversed": (file_of({"a": entry(4, 0, [4])}, bytes(4)), "span -4", True),
    "offsets-negative": (file_of({"a": entry(-4, 0)}, bytes(4)), "data_offsets", True),
    "offsets-huge": (file_of({"a": entry(BIG, BIG + 4)}, bytes(4)), "data_offsets", True),
    "gap-at-start": (file_of({"a": entry(1, 4)}, bytes(4)), "belong to no tensor", True),
    "gap-between": (file_of({"a": A4, "b": entry(5, 8)}, bytes(8)), "before tensor 'b'", True),
    "overlap": (file_of({"a": A4, "b": entry(3, 8)}, bytes(8)), "'b' overlaps", True),
    "same-place": (file_of({"a": A4, "b": A4}, bytes(4)), "overlaps", True),
    "data-truncated": (file_of({"a": A4}, bytes(3)), "truncated", True),
    "data-left-over": (file_of({"a": A4}, bytes(5)), "1 bytes at the end", True),
    "no-tensors-but-data": (file_of({}, bytes(5)), "5 bytes at the end", True),
    "name-surrogate": (
        file_of(b'{"\\ud800":' + json.dumps(A4).encode() + b"}", bytes(4)),
        "",
        True,
    ),
    "name-newline": (file_of({"a\nb": entry(1, 4)}, bytes(4)), "'a\\nb'", True),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(tmp_path: Path, case: str) -> None:
    content, word, library_refuses = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert word in refusal(path)
    # A folder that holds it fails the same way.
    with pytest.raises(FastmergeError, match=r"model\.safetensors: "):
        Checkpoint.open(tmp_path)
    if library_refuses:
        with pytest.raises(SafetensorError):
            safe_open(path, framework="numpy").__enter__()
    else:
        with safe_open(path, framework="numpy"):
            pass


# Unusual, and good: what the library opens is not refused without a reason.
WELL_FORMED = {
    "no-tensors": file_of({}),
    "metadata-only": file_of({"__metadata__": {"format": "pt"}}),
    "spaces-after": file_of(json.dumps({"a": A4}).encode() + b"   ", bytes(4)),
    "scalar": file_of({"a": entry(0, 2, [], "BF16")}, bytes(2)),
    "zero-size": file_of({"b": A4, "a": entry(0, 0), "c": entry(4, 4, [0, 7], "F32")}, bytes(4)),
    "not-in-file-order": file_of({"b": entry(4, 8), "a": A4}, bytes(8)),
    "unaligned": file_of({"a": entry(0, 1), "b": entry(1, 5, [1], "F32")}, bytes(5)),
    "unicode": file_of({"é\u2028 ": A4}, bytes(4)),
}


@pytest.mark.parametrize("case", WELL_FORMED)
def test_well_formed_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WELL_FORMED[case])
    ours = Checkpoint.open(path)
    with safe_open(path, framework="numpy") as theirs:
        assert set(ours.tensors) == set(theirs.keys())
        for name, info in ours.tensors.items():
            assert list(info.shape) == theirs.get_slice(name).get_shape()
            assert info.dtype.code == theirs.get_slice(name).get_dtype()


# --- index and folder ---


def shards(folder: Path, **files: dict[str, Any]) -> None:
    for name, header in files.items():
        size = max((item["data_offsets"][1] for item in header.values()), default=0)
        (folder / f"{name}.safetensors").write_bytes(file_of(header, bytes(size)))


def index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _missing_shard(folder: Path) -> None:
    shards(folder, x={"a": A4})
    index(folder, {"a": "x.safetensors", "b": "y.safetensors"})


def _tensor_not_in_shard(folder: Path) -> None:
    shards(folder, x={"a": A4})
    index(folder, {"a": "x.safetensors", "b": "x.safetensors"})


def _tensor_not_in_index(folder: Path) -> None:
    shards(folder, x={"a": A4, "b": entry(4, 5)})
    index(folder, {"a": "x.safetensors"})


def _tensor_in_two_shards(folder: Path) -> None:
    shards(folder, x={"a": A4, "b": entry(4, 5)}, y={"b": A4})
    index(folder, {"a": "x.safetensors", "b": "y.safetensors"})


def _outside(folder: Path) -> None:
    index(folder, {"a": "../x.safetensors"})


def _absolute(folder: Path) -> None:
    index(folder, {"a": "/etc/passwd"})


def _no_weight_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def _weight_map_of_numbers(folder: Path) -> None:
    index(folder, {"a": 1})


def _index_not_json(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors"')


def _index_duplicate(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')


def _two_models(folder: Path) -> None:
    shards(folder, x={"a": A4}, model={"a": A4})
    index(folder, {"a": "x.safetensors"})


def _no_index(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(file_of({"a": A4}, bytes(4)))


def _other_name(folder: Path) -> None:
    shards(folder, weights={"a": A4})


def _adapter(folder: Path) -> None:
    shards(folder, adapter_model={"a": A4})


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")


def _empty(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def _config_broken(folder: Path) -> None:
    shards(folder, model={"a": A4})
    (folder / "config.json").write_text("{'model_type': 'llama'}")


def _config_list(folder: Path) -> None:
    shards(folder, model={"a": A4})
    (folder / "config.json").write_text("[]")


def _folder_as_file(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()


FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (_missing_shard, f"{INDEX}: shard 'y.safetensors' is missing"),
    (_tensor_not_in_shard, f"{INDEX}: tensor 'b' is not in its shard 'x.safetensors'"),
    (_tensor_not_in_index, "x.safetensors: has tensor 'b', but the index does not list it"),
    (_tensor_in_two_shards, "x.safetensors: has tensor 'b', but the index places it in 'y.safe"),
    (_outside, "outside the folder"),
    (_absolute, "outside the folder"),
    (_no_weight_map, f"{INDEX}: has no 'weight_map'"),
    (_weight_map_of_numbers, f"{INDEX}: tensor 'a' has no shard name"),
    (_index_not_json, f"{INDEX}: not JSON"),
    (_index_duplicate, f"{INDEX}: duplicate key 'a'"),
    (_two_models, "remove the stale one"),
    (_no_index, f"has shards but no {INDEX}"),
    (_other_name, "to use weights.safetensors, name that file itself"),
    (_adapter, "a LoRA adapter"),
    (_pickle, "safe_serialization=True"),
    (_empty, "no model.safetensors"),
    (_config_broken, "config.json: not JSON"),
    (_config_list, "config.json: not a JSON object"),
    (_folder_as_file, "model.safetensors: not a regular file"),
]


@pytest.mark.parametrize(("make", "words"), FOLDERS, ids=lambda v: getattr(v, "__name__", "")[1:])
def test_malformed_folder(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path)
    assert words in refusal(tmp_path)


def test_absent_and_foreign(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "absent")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    assert "not a model folder" in refusal(tmp_path / "weights.gguf")


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not bind root, who may run this: the refusal is the operating system's."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({"a": A4}, bytes(4)))

    def denied(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fastmerge.models.header.os.open", denied)
    assert "cannot be read (Permission denied)" in refusal(path)


# --- read at once, or looked at key by key ---

_TWICE = b'"a":%b,"a":%b' % ((json.dumps(A4).encode(),) * 2)
TRICKY = {
    "as many colons as pairs": b'{"__metadata__":{"k":"\\u003a\\u003a\\u003a\\u003a"},%b}' % _TWICE,
    "a name in two ways": b'{"a":%b,"\\u0061":%b}' % ((json.dumps(A4).encode(),) * 2),
    "a mapping for a shape": b'{"b":{"dtype":"U8","shape":{"x":1},"data_offsets":[0,4]}}',
    "metadata twice": b'{"__metadata__":{"a":"::"},"__metadata__":{"b":":"},%b}' % _TWICE[:56],
    "a list with the length of a tensor": b'{"b":[1,2,3],%b}' % _TWICE,
    "minus zero": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}',
    "colons in a name": b'{"a:b":%b}' % json.dumps(A4).encode(),
    "colons in metadata": b'{"__metadata__":{"a:b":"c: \\"d\\"\\n"},"a":%b}'
    % json.dumps(A4).encode(),
    "null metadata": b'{"__metadata__":null,"a":%b}' % json.dumps(A4).encode(),
}


def _header(file: bytes) -> bytes:
    return file[8 : 8 + int.from_bytes(file[:8], "little")]


def _content(read: Callable[[bytes, int, int], Any], data: bytes) -> Any:
    try:
        return read(data, 0, 8 + len(data))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("case", [*TRICKY, *WELL_FORMED, *MALFORMED])
def test_a_header_that_is_read_at_once_is_what_a_look_at_every_key_finds(case: str) -> None:
    data = TRICKY.get(case) or _header(WELL_FORMED.get(case) or MALFORMED[case][0])
    if not data.startswith(b"{"):
        return  # refused before
    found = _content(_plain_header, data)
    assert found is None or found == _content(_any_header, data)


def test_most_headers_are_read_at_once() -> None:
    for case in ("colons in metadata", "null metadata"):
        assert _content(_plain_header, TRICKY[case]) is not None
    for case in ("scalar", "zero-size"):
        assert _content(_plain_header, _header(WELL_FORMED[case])) is not None
    assert _content(_plain_header, TRICKY["colons in a name"]) is None

"""The safetensors library's verdict on a header is ours, but for what docs/security.md lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from fastmerge.errors import ModelError
from fastmerge.models.header import read_header

ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


def with_entry(text: str) -> str:
    return f'{{"a":{text}}}'


# Taken by the library, refused here, and by which words: the rows of the table.
OURS = {
    "twice": (f'{{"a":{ENTRY},"a":{ENTRY}}}', "duplicate key 'a'"),
    "space": (f" {with_entry(ENTRY)}", "does not start with"),
    "field": (with_entry(ENTRY[:-1] + ',"more":1}'), "nothing else"),
    "dimensions": (
        with_entry(json.dumps({"dtype": "F32", "shape": [1] * 64 + [2], "data_offsets": [0, 8]})),
        "65 dimensions",
    ),
    "list": (with_entry('["F32",[2],[0,8]]'), "must have dtype, shape and data_offsets"),
    "object": (with_entry(ENTRY.replace('"F32"', '{"F32":null}')), "unknown dtype"),
}
OVERFLOW = with_entry('{"dtype":"F32","shape":[9223372036854775807,8,0],"data_offsets":[0,0]}')
TAKEN = {
    "plain": with_entry(ENTRY),
    "spaces behind": with_entry(ENTRY) + "   ",
    "no metadata": f'{{"__metadata__":null,"a":{ENTRY}}}',
    "metadata": f'{{"__metadata__":{{"k":"v"}},"a":{ENTRY}}}',
    "metadata that reads as an entry": (
        f'{{"__metadata__":{{"dtype":"F32","shape":"x","data_offsets":"y"}},"a":{ENTRY}}}'
    ),
    "64 dimensions": with_entry(
        json.dumps({"dtype": "F32", "shape": [1] * 63 + [2], "data_offsets": [0, 8]})
    ),
    "whole pair": with_entry(ENTRY).replace('"a"', '"\\ud83d\\ude00"'),
}
REFUSED = {
    "half a pair": with_entry(ENTRY).replace('"a"', '"\\ud83d"'),
    "-0": with_entry(ENTRY.replace("[0,8]", "[-0,8]")),
    "1e0": with_entry(ENTRY.replace("[2]", "[2e0]")),
    "2.0": with_entry(ENTRY.replace("[2]", "[2.0]")),
    "NaN": with_entry(ENTRY.replace("[2]", "[NaN]")),
    "true": with_entry(ENTRY.replace("[2]", "[true]")),
    "a list": f"[{with_entry(ENTRY)}]",
    "metadata of numbers": f'{{"__metadata__":{{"k":1}},"a":{ENTRY}}}',
    "metadata is an entry": f'{{"__metadata__":{ENTRY},"a":{ENTRY}}}',
    "no shape": with_entry('{"dtype":"F32","data_offsets":[0,8]}'),
    "shape is a number": with_entry(ENTRY.replace("[2]", "2")),
    "shape is a mapping": with_entry(ENTRY.replace("[2]", '{"0":2}')),
    "offsets are three": with_entry(ENTRY.replace("[0,8]", "[0,8,8]")),
    "offsets are null": with_entry(ENTRY.replace("[0,8]", "null")),
    "dtype in small letters": with_entry(ENTRY.replace("F32", "f32")),
    "entry is null": with_entry("null"),
    "entry is text": with_entry('"x"'),
    "too short": with_entry(ENTRY.replace("[2]", "[1]")),
    "a zero byte behind": with_entry(ENTRY) + "\\0",
}


def verdicts(path: Path, text: str, data: bytes = bytes(8)) -> tuple[bool, str]:
    """Whether the library takes it; our refusal, or nothing."""
    header = text.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    try:
        read_header(path, 0)
        refusal = ""
    except ModelError as error:
        refusal = str(error)
        assert refusal.isprintable() and str(path) in refusal
    try:
        with safe_open(path, "np"):
            return True, refusal
    except SafetensorError:
        return False, refusal


@pytest.mark.parametrize("case", OURS)
def test_refused_by_us_alone(tmp_path: Path, case: str) -> None:
    text, words = OURS[case]
    taken, refusal = verdicts(tmp_path / "x.safetensors", text)
    assert taken
    assert words in refusal


def test_a_size_that_overflows_beside_a_zero(tmp_path: Path) -> None:
    """The library's verdict on it is not the same in every version."""
    assert "overflows" in verdicts(tmp_path / "x.safetensors", OVERFLOW, b"")[1]


@pytest.mark.parametrize("case", TAKEN)
def test_taken_by_both(tmp_path: Path, case: str) -> None:
    assert verdicts(tmp_path / "x.safetensors", TAKEN[case]) == (True, "")


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_both(tmp_path: Path, case: str) -> None:
    taken, refusal = verdicts(tmp_path / "x.safetensors", REFUSED[case])
    assert not taken
    assert refusal

"""What a planted or damaged journal may not bring into an output."""

from __future__ import annotations

import json
from pathlib import Path

from fastmerge.output.writer import ModelWriter
from tests.test_writer import TENSORS, fill, layout, settle


def begun(target: Path) -> tuple[Path, bytes]:
    """A merge that was given up when all was written; its journal, and what that says."""
    with ModelWriter(target, layout(), key="job") as writer:
        fill(writer, writer.pending())
        settle(writer, len(TENSORS))
    journal = target.with_name(f".{target.name}.fastmerge-journal")
    return journal, journal.read_bytes()


def test_text_that_is_none_ends_a_journal(tmp_path: Path) -> None:
    """Half of a surrogate pair went into fastmerge.json, which then could not be read."""
    target = tmp_path / "out"
    journal, whole = begun(target)
    name, result = json.loads(whole.splitlines()[-1])
    half = json.dumps([name, {**result, "note": "\ud800"}]).encode()
    for wrong in (half, half.replace(rb"\ud800", b"\xed\xa0\x80"), b"[" * 100_000):
        journal.write_bytes(whole + wrong + b"\n")
        with ModelWriter(target, layout(), key="job") as writer:
            assert writer.resumed == {name for name, *_ in TENSORS}
            assert all("note" not in said for said in writer.results.values())
    with ModelWriter(target, layout(), key="job") as writer:
        said = json.dumps(writer.results, ensure_ascii=False)
        writer.finish({"config.json": b"{}"})
    assert said.encode()


def test_entries_of_the_wrong_form_end_a_journal(tmp_path: Path) -> None:
    target = tmp_path / "out"
    journal, whole = begun(target)
    for wrong in (b"[]", b'["x"]', b"[[1], {}]", b'["large", 3]'):
        journal.write_bytes(whole + wrong + b"\n")
        with ModelWriter(target, layout(), key="job") as writer:
            assert writer.resumed
    with ModelWriter(target, layout(), key="job") as writer:
        fill(writer, writer.pending())
        writer.finish()

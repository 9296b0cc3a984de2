"""What an interrupted merge had finished counts only if its bytes are those that were written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastmerge.output.writer import ModelWriter
from tests.test_writer import fill, interrupted, layout, tree, write_model


@pytest.mark.parametrize("change", ["a bit", "a page", "all of a shard"])
def test_a_damaged_partial_folder_is_mended(tmp_path: Path, change: str) -> None:
    """Finished tensors are read again before they count; those that differ are made anew."""
    write_model(tmp_path / "whole")
    target = tmp_path / "out"
    kept = interrupted(target, 40)
    plan = layout()
    slot = next(plan.slots[name] for name in kept if plan.slots[name].nbytes > 5000)
    path = target.with_name(".out.fastmerge-partial") / plan.shards[slot.shard].name
    data = bytearray(path.read_bytes())
    if change == "a bit":
        data[slot.begin + slot.nbytes // 2] ^= 4
    elif change == "a page":
        data[slot.begin : slot.begin + 4096] = bytes(4096)
    else:
        data[4096:] = random.Random(0).randbytes(len(data) - 4096)
    path.write_bytes(data)
    with ModelWriter(target, plan, key="k") as writer:
        damaged = {s.name for s in plan.slots.values() if s.shard == slot.shard} & set(kept)
        if change != "all of a shard":
            damaged = {slot.name}
        # What has no bytes cannot be damaged.
        assert set(writer.damaged) == {name for name in damaged if plan.slots[name].nbytes}
        assert writer.resumed == set(kept) - set(writer.damaged)
        fill(writer, writer.pending())
        writer.finish({"config.json": b"{}"})
    assert tree(target) == tree(tmp_path / "whole")


@pytest.mark.parametrize("entry", [{}, {"checksum": None}, {"checksum": "0" * 32}])
def test_a_forged_journal_counts_for_nothing(tmp_path: Path, entry: dict[str, Any]) -> None:
    write_model(tmp_path / "whole")
    target = tmp_path / "out"
    kept = interrupted(target, 40)
    path = target.with_name(".out.fastmerge-journal")
    head = path.read_text().splitlines()[0]
    path.write_text("\n".join([head, *(json.dumps([name, entry]) for name in kept)]) + "\n")
    with ModelWriter(target, layout(), key="k") as writer:
        assert not writer.resumed or {layout().slots[name].nbytes for name in writer.resumed} == {0}
        fill(writer, writer.pending())
        writer.finish({"config.json": b"{}"})
    assert tree(target) == tree(tmp_path / "whole")

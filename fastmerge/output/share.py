"""Which weight files each part of a merge writes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.errors import FastmergeError, argument, brief, is_whole

if TYPE_CHECKING:
    from fastmerge.output.layout import Layout
    from fastmerge.planning.plan import Plan

MAX_PARTS = 99_999  # what the names of their files have room for
_SLURM = "SLURM_ARRAY_TASK_"


class Part(NamedTuple):
    """One of the parts of a merge, from 1 on, ``of`` how many."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def a_part(value: Any, where: str = "part") -> tuple[Part, str]:
    """``(2, 7)``, "2/7", or "auto": as the environment says; then a note that says what it is."""
    if isinstance(value, str) and value == "auto":
        return _from_environment(os.environ)
    found: Any = value
    if isinstance(value, str):
        words = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", value, re.ASCII)
        found = (int(words[1]), int(words[2])) if words else None
    pair = isinstance(found, (tuple, list)) and len(found) == 2
    if not pair or not all(is_whole(number) for number in found):
        raise FastmergeError(f"{where}: {brief(value)} is no part; write I/N, as 2/7, or auto")
    return _checked(int(found[0]), int(found[1]), where), ""


def _checked(number: int, count: int, where: str) -> Part:
    said = f"{where}: {brief(number)}/{brief(count)}"
    if not 1 <= count <= MAX_PARTS:
        raise FastmergeError(f"{said}: there are 1 to {MAX_PARTS} parts")
    if not 1 <= number <= count:
        raise FastmergeError(f"{said}: the parts are 1/{count} to {count}/{count}")
    return Part(number, count)


def _from_environment(environment: Mapping[str, str]) -> tuple[Part, str]:
    """A SLURM array's task (https://slurm.schedmd.com/job_array.html), else torchrun's rank."""
    found: dict[str, Part] = {}
    if f"{_SLURM}ID" in environment:
        number = _whole(environment, f"{_SLURM}ID")
        count = _whole(environment, f"{_SLURM}COUNT")
        least = _whole(environment, f"{_SLURM}MIN", 1)
        step = max(1, _whole(environment, f"{_SLURM}STEP", 1))
        most = _whole(environment, f"{_SLURM}MAX", least + (count - 1) * step)
        if (number - least) % step or (most - least) // step + 1 != count:
            raise FastmergeError(
                f"part: auto: the SLURM array ({least} to {most}, {count} tasks) has gaps, so that "
                f"task {number} could be any part; give {argument('part', 'I/N')}"
            )
        what = f"{_SLURM}ID={number}"
        found[what] = _checked((number - least) // step + 1, count, f"part: auto: {what}")
    if "WORLD_SIZE" in environment or "RANK" in environment:
        rank, size = _whole(environment, "RANK"), _whole(environment, "WORLD_SIZE")
        what = f"RANK={rank}"
        found[what] = _checked(rank + 1, size, f"part: auto: {what}, WORLD_SIZE={size}")
    several = {what: part for what, part in found.items() if part.of > 1} or found
    if len(several) > 1 and len(set(several.values())) > 1:
        said = " and ".join(f"{what} ({part})" for what, part in several.items())
        raise FastmergeError(f"part: auto: {said} disagree; give {argument('part', 'I/N')}")
    if not several:
        return Part(1, 1), "part 1/1: no SLURM array and no RANK is set"
    what, part = next(iter(several.items()))
    return part, f"part {part}, by {what}"


def _whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        said = "is not set" if text is None else f"is {brief(text)}, no whole number"
        raise FastmergeError(f"part: auto: {name} {said}; give {argument('part', 'I/N')}")
    return int(text)


def shares(costs: Sequence[int], count: int) -> list[range]:
    """Consecutive shards for each of ``count`` parts, of about equal ``costs`` (bytes): a shard is
    its part's in whose equal share of all costs its middle lies. A part may have none.
    """
    total, before, middles = sum(costs), 0, list[int]()
    for cost in costs:
        # Twice the middle, so that it is whole; on a boundary it is the earlier part's.
        twice = (2 * before + cost) * count
        middles.append(max(0, twice - 1) // (2 * total) if total else 0)
        before += cost
    begins = [sum(middle < part for middle in middles) for part in range(count + 1)]
    return [range(a, b) for a, b in pairwise(begins)]


def costs(plan: Plan, layout: Layout) -> list[int]:
    """The bytes that each of the layout's files takes, read and written."""
    found = [0] * len(layout.shards)
    for item in plan.tensors:
        first, *_ = written = item.written
        found[layout.slots[first.name].shard] += item.bytes_in
        for part in written:
            slot = layout.slots[part.name]
            found[slot.shard] += slot.nbytes
    return found


def share_of(plan: Plan, layout: Layout, part: Part) -> dict[str, Any]:
    """What one part would do, in plain values: its files, tensors, and bytes."""
    own = shares(costs(plan, layout), part.of)[part.number - 1]
    shards = [layout.shards[number] for number in own]
    slots = layout.slots
    items = [t for t in plan.tensors if any(slots[p.name].shard in own for p in t.written)]
    return {
        "number": part.number,
        "of": part.of,
        "files": [shard.name for shard in shards],
        "tensors": len(items),
        "bytes_in": sum(item.bytes_in for item in items),
        "bytes_out": sum(slot.nbytes for slot in slots.values() if slot.shard in own),
        "file_bytes": sum(shard.size for shard in shards),
    }

"""What a merge did, and who is told meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastmerge.compute.tensor import Outcome
from fastmerge.errors import in_a_line
from fastmerge.planning.inputs import TensorPlan

_LOOK_SECONDS = 0.02  # each look reads a file of /proc

Observer = Callable[[TensorPlan, Outcome], None]  # from the thread that computed the tensor


@dataclass(frozen=True)
class MergeReport:
    """What a merge did; bytes are of tensor data.

    ``out``: the folder. ``seconds``: planning left out. ``bytes_read``, ``bytes_written``: by this
    run. ``tensors``: of the output. ``resumed``: tensors that an interrupted run had finished.
    ``threads``: of the pool. ``isa``, ``backend``: the instruction set, and "cpu" or "triton".
    ``io``: "direct" or "buffered". ``seed``: what was drawn from, None where nothing was.
    ``peak_anonymous_bytes``: the most that the process was seen with. ``nonfinite``: how many NaN
    and Inf, by output tensor, where there are any. ``notes``: what was decided that the recipe does
    not say. ``part``: which one of how many, as 2/7; "" for all. ``url``: of the store that it was
    uploaded to; "" where it is in the folder ``out``.
    """

    out: Path
    seconds: float
    bytes_read: int
    bytes_written: int
    tensors: int
    resumed: int
    threads: int
    isa: str
    backend: str
    io: str
    seed: int | None
    peak_anonymous_bytes: int
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    part: str = ""
    url: str = ""

    def __repr__(self) -> str:
        return in_a_line(self, "out", "tensors", "bytes_written", "seconds", "nonfinite", "notes")

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> MergeReport:
        """A report again. ``said``: what `as_dict` gave. Returns one that is equal to that."""
        values = {each.name: said[each.name] for each in fields(cls)}
        return cls(**values | {"out": Path(said["out"]), "notes": tuple(said["notes"])})

    @property
    def gigabytes_per_second(self) -> float:
        """Tensor bytes read and written per second, in 1e9."""
        return (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e9

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON can hold it."""
        values = asdict(self)
        values["out"] = str(self.out)
        values["gigabytes_per_second"] = round(self.gigabytes_per_second, 3)
        return values


def nonfinite_of(results: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """A report's ``nonfinite``, of what each written tensor came to."""
    return {name: int(own["nonfinite"]) for name, own in results.items() if "nonfinite" in own}


class PeakMemory:
    """The most anonymous memory that the process was seen with, in bytes."""

    def __init__(self) -> None:
        self.nbytes, self._looked = _anonymous_bytes(), 0.0

    def look(self) -> None:
        """Sees how much it is now, unless it did a moment ago."""
        if time.perf_counter() - self._looked > _LOOK_SECONDS:
            self.nbytes = max(self.nbytes, _anonymous_bytes())
            self._looked = time.perf_counter()


def _anonymous_bytes() -> int:
    """The process's anonymous resident memory now (Linux's RssAnon); 0 where it is not told."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0

"""Joins the parts of a merge, and what that came to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.arguments import a_flag, a_path
from fastmerge.engine.merge import rounding_note
from fastmerge.engine.report import nonfinite_of
from fastmerge.errors import in_a_line
from fastmerge.output.join import join
from fastmerge.output.whole import Lineage


@dataclass(frozen=True)
class FinishReport:
    """What `finish` did.

    ``out``: the folder. ``seconds``: that it took. ``parts``: how many were joined; 0: an earlier
    run had, and could not upload them. ``files``: of weights. ``bytes_written``: of weight files,
    by the parts. ``tensors``: of the model. ``nonfinite``: how many NaN and Inf, by output tensor,
    where there are any. ``notes``: what there is to say. ``url``: of the store that it was uploaded
    to; "" where it is in the folder ``out``.
    """

    out: Path
    seconds: float
    parts: int
    files: int
    bytes_written: int
    tensors: int
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    url: str = ""

    def __repr__(self) -> str:
        return in_a_line(
            self, "out", "parts", "files", "tensors", "bytes_written", "nonfinite", "notes"
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as JSON can hold it."""
        return {**asdict(self), "out": str(self.out)}


def finish(out: Path, *, overwrite: bool = False) -> FinishReport:
    """Joins the parts that `merge_plan` wrote for ``out``; raises FastmergeError."""
    started = time.perf_counter()
    place = a_path(out, "out")
    joined = join(place, overwrite=a_flag(overwrite, "overwrite"))
    return FinishReport(
        out=place,
        seconds=time.perf_counter() - started,
        parts=joined.parts,
        files=joined.files,
        bytes_written=joined.nbytes,
        tensors=joined.tensors,
        nonfinite=nonfinite_of(joined.results),
        notes=rounding_note(joined.results),
    )


def joined_before(out: Path) -> FinishReport:
    """The report on the whole model in ``out``, which an earlier `finish` made and could not
    upload: of no parts now.
    """
    started = time.perf_counter()
    lineage = Lineage.read(out)
    results = {} if lineage is None else lineage.said.get("tensors", {})
    files = [path.stat().st_size for path in out.glob("*.safetensors")]
    return FinishReport(
        out=out,
        seconds=time.perf_counter() - started,
        parts=0,
        files=len(files),
        bytes_written=sum(files),
        tensors=len(results),
        nonfinite=nonfinite_of(results),
        notes=("an earlier run had joined its parts", *rounding_note(results)),
    )

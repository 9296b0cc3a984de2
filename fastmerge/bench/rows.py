"""What a figure is: a median with its spread, a row of the report, what a check refused."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastmerge.bench.process import Run
from fastmerge.errors import FastmergeError

Row = dict[str, Any]  # of the report, as JSON has it
SPREAD = ("median", "low", "high", "best")  # quartiles; the least


class WrongResultError(FastmergeError):
    """What was to be measured computes something else; no figure of it is worth anything."""


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, quartiles and least; of fewer than three, their extremes for quartiles."""
    found = sorted(values)
    low, high = found[0], found[-1]
    if len(found) >= 3:
        low, _, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"median": statistics.median(found), "low": low, "high": high, "best": found[0]}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios within each repetition: a busy machine slows both."""
    return spread(a / b for a, b in zip(above, below, strict=True))


def row_of_processes(
    kind: str, job: str, runs: Mapping[str, Sequence[Run]], moved: int, **about: Any
) -> Row:
    """A row of whole processes: ``runs`` are those of "fastmerge", of the "floor" (or none) and of
    peers, in turn; ``moved`` the bytes read once and written once; ``about`` what else it says.
    """
    ours = runs["fastmerge"]
    seconds = [run.seconds for run in ours]
    row: Row = {
        "kind": kind,
        "job": job,
        **about,
        "bytes": moved,
        "seconds": spread(seconds),
        "cpu_seconds": spread(run.cpu_seconds for run in ours),
        "gigabytes_per_second": moved / statistics.median(seconds) / 1e9,
        "peak_rss_bytes": max(run.peak_rss_bytes for run in ours),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in ours),
    }
    floor = runs.get("floor", ())
    if floor:
        row["floor_seconds"] = spread(run.seconds for run in floor)
        row["times_floor"] = ratios(seconds, [run.seconds for run in floor])
        ceiling = [run.detail["overlapped"] for run in floor]
        row["ceiling_seconds"] = spread(ceiling)
        row["share_of_ceiling"] = ratios(ceiling, seconds)
        row["direct_io"] = all(run.detail["direct"] for run in floor)
    row["peers"] = {
        name: _peer(done, seconds)
        for name, done in runs.items()
        if name not in ("fastmerge", "floor") and done
    }
    row["runs"] = {name: [vars(run) for run in done] for name, done in runs.items()}
    return row


def _peer(done: Sequence[Run], seconds: Sequence[float]) -> Row:
    """A peer that ran less often than we is compared with the median of our runs."""
    own = [run.seconds for run in done]
    middle = statistics.median(seconds)
    paired = len(own) == len(seconds)
    return {
        "seconds": spread(own),
        "times": ratios(own, seconds) if paired else spread(each / middle for each in own),
        "peak_rss_bytes": max(run.peak_rss_bytes for run in done),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in done),
    }

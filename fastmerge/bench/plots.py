"""The pictures of a report: the share of the ceiling of each figure; seconds and memory against
size, number of models and number of steps, where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastmerge.bench.request import WHOLES
from fastmerge.bench.rows import Row
from fastmerge.search.figures import BASELINE, OTHER, RETRACE, label, new_panels, png

_COLOURS = {"warm": RETRACE, "cold": BASELINE}


def report_png(report: dict[str, Any]) -> bytes:
    """A PNG, one panel below the other."""
    rows: list[Row] = report["jobs"]
    shares = [row for row in rows if "share_of_ceiling" in row]
    panels: list[Callable[[Any], None]] = []
    heights: list[float] = []
    if shares:
        panels.append(lambda axes: _shares(axes, shares))
        heights.append(0.8 + 0.28 * len(shares))
    wholes = [row for row in rows if row["kind"] in WHOLES]
    for key, title in (
        ("parameters", "parameters, billions"),
        ("models", "models"),
        ("steps", "steps of a walk"),
    ):
        lines = _lines(wholes, key)
        for value, unit in ((_seconds, "seconds"), (_memory, "anonymous memory, MiB")):
            if lines:
                panels.append(
                    partial(_scaling, lines=lines, value=value, key=key, title=title, unit=unit)
                )
                heights.append(3.2)
    figure, every = new_panels(8.0, heights or [1.0])
    for axes, draw in zip(every, panels, strict=False):
        draw(axes)
    return png(figure)


def _shares(axes: Any, rows: Sequence[Row]) -> None:
    """Bars, the first at the top, with their quartiles."""
    names = []
    for place, row in enumerate(reversed(rows)):
        share = {key: 100 * value for key, value in row["share_of_ceiling"].items()}
        spread = [[share["median"] - share["low"]], [share["high"] - share["median"]]]
        colour = _COLOURS.get(_cache(row), OTHER)
        axes.barh(place, share["median"], xerr=spread, color=colour, height=0.7, capsize=2)
        words = [row.get("size") or row.get("tensor") or "", row.get("dtype", ""),
                 row.get("isa", ""), row["cache"]]  # fmt: skip
        names.append(f"{label(row['job'])} ({', '.join(word for word in words if word)})")
    axes.axvline(100, color=BASELINE, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("share of the ceiling, %")


def _cache(row: Row) -> str:
    """Its state, without the share of what is warm in part."""
    return str(row["cache"]).split()[-1]


Line = tuple[str, list[Row]]


def _lines(rows: Sequence[Row], key: str) -> list[Line]:
    """The rows that differ in ``key`` and in nothing else that sets the work, where there are two
    or more values of it.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get(key) is None:
            continue
        name = row.get("method") or row["kind"]
        same = [row.get(other) for other in ("parameters", "models", "steps") if other != key]
        found.setdefault((name, _cache(row), *same), []).append(row)
    return [
        (f"{name}, {cache}", sorted(own, key=lambda row: float(row[key])))
        for (name, cache, *_), own in found.items()
        if len({row[key] for row in own}) > 1
    ]


def _seconds(row: Row) -> float:
    return float(row["seconds"]["median"])


def _memory(row: Row) -> float:
    return float(row["peak_anonymous_bytes"]) / 2**20


def _scaling(
    axes: Any, lines: Sequence[Line], value: Callable[[Row], float], key: str, title: str, unit: str
) -> None:
    scale = 1e-9 if key == "parameters" else 1
    for name, rows in lines:
        axes.plot(
            [scale * row[key] for row in rows], [value(row) for row in rows], "o-", label=name
        )
        for row in rows:
            if row["cache"] != _cache(row):
                place = scale * row[key], value(row)
                axes.annotate(row["cache"], place, (-5, 5), textcoords="offset points",
                              ha="right", fontsize=7)  # fmt: skip
    axes.set_ylim(0, 1.08 * max(value(row) for _, rows in lines for row in rows))
    if key != "parameters":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(title)
    axes.set_ylabel(unit)
    axes.legend(frameon=False, fontsize=8)

"""Axes and colours of every picture, and the sweep's plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastmerge.errors import ResourceError
from fastmerge.extras import install

if TYPE_CHECKING:
    pass

DEGRADE, RETRACE, BASELINE, OTHER = "#c0392b", "#1f6fb4", "#222222", "#8a8a8a"


def sweep_png(points: Sequence[tuple[float, float]]) -> bytes:
    """Score against t."""
    figure, axes = new_figure(6.0, 3.5)
    axes.plot(*zip(*points, strict=True), "o-", color=RETRACE)
    axes.set_xlabel("t")
    axes.set_ylabel("score, %")
    return png(figure)


def require() -> None:
    """Raises FastmergeError where plots cannot be drawn: before hours of evaluation, not after."""
    if find_spec("matplotlib") is None:
        raise ResourceError(f"plots need matplotlib; install it with: {install('plot')}")


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    # Numbers as they are: "+7.21e1" above an axis is read by nobody.
    axes.ticklabel_format(style="plain", useOffset=False)
    return figure, axes


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # No date and no version inside: the same run draws the same bytes.
    figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()

"""Axes and colours of every picture; those that walks, sweeps and searches share."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.errors import ResourceError, printable
from fastmerge.extras import EXTRAS, install, missing
from fastmerge.limits import MAX_LABEL_LETTERS
from fastmerge.models.architecture import layer_of

if TYPE_CHECKING:
    from fastmerge.evaluation.scores import Scores
    from fastmerge.methods.types import Float64
    from fastmerge.search.rows import Line

DEGRADE, RETRACE, BASELINE, OTHER = "#c0392b", "#1f6fb4", "#222222", "#8a8a8a"


def sweep_png(points: Sequence[tuple[float, Scores]]) -> bytes:
    """Score against t, or the perplexity where that is what was measured."""
    figure, axes = new_figure(6.0, 3.5)
    values = [(t, _drawn(scores)) for t, scores in points]
    axes.plot(*zip(*values, strict=True), "o-", color=RETRACE)
    axes.set_xlabel("t")
    is_perplexity = any(scores.perplexity is not None for _, scores in points)
    axes.set_ylabel("perplexity" if is_perplexity else "score, %")
    return png(figure)


def _drawn(scores: Scores) -> float:
    return scores.value if scores.perplexity is None else scores.perplexity


def comparison_png(lines: Sequence[Line], split: str) -> bytes:
    """Every row's score with its 95 % interval; the first's as a vertical line."""
    figure, axes = new_figure(8.0, 0.6 + 0.42 * len(lines))
    for place, line in enumerate(reversed(lines)):
        color = RETRACE if line is lines[0] else BASELINE
        low = high = 0.0
        if line.interval is not None:
            low, high = line.value - line.interval.low, line.interval.high - line.value
        axes.errorbar(
            line.value, place, xerr=[[max(low, 0)], [max(high, 0)]], fmt="o", color=color, capsize=3
        )
        for other in line.row.repeats:
            axes.plot(other, place, "|", color=OTHER, markersize=8)
    axes.axvline(lines[0].value, color=RETRACE, linewidth=1, alpha=0.5)
    axes.set_yticks(range(len(lines)), [label(line.row.name) for line in reversed(lines)])
    score = score_axis(lines[0].scores, split)
    axes.set_xlabel(f"{score}, % (95 % bootstrap interval over items)")
    return png(figure)


def budget_png(lines: Sequence[Line], baseline: float) -> bytes:
    """The best steering score so far against the candidates measured, for each way of searching."""
    figure, axes = new_figure(8.0, 4.5)
    for number, line in enumerate(lines):
        best, so_far = baseline, [baseline]
        for score in line.row.history:
            best = best if math.isnan(score) or score < best else score
            so_far.append(best)
        if len(so_far) == 1:
            continue
        is_walk = number == 0
        axes.step(
            range(len(so_far)),
            so_far,
            where="post",
            color=RETRACE if is_walk else f"C{number}",  # C0 is hardly another blue
            linewidth=2.5 if is_walk else 1.2,
            zorder=3 if is_walk else 2,
            label=label(line.row.name),
        )
    axes.axhline(baseline, color=BASELINE, linestyle="--", linewidth=1, label="baseline")
    axes.set_xlabel("candidates measured on all items")
    axes.set_ylabel(f"best {score_axis(lines[0].row.steer)} so far, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return png(figure)


def score_axis(scores: Scores | None, split: str = "steering") -> str:
    """What a picture of scores like these shows: one of a perplexity is what steers by it."""
    name = "100 / perplexity" if scores is not None and scores.perplexity is not None else "score"
    return f"{split} {name}"


def spent_png(
    searches: Mapping[str, Sequence[tuple[int, Scores]]], levels: Mapping[str, Scores], unit: str
) -> bytes:
    """The best on the steering items so far against what was spent, for each search: (spent in all,
    scores) of every candidate that was scored on all items; ``levels``: what needs no search. Its
    perplexity where that is what was measured.
    """
    figure, axes = new_figure(8.0, 4.5)
    is_perplexity = False
    for name, points in searches.items():
        best: Scores | None = None
        spent, so_far = [], []
        known = [(cost, scores) for cost, scores in points if math.isfinite(scores.value)]
        for cost, scores in known:
            best = scores if best is None or scores.value > best.value else best
            spent.append(cost)
            so_far.append(_drawn(best))
            is_perplexity = is_perplexity or scores.perplexity is not None
        color = RETRACE if len(searches) == 1 else None
        axes.step(spent, so_far, where="post", color=color, linewidth=2, label=label(name))
        if len(searches) == 1:
            own = [_drawn(scores) for _, scores in known]
            axes.plot(spent, own, ".", color=OTHER, markersize=4, label="candidates")
    for number, (name, scores) in enumerate(levels.items()):
        color = BASELINE if number == 0 else OTHER
        style = "--" if number == 0 else (0, (1, 1 + number))
        axes.axhline(_drawn(scores), color=color, linestyle=style, linewidth=1, label=label(name))
    axes.set_xlabel(f"{unit} spent")
    title = "perplexity of the best so far" if is_perplexity else "best steering score so far, %"
    axes.set_ylabel(title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return png(figure)


def by_layer(names: Sequence[str], factors: Float64) -> tuple[list[str], Float64]:
    """Mean coefficients (tensors, models) of each layer, with titles: what stands before the
    layers, the layers by number, what stands behind them.
    """
    rows: dict[tuple[int, int], list[Float64]] = {}
    for name, row in zip(names, factors, strict=True):
        layer = layer_of(name)
        group = (1, layer.number) if layer else (0, 0) if "embed" in name else (2, 0)
        rows.setdefault(group, []).append(row)
    titles = {0: "embed", 2: "head"}
    ordered = sorted(rows)
    labels = [titles.get(kind, str(number)) for kind, number in ordered]
    return labels, np.stack([np.mean(rows[group], axis=0) for group in ordered])


def heat_png(names: Sequence[str], factors: Float64, labels: Sequence[str]) -> bytes:
    """Coefficients (tensors, models) by layer and model."""
    titles, means = by_layer(names, factors)
    models = [label(text) for text in labels]
    figure, axes = new_figure(max(4.0, 1.5 + 0.3 * len(titles)), 1.2 + 0.4 * len(models))
    most = max(1.0, float(np.abs(means[np.isfinite(means)]).max(initial=0.0)))
    shown = axes.imshow(means.T, aspect="auto", cmap="RdBu", vmin=-most, vmax=most)
    axes.set_xticks(range(len(titles)), titles, fontsize=7, rotation=90 if len(titles) > 12 else 0)
    axes.set_yticks(range(len(models)), models)
    axes.set_xlabel("layer")
    figure.colorbar(shown, ax=axes, label="coefficient")
    return png(figure)


def label(text: str) -> str:
    """A name of somebody's in a picture: one line of bounded length, shown as it is."""
    plain = printable(text)
    if len(plain) > MAX_LABEL_LETTERS:
        plain = f"{plain[: MAX_LABEL_LETTERS - 3]}..."
    # Between two dollar signs matplotlib reads formulas; what begins with _ it leaves out of keys.
    return ("\N{ZERO WIDTH SPACE}" if plain.startswith("_") else "") + plain.replace("$", r"\$")


def require(*libraries: str, optimiser: Sequence[str] = (), cluster: str | None = None) -> None:
    """Raises FastmergeError where plots cannot be drawn, or where one of the ``libraries`` that
    score, of the ``optimiser``'s or the one that reaches a ``cluster`` is missing: before hours of
    evaluation, not after, and for all of them at once.
    """
    needs = {
        "plots need": ["matplotlib"],
        "the optimiser needs": optimiser,
        "scores need": libraries,
        "the cluster needs": [] if cluster is None else ["ray"],
    }
    absent = {what: missing(*names) for what, names in needs.items()}
    lost = [name for names in absent.values() for name in names]
    if lost:
        said = ", ".join(f"{what} {' and '.join(own)}" for what, own in absent.items() if own)
        extras = ",".join(sorted({EXTRAS[name] for name in lost}))
        which = "it" if len(lost) == 1 else "them"
        raise ResourceError(f"{said}; install {which} with: {install(extras)}")


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    figure, (axes,) = new_panels(width, [height])
    return figure, axes


def new_panels(width: float, heights: Sequence[float]) -> tuple[Any, list[Any]]:
    """A figure, and axes of these heights in inches below one another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    panels = [figure.add_subplot(grid[place]) for place in range(len(heights))]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        # Numbers as they are: "+7.21e1" above an axis is read by nobody.
        axes.ticklabel_format(style="plain", useOffset=False)
    return figure, panels


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # of letters that the font lacks, of a name as wide as the page
        warnings.simplefilter("ignore", UserWarning)
        # No date and no version inside: the same run draws the same bytes.
        figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()

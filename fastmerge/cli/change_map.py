"""The picture of ``fastmerge diff --plot``: how far each kind of tensor went in each layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fastmerge.cli.files import write_result
from fastmerge.errors import UnsupportedError
from fastmerge.limits import MAX_PICTURE_CELLS, MAX_PICTURE_SIDE
from fastmerge.models.architecture import kinds_of
from fastmerge.models.diff import TensorDifference
from fastmerge.search.figures import label, new_figure, png


def change_map(tensors: Iterable[TensorDifference]) -> tuple[list[str], list[str], np.ndarray]:
    """Rows (kinds of tensors), columns (layers; `-` for what is in none), and |a - b| / |a| in
    percent, float64 (rows, columns), NaN where there is no such tensor or no such figure. Raises
    UnsupportedError for none of them, and for more than a picture shows.
    """
    found: dict[str, dict[int, float]] = {}
    every = [*tensors]
    for tensor, (kind, layer) in zip(every, kinds_of(t.name for t in every), strict=True):
        number = -1 if layer is None else layer
        value = np.nan if tensor.relative is None else 100 * tensor.relative
        found.setdefault(kind, {})[number] = value
    numbers = sorted({number for row in found.values() for number in row})
    rows, columns = len(found), len(numbers)
    if not found:
        raise UnsupportedError(
            "plot: the models share no tensor by name and shape: there is nothing to draw"
        )
    if max(rows, columns) > MAX_PICTURE_SIDE or rows * columns > MAX_PICTURE_CELLS:
        raise UnsupportedError(
            f"plot: {rows} kinds of tensors in {columns} layers are more than a picture shows; "
            "leave it out"
        )
    cells = [[row.get(number, np.nan) for number in numbers] for row in found.values()]
    return [*found], ["-" if n < 0 else str(n) for n in numbers], np.array(cells, np.float64)


def write_change_map(tensors: Iterable[TensorDifference], file: Path) -> None:
    """Writes the PNG; FastmergeError where it cannot be."""
    kinds, layers, percent = change_map(tensors)
    figure, axes = new_figure(2.5 + 0.25 * len(layers), 1.5 + 0.25 * len(kinds))
    drawn = axes.imshow(np.ma.masked_invalid(percent), aspect="auto", cmap="viridis")
    every = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), every), layers[::every])
    axes.set_yticks(range(len(kinds)), [label(kind) for kind in kinds])
    axes.set_xlabel("layer")
    figure.colorbar(drawn, ax=axes, label="relative change, %")
    write_result(file, png(figure))

"""What a person sees: progress in bytes, tables, one line for a mistake.

Progress and notes go to stderr, so that stdout holds the answer and nothing else. rich is imported
only where a terminal or a table needs it: its import takes longer than planning a small merge.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from fastmerge.cli.streams import answer, drop, remark
from fastmerge.errors import printable, shortened
from fastmerge.progress import Bar

_LEAST_TEXT = 8  # letters of a name on a line, below which a table is drawn however it comes
_MOST_FITTED = 2_000  # rows that are drawn to a terminal's width


class Progress(Bar):
    """A command's bar; where its stderr is lost, what else would go there is for nobody."""

    def _lost(self) -> None:
        super()._lost()
        if self._stream is sys.stderr:
            drop("stderr")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> tuple[str, ...]:
    """Prints a table on stdout; the columns named in ``right`` are set flush right.

    On a terminal too narrow for every column's longest word those of ``spare`` are left out, the
    first first, and returned. In a pipe it is as wide as it needs to be, so that nothing is cut
    off.
    """
    lines = [[shortened(printable(str(cell))) for cell in row] for row in rows]
    wide = not sys.stdout.isatty() or len(lines) > _MOST_FITTED
    if wide and lines and (sys.stdout.encoding or "utf-8").lower().startswith("utf"):
        _as_wide_as_needed(columns, lines, right)
        return ()
    from rich import box
    from rich.console import Console
    from rich.table import Table

    paper = _Paper()
    console = Console(
        file=paper, force_terminal=sys.stdout.isatty(), highlight=False, markup=False, emoji=False
    )
    if wide:
        console.width = 10_000
    least = {
        name: max(len(word) for line in (columns, *lines) for word in (*line[i].split(), ""))
        for i, name in enumerate(columns)
    }
    absent: list[str] = []
    for name in spare:
        if sum(least.values()) + 3 * len(least) > console.width:
            absent.append(name)
            del least[name]
    # The widest give way, none below its longest word while that suffices: rich alone shrinks all,
    # and breaks words.
    widths = {
        name: max(_cells(line[i]) for line in (columns, *lines))
        for i, name in enumerate(columns)
        if name in least
    }
    for _ in range(sum(widths.values()) + 3 * len(widths) - console.width):
        widest = max(widths, key=lambda name: (widths[name] > least[name], widths[name]))
        if widths[widest] <= least[widest]:
            # A name that is folded can be read, digits on two lines are another number.
            texts = [name for name in widths if name not in right and widths[name] > _LEAST_TEXT]
            if not texts:
                break
            widest = max(texts, key=lambda name: widths[name])
            least[widest] = widths[widest] - 1
        widths[widest] -= 1
    drawn = Table(box=box.SIMPLE, pad_edge=False)
    for column, width in widths.items():
        head = shortened(printable(column))
        justify: Literal["left", "right"] = "right" if column in right else "left"
        drawn.add_column(head, justify=justify, overflow="fold", width=width)
    for cells in lines:
        drawn.add_row(*[cell for name, cell in zip(columns, cells, strict=True) if name in least])
    console.print(drawn)
    for line in paper.getvalue().strip("\n").splitlines():
        answer(f"{line.rstrip()}\n")
    return tuple(absent)


def _as_wide_as_needed(
    columns: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[str]
) -> None:
    """The table as rich draws it where there is room for everything; rich takes half a millisecond
    a row, which of the 90 000 tensors of a large mixture is a minute.
    """
    rows = [[shortened(printable(column)) for column in columns], *lines]
    widths = [max(map(_cells, column)) for column in zip(*rows, strict=True)]
    answer("\n")
    for number, row in enumerate(rows):
        cells = [
            " " * (width - _cells(cell)) + cell
            if name in right
            else cell + " " * (width - _cells(cell))
            for name, cell, width in zip(columns, row, widths, strict=True)
        ]
        answer(f" {'   '.join(cells)}".rstrip() + "\n")
        if not number:
            answer(f" {'─' * (sum(widths) + 3 * len(widths) - 3)}\n")
    answer("\n")


def _cells(text: str) -> int:
    """How wide a terminal shows it."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


class _Paper(io.StringIO):
    """What is drawn on, for stdout: of stdout itself rich would flush what `answer` wrote, and stop
    where that cannot be.
    """

    @property
    def encoding(self) -> str:  # type: ignore[override]  # it decides on the lines of a table
        return sys.stdout.encoding or "utf-8"


def pairs(items: Iterable[tuple[str, Any]]) -> None:
    """Prints ``name  value`` lines on stdout, values aligned."""
    shown = list(items)
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        put(f"{name:<{width}}  {value}")


def seed_of(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The pair of a plan's seed; none where nothing is drawn."""
    if described["seed"] is None:
        return []
    return [
        ("seed", f"{described['seed']}{' (follows from the recipe)' * described['seed_derived']}")
    ]


def put(*lines: str) -> None:
    """Lines of the answer, on stdout, with whatever is not printable escaped, and without the
    middle of a name of megabytes.
    """
    answer("".join(f"{shortened(printable(line))}\n" for line in lines))


def say(text: str, *, quiet: bool = False) -> None:
    """One line for the person at the terminal, on stderr."""
    if not quiet:
        remark(f"{shortened(printable(text))}\n")


def print_json(value: Any) -> None:
    """One JSON document on stdout; NaN and infinity as strings, which JSON has no numbers for."""
    import json

    answer(json.dumps(_jsonable(value), indent=2, allow_nan=False) + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value

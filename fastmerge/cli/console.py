"""What a person sees: progress in bytes, tables, one line for a mistake.

Progress and notes go to stderr, so that stdout holds the answer and nothing else. rich is imported
only where a terminal or a table needs it: its import takes longer than planning a small merge.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from fastmerge.cli.streams import answer, drop, remark
from fastmerge.cli.units import format_bytes, format_seconds
from fastmerge.errors import printable, shortened

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

Report = Callable[[int, int, str], None]  # bytes done, bytes in total, tensor name


class Progress(AbstractContextManager["Progress"]):
    """A callable for an engine's ``progress=``: nothing when ``quiet``, a bar on a terminal, else a
    line per tenth.
    """

    def __init__(self, title: str, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._title = printable(title)
        self._stream = sys.stderr if stream is None else stream
        self._show: Report | None = None
        self._bar: RichProgress | None = None
        if not quiet:
            self._show = self._show_bar if self._stream.isatty() else self._show_line
        self._started = time.perf_counter()
        self._first_bytes: int | None = None  # what a resumed merge had done before this run
        self._next_tenth = 1

    def __call__(self, done_bytes: int, total_bytes: int, tensor: str) -> None:
        if self._first_bytes is None:
            self._first_bytes = done_bytes
            self._started = time.perf_counter()
        if self._show is not None:
            try:
                self._show(done_bytes, total_bytes, tensor)
            except (OSError, RuntimeError):  # nobody watches, or no thread is left for the bar
                self._show = self._bar = None
                if self._stream is sys.stderr:
                    drop("stderr")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _rate(self, done_bytes: int) -> float:
        """Bytes a second in this run."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        return (done_bytes - (self._first_bytes or 0)) / seconds

    def _show_line(self, done_bytes: int, total_bytes: int, _: str) -> None:
        if done_bytes * 10 < self._next_tenth * total_bytes:
            return
        tenth = done_bytes * 10 // total_bytes if total_bytes else 10
        self._next_tenth = tenth + 1
        rate = self._rate(done_bytes)
        pace = ""
        if rate > 0:
            pace = f", {format_bytes(rate)}/s"
        if rate > 0 and done_bytes < total_bytes:
            pace += f", {format_seconds((total_bytes - done_bytes) / rate)} left"
        self._stream.write(
            f"{self._title}: {tenth * 10:3d} %  "
            f"{format_bytes(done_bytes)} of {format_bytes(total_bytes)}{pace}\n"
        )
        self._stream.flush()

    def _show_bar(self, done_bytes: int, total_bytes: int, tensor: str) -> None:
        if self._bar is None:
            self._bar = _progress_bar(self._stream)
            self._bar.add_task(self._title, total=total_bytes, tensor="")
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0],
            completed=done_bytes,
            total=total_bytes,
            tensor=printable(tensor),
        )


def _progress_bar(stream: TextIO) -> RichProgress:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[tensor]}", style="dim", markup=False),
        console=Console(file=stream),
        transient=True,
    )


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Sequence[str] = ()
) -> None:
    """Prints a table on stdout; the columns named in ``right`` are set flush right.

    In a pipe it is as wide as it needs to be, so that nothing is cut off.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*[shortened(printable(str(cell))) for cell in row])
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000
    with console.capture() as drawing:
        console.print(drawn)
    for line in drawing.get().strip("\n").splitlines():
        answer(f"{line.rstrip()}\n")


def pairs(items: Iterable[tuple[str, Any]]) -> None:
    """Prints ``name  value`` lines on stdout, values aligned."""
    shown = list(items)
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        put(f"{name:<{width}}  {value}")


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

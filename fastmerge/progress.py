"""What is shown of a long run: ``progress=`` of the public functions, and the commands' bars.

rich is imported only where a bar is drawn: its import takes longer than planning a small merge.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from fastmerge.errors import FastmergeError, brief, printable, shortened
from fastmerge.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as Drawn

Progress = Callable[[int, int, str], None]
"""A function of bytes done, bytes in all (read + written) and the name of a tensor."""

Shown = Progress | bool | None
"""How a run is shown: True for a bar on stderr, a function to call, False or None for nothing."""


def shown(progress: Shown, title: str) -> AbstractContextManager[Progress | None]:
    """What is to be called while the work runs; a bar is put away at the end."""
    if progress is True:
        return Bar(title)
    if progress is None or progress is False:
        return nullcontext()
    if not callable(progress):
        raise FastmergeError(
            f"progress: must be True or a function of bytes done, bytes in all and a tensor's "
            f"name, not {brief(progress)}"
        )
    return nullcontext(progress)


class Told:
    """Counts the bytes of a run, for who watches it."""

    def __init__(self, progress: Progress | None, total_bytes: int, done_bytes: int = 0) -> None:
        """``done_bytes``: by an earlier run that this one continues."""
        self._progress, self._total, self._done = progress, total_bytes, done_bytes

    def add(self, nbytes: int, tensor: str) -> None:
        """Those of ``tensor`` are done, too."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total, tensor)


class Bar(AbstractContextManager["Bar"]):
    """A callable for ``progress=``: nothing when ``quiet``, a bar on a terminal or in a notebook
    with ipywidgets, else a line per tenth. Another number of bytes in all is another pass: a search
    reads its models and later writes one.
    """

    def __init__(self, title: str, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._title = printable(title)
        self._stream = sys.stderr if stream is None else stream
        self._show: Progress | None = None
        self._bar: Drawn | None = None
        if not quiet and self._stream is not None:  # None: of a process without any (pythonw)
            drawn = self._stream.isatty() or self._notebook()
            self._show = self._show_bar if drawn else self._show_line
        self._started = time.perf_counter()
        self._first_bytes = 0  # what a resumed merge had done before this run
        self._total_bytes: int | None = None
        self._next_tenth = 1

    def __call__(self, done_bytes: int, total_bytes: int, tensor: str) -> None:
        if self._total_bytes != total_bytes:
            self._first_bytes, self._total_bytes = done_bytes, total_bytes
            self._next_tenth = 1
            self._started = time.perf_counter()
        if self._show is not None:
            try:
                self._show(done_bytes, total_bytes, tensor)
            except (OSError, RuntimeError):  # nobody watches, or no thread is left for the bar
                self._lost()

    def _lost(self) -> None:
        self._show = self._bar = None

    def _notebook(self) -> bool:
        """Whether rich can draw in a Jupyter cell, whose stderr is no terminal."""
        if self._stream is not sys.stderr or "ipykernel" not in sys.modules:
            return False
        from rich.console import Console

        return Console().is_jupyter and find_spec("ipywidgets") is not None

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
        return (done_bytes - self._first_bytes) / seconds

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
            self._bar = _drawn(None if self._notebook() else self._stream)
            self._bar.add_task(self._title, total=total_bytes, tensor="")
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0],
            completed=done_bytes,
            total=total_bytes,
            tensor=printable(shortened(tensor)),  # one of megabytes takes rich a second each time
        )


def _drawn(stream: TextIO | None) -> Drawn:
    """On the stream, or in the notebook's cell."""
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

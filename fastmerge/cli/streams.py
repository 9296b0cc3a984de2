"""stdout and stderr as they are found: closed, in ASCII, on a full disk, read by nobody."""

from __future__ import annotations

import io
import os
import sys

from fastmerge.errors import OutputError


def prepare() -> None:
    """Makes both streams take any text, once, before the first file is opened."""
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # Closed (``>&-``): the next file, perhaps a shard, would get its number and whatever
            # a library prints.
            os.open(os.devnull, flags)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            drop(name)
        elif isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding cannot show is shown escaped.
            stream.reconfigure(errors="backslashreplace")


def answer(text: str) -> None:
    """Writes on stdout; OutputError where it cannot be, BrokenPipeError where nobody reads."""
    try:
        sys.stdout.write(text)
    except OSError as error:
        _lost(error)


def deliver() -> None:
    """Flushes stdout: until then an answer may be in no file yet. Raises as `answer` does."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _lost(error)


def remark(text: str) -> None:
    """Writes on stderr. Where that cannot be, the work goes on: nobody is there to be told."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        drop("stderr")


def _lost(error: OSError) -> None:
    drop("stdout")  # it would be flushed once more when the process ends
    if isinstance(error, BrokenPipeError):
        raise error
    raise OutputError(f"standard output: cannot be written ({error.strerror})") from error


def drop(name: str) -> None:
    """What else is written to ``sys.NAME``, and what waits in its buffer, is for nobody."""
    setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115

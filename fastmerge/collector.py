"""How often Python looks for cycles while many objects are made that have none."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PLANNING, MERGING = 10_000_000, 100_000  # objects made between two looks; garbage is so bounded
_PYTHONS = 1000  # more than Python 3.12 begins with frozen (375); a program that freezes has more

_lock = threading.Lock()
_asked: list[int] = []  # by those who are at work, in whichever threads
_before = gc.get_threshold()  # before the first of them


@contextmanager
def rarely_collected(objects: int) -> Iterator[None]:
    """Python's collector looks at the young once in ``objects``, and at all others hardly ever.

    Of a plan of 90 000 tensors it took half the time, of its merge a quarter. The thresholds are
    the process's: of several at work the largest holds, and the last one gives back what was there.
    What was made meanwhile is then among the old, unlooked at: a first look at it took 0.2 s.
    """
    global _before
    with _lock:
        if not _asked:
            _before = gc.get_threshold()
        _asked.append(objects)
        _set()
    try:
        yield
    finally:
        with _lock:
            _asked.remove(objects)
            if gc.get_freeze_count() < _PYTHONS:  # else whoever calls has put others there to stay
                gc.freeze()
                gc.unfreeze()  # among the old, where all that was frozen comes back to
            _set()


def _set() -> None:
    if _before[0]:  # 0: whoever calls has switched it off
        gc.set_threshold(*((max(_asked), 100, _before[2]) if _asked else _before))


def _forked() -> None:
    """A child has none of the threads that were at work, nor what they held."""
    global _lock
    _lock = threading.Lock()
    if _asked:
        _asked.clear()
        _set()


os.register_at_fork(after_in_child=_forked)

"""Functions of another package with ours in their place, until they are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any

Places = Mapping[tuple[Any, str], Any]  # by object and attribute: what is to stand there


class Replacement:
    """``places`` looks for what is replaced, when it is: raises FastmergeError where the package is
    not there, or not as it was known.

    Ours stand there from `install` to `uninstall` and while anybody, in any thread, is in a
    ``with installed()``: a thread that leaves its own would take them from the others.
    """

    def __init__(self, places: Callable[[], Places]) -> None:
        self._places = places
        # Imports of seconds lie between the look at what stands there and the exchange: a second
        # thread would keep ours as theirs, for ever.
        self._lock = RLock()
        self._is_installed = False
        self._open = 0  # of ``with``
        self.theirs: Mapping[tuple[Any, str], Any] = {}  # while ours stand there

    def install(self) -> None:
        """Again is no error."""
        with self._lock:
            self._put()
            self._is_installed = True

    def uninstall(self) -> None:
        """Without `install` it does nothing."""
        with self._lock:
            self._is_installed = False
            self._put_back()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """`install` for the time of a ``with``; where it was installed before, it stays so."""
        with self._lock:
            self._put()
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                self._put_back()

    def _put(self) -> None:
        if self.theirs:
            return
        ours = self._places()
        # Before the exchange: what is called meanwhile by another thread looks for theirs.
        self.theirs = {at: getattr(*at) for at in ours}
        for (place, name), own in ours.items():
            setattr(place, name, own)

    def _put_back(self) -> None:
        """Unless somebody still has them."""
        if self._is_installed or self._open or not self.theirs:
            return
        self.restore()
        self.theirs = {}

    def restore(self) -> None:
        """Puts all of theirs back."""
        for (place, name), theirs in self.theirs.items():
            setattr(place, name, theirs)

"""Functions of another package with ours in their place, until they are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

Places = Mapping[tuple[Any, str], Any]  # by object and attribute: what is to stand there


class Replacement:
    """``places`` looks for what is replaced, when it is: raises FastmergeError where the package is
    not there, or not as it was known.
    """

    def __init__(self, places: Callable[[], Places]) -> None:
        self._places = places
        self.theirs: dict[tuple[Any, str], Any] = {}  # while ours stand there

    def install(self) -> None:
        """Again is no error."""
        if self.theirs:
            return
        for (place, name), ours in self._places().items():
            self.theirs[place, name] = getattr(place, name)
            setattr(place, name, ours)

    def uninstall(self) -> None:
        """Without `install` it does nothing."""
        while self.theirs:
            (place, name), theirs = self.theirs.popitem()
            setattr(place, name, theirs)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """`install` for the time of a ``with``; where it was installed before, it stays so."""
        was = bool(self.theirs)
        self.install()
        try:
            yield
        finally:
            if not was:
                self.uninstall()

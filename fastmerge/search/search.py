"""A search asks for a state to be scored and is told its scores; one loop drives them all."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Generic, Protocol, TypeVar

from fastmerge.evaluation.scores import Scores
from fastmerge.search.expressions import Expr

R = TypeVar("R")
# Yields a state and the most items a task to score it on (None: all); is sent its scores.
Script = Generator[tuple[Expr, int | None], Scores, R]


class Search(Protocol):
    """What decides which states are scored, whatever it is that scores them."""

    def ask(self) -> Expr | None:
        """The state to score next, or None when the search is over."""

    def tell(self, candidate: Expr, scores: Scores) -> None:
        """The scores of the state that it asked for."""


def drive(search: Search, score: Callable[[Expr], Scores]) -> None:
    """Scores what ``search`` asks for until it is over.

    ``search``: what has ``ask`` and ``tell``, as `Study` has. ``score``: a function of a state that
    gives its scores: `Lab.score`, or a caller's. Raises whatever these do: FastmergeError of a
    `Study` for scores that are none.
    """
    while (candidate := search.ask()) is not None:
        search.tell(candidate, score(candidate))


class Scripted(Generic[R]):
    """A search written down as a generator, the way that people read one."""

    result: R  # when it is over

    def __init__(self, script: Script[R]) -> None:
        self._script = script
        self._asked: Expr | None = None
        self.limit: int | None = None  # items a task, of the state that it asked for
        self._go_on(None)

    def ask(self) -> Expr | None:
        """See `Search`."""
        return self._asked

    def tell(self, candidate: Expr, scores: Scores) -> None:
        """See `Search`."""
        assert candidate is self._asked
        self._go_on(scores)

    def _go_on(self, scores: Scores | None) -> None:
        try:
            self._asked, self.limit = self._script.send(scores)  # type: ignore[arg-type]
        except StopIteration as end:
            self._asked, self.result = None, end.value

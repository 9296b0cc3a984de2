"""Measurements side by side, by evaluators that each keep a model of their own in between.

Who wants measurements asks for them in the order in which it would make them alone, and says ahead
what it is going to ask for; so what it decides and writes is the same for any number of evaluators.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastmerge.errors import FastmergeError
from fastmerge.evaluation.scorers import Scorer
from fastmerge.evaluation.weights import SCORED, clear
from fastmerge.output.disk import remove_tree

Measure = Callable[[Any], Any]  # from what is asked for to what it comes to; both pickle
# Makes an evaluator where it runs, from its number, which no other has had, and its threads.
Make = Callable[[int, int], Measure]
E = TypeVar("E", bound="Evaluators")


class Evaluators(ABC):
    """Several of what one `Make` makes: what they are asked for, and in which order it is their
    turn. Where they run, and how what is lost is measured again, is a subclass's.
    """

    count: int  # at most so many
    threads: int  # of each

    def __init__(self) -> None:
        self._waiting: deque[str] = deque()
        self._later: deque[str] = deque()
        self._requests: dict[str, Any] = {}  # asked for, and not answered
        self._answers: dict[str, Any] = {}

    def begin(self, key: str, request: Any, *, later: bool = False) -> None:
        """Has ``request`` measured when its turn comes, ``later``: when nothing else waits. One
        that ``key`` has named already is not measured again before it is answered. Returns at once.
        """
        if key not in self._requests:
            self._requests[key] = request
            (self._later if later else self._waiting).append(key)
        elif key in self._later and not later:
            self._later.remove(key)
            self._waiting.append(key)
        self._feed()

    def answer(self, key: str, request: Any) -> Any:
        """What ``request`` came to, the next in turn where nobody has begun with it. Waits for it.
        Raises FastmergeError as a measurement here would, and where its evaluator was lost again
        and again.
        """
        self.begin(key, request)
        if key in self._waiting:
            self._waiting.remove(key)
            self._waiting.appendleft(key)
        while key not in self._answers:
            self._feed()
            self._turn()
        del self._requests[key]
        return self._given(self._answers.pop(key))

    @abstractmethod
    def close(self) -> None:
        """Ends them all, whatever they are doing."""

    @property
    def _left(self) -> int:
        """How many requests nobody has begun with."""
        return len(self._waiting) + len(self._later)

    def _next(self) -> str:
        """The key of the request whose turn it is."""
        return (self._waiting or self._later).popleft()

    @abstractmethod
    def _feed(self) -> None:
        """Gives what waits to those who are idle; starts others while there is room."""

    @abstractmethod
    def _turn(self) -> None:
        """Waits until something has ended, and takes it."""

    @abstractmethod
    def _given(self, answer: Any) -> Any:
        """An answer; raises the error that a measurement ended with."""


@contextmanager
def within(folder: Path, open_them: Callable[[], E]) -> Iterator[E]:
    """The evaluators that ``open_them`` makes, for as long as the context lasts. ``folder``: of the
    run, in which ``SCORED`` is theirs; gone at the end.
    """
    scratch = folder / SCORED
    clear(scratch)
    evaluators = open_them()
    try:
        yield evaluators
    finally:
        evaluators.close()
        # What one of them is still writing as it ends stays until the next run.
        remove_tree(scratch, ignore_errors=True)


def same_scorer(scorer: Scorer, key: str) -> Scorer:
    """``scorer``. Raises FastmergeError where its scores would not be those of the one with
    ``key``.
    """
    if scorer.key != key:
        raise FastmergeError(
            f"cluster: {os.uname().nodename} would score otherwise than the machine where the "
            "command was started: its data, task files, functions or versions differ; give all "
            "nodes the same"
        )
    return scorer

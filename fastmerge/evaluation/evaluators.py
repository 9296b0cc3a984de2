"""Measurements side by side, by evaluators that each keep a model of their own in between.

Who wants measurements asks for them in the order in which it would make them alone, and says ahead
what it is going to ask for; so what it decides and writes is the same for any number of evaluators.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

from fastmerge.errors import FastmergeError
from fastmerge.evaluation.scorers import Scorer

Measure = Callable[[Any], Any]  # from what is asked for to what it comes to; both pickle
# Makes an evaluator where it runs, from its number, which no other has had, and its threads.
Make = Callable[[int, int], Measure]


class Evaluators(Protocol):
    """Several of what one `Make` makes."""

    def begin(self, key: str, request: Any, *, later: bool = False) -> None:
        """Has ``request`` measured when its turn comes, ``later``: when nothing else waits. One
        that ``key`` has named already is not measured again before it is answered. Returns at once.
        """

    def answer(self, key: str, request: Any) -> Any:
        """What ``request`` came to, the next in turn where nobody has begun with it. Waits for it.
        Raises FastmergeError as a measurement here would, and where its evaluator was lost again
        and again.
        """

    def close(self) -> None:
        """Ends them all, whatever they are doing."""


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

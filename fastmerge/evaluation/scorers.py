"""What scores a model, and which scorer the settings ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from fastmerge.engine import cluster
from fastmerge.errors import FastmergeError, RecipeError, ResourceError, first_line
from fastmerge.evaluation import callables, harness
from fastmerge.evaluation.callables import CallableScorer, ScoreFunction
from fastmerge.evaluation.harness import Harness
from fastmerge.evaluation.outlook import Unread
from fastmerge.evaluation.perplexity import Perplexity
from fastmerge.evaluation.scores import Scores
from fastmerge.evaluation.settings import WAYS, Evaluate
from fastmerge.evaluation.weights import Weights


class Scorer(Protocol):
    """Scores one state's weights on one split, 'steer' (which may choose) or 'holdout'."""

    @property
    def key(self) -> str:
        """What decides a score beside the weights, the split and the limit: a digest, under which
        scores are kept. It must change whenever the same weights might score otherwise.
        """

    @property
    def version(self) -> str:
        """What scored, in words, for the report."""

    def has(self, split: str) -> bool:
        """Whether there are items of a split. ``split``: 'steer' or 'holdout'. Returns True where
        there are.
        """

    def score(self, weights: Weights, split: str, limit: int | None = None) -> Scores:
        """Scores one state. ``weights``: of it, as a module, a state dictionary or a folder.
        ``split``: 'steer' or 'holdout'. ``limit``: items a task at most, None for all. Returns
        scores in percent, higher is better. Raises FastmergeError, one line, where the weights
        cannot be scored.
        """


# From settings, the folder of their file and the folder whose tokenizer the models use.
Maker = Callable[[Evaluate, Path, Path], Scorer]
_MAKERS: dict[str, Maker] = {
    "tasks": Harness,
    "preset": Harness,
    "callable": CallableScorer.imported,
    "perplexity": Perplexity,
}
# Of what may run code that a schedule brings along; None where it does not.
_UNREAD: dict[str, Callable[[Evaluate, Path], Unread | None]] = {
    "tasks": harness.unread,
    "preset": harness.unread,
    "callable": callables.unread,
}


def register(key: str, make: Maker) -> None:
    """Lets an `evaluate` section say ``key: ...`` for what scores.

    ``key``: a word that means nothing yet. ``make``: a function of the settings, the folder of
    their file and the folder whose tokenizer the models use, that gives the `Scorer`;
    ``settings.registered[key]`` is what the section says, ``settings.at(key)`` its place in the
    file, for errors. Raises FastmergeError for a key that means something already.
    """
    if key in _MAKERS or key in Evaluate.fields:
        raise FastmergeError(f"register: '{key}' of an evaluate section is taken; use another key")
    WAYS.append(key)
    _MAKERS[key] = make


@dataclass(frozen=True)
class Scoring:
    """The scorer a schedule asks for, to be made here or, as it pickles, elsewhere; ``function``
    stands in for ``callable`` in Python.
    """

    settings: Evaluate
    make: Callable[[], Scorer]
    unread: Callable[[], Unread | None]

    @classmethod
    def of(
        cls, settings: Evaluate, folder: Path, tokenizer_folder: Path,
        function: ScoreFunction | None = None,
    ) -> Scoring:  # fmt: skip
        """``folder``: of the settings' file; ``tokenizer_folder``: whose tokenizer models use."""
        if function is not None:
            return cls(settings, partial(CallableScorer, function, settings), _as_made)
        make = partial(_MAKERS[settings.way], settings, folder, tokenizer_folder)
        unread = _UNREAD.get(settings.way)
        return cls(settings, make, partial(unread, settings, folder) if unread else _as_made)

    def scorer(self, *, scores: bool = True) -> Scorer:
        """Makes it. Raises FastmergeError for whatever is missing: the harness, a task, its data, a
        module, or, where it is to score and not only to tell its key, the device.
        """
        # Threads that spin for one whose core another job has (torch's, before its import decides):
        # two on two busy cores took 20 s of clock and 7 s of CPU for 256 tokens; those that sleep,
        # 5 and 1.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        _check_place(self.settings, here=scores)
        return self.make()

    def foreseen(self, *, scores: bool = True) -> Scorer | Unread:
        """The scorer, for a dry run: where its making would run code that comes with the settings'
        file, what the texts say of it. Raises FastmergeError as `scorer` does.
        """
        found = self.unread()
        if found is None:
            return self.scorer(scores=scores)
        _check_place(self.settings, here=scores)
        return found


def _as_made() -> None:
    """Nothing that comes with a file is run in making it."""


def make_scorer(
    settings: Evaluate, folder: Path, tokenizer_folder: Path, function: ScoreFunction | None = None
) -> Scorer:
    """The scorer of a `Scoring`, made here. Raises FastmergeError as that does."""
    return Scoring.of(settings, folder, tokenizer_folder, function).scorer()


def check_kept(scorer: Scorer) -> None:
    """Raises FastmergeError where the scores of an earlier run cannot be told from those of another
    scorer.
    """
    if isinstance(scorer, CallableScorer):
        scorer.check_kept()


def _check_place(settings: Evaluate, *, here: bool) -> None:
    """``here``: else a cluster scores."""
    if not here:
        return cluster.require()
    import torch

    try:
        device = torch.device(settings.device)
    except RuntimeError:
        raise RecipeError(
            f"{settings.at('device')}: unknown device '{settings.device}'; use cpu or cuda"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"{settings.at('device')}: this machine has no device '{settings.device}'; use cpu"
        )
    if device.type not in ("cpu", "cuda"):
        try:
            torch.zeros(1, device=device).item()
        except Exception as error:  # each back end that torch was not built for has its own class
            raise ResourceError(
                f"{settings.at('device')}: torch cannot compute on '{settings.device}' here "
                f"({first_line(error)[:80]}); use cpu or cuda"
            ) from error

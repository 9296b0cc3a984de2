"""What scores a model, and which scorer the settings ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fastmerge.errors import RecipeError, ResourceError
from fastmerge.evaluation.callables import CallableScorer, ScoreFunction, load_callable
from fastmerge.evaluation.harness import Harness
from fastmerge.evaluation.perplexity import Perplexity
from fastmerge.evaluation.scores import Scores
from fastmerge.evaluation.settings import Evaluate


class Scorer(Protocol):
    """Scores the model in memory on one split, 'steer' or 'holdout'."""

    @property
    def key(self) -> str: ...

    @property
    def version(self) -> str: ...

    def has(self, split: str) -> bool: ...

    def score(self, model: Any, split: str, limit: int | None = None) -> Scores: ...


def make_scorer(
    settings: Evaluate, folder: Path, tokenizer_folder: Path, function: ScoreFunction | None = None
) -> Scorer:
    """The scorer a schedule asks for; ``function`` stands in for ``callable`` in Python.

    Raises FastmergeError for whatever is missing: the harness, a task, its data, a module.
    """
    _check_device(settings)
    if function is not None:
        return CallableScorer(function, settings)
    if settings.callable is not None:
        found, texts = load_callable(settings, folder)
        return CallableScorer(found, settings, texts)
    if settings.perplexity is not None:
        return Perplexity(settings, folder, tokenizer_folder)
    return Harness(settings, folder, tokenizer_folder)


def _check_device(settings: Evaluate) -> None:
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

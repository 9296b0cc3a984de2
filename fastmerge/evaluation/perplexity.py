"""The perplexity of a text as a score."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge import llama
from fastmerge.errors import RecipeError
from fastmerge.evaluation.journal import digest
from fastmerge.evaluation.loss import Target
from fastmerge.evaluation.outlook import Reading
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.settings import Evaluate
from fastmerge.evaluation.texts import text_of
from fastmerge.evaluation.weights import model_of
from fastmerge.models.header import read_object


class Perplexity:
    """100 / perplexity of a text, window by window: bounded, and higher is better."""

    def __init__(self, settings: Evaluate, folder: Path, tokenizer_folder: Path) -> None:
        assert settings.perplexity is not None
        near = folder / settings.perplexity
        path = near if os.path.exists(near) else Path(settings.perplexity)
        self._text = text_of(path, settings.at("perplexity"))
        self._settings = settings
        self._name = path.stem
        ids = llama.load_tokenizer(tokenizer_folder)(self._text)["input_ids"]
        if len(ids) < 2:
            raise RecipeError(f"{settings.at('perplexity')}: {path}: the text is too short")
        self._ids = ids
        self._windows: Any = None
        self._foreseen = settings.max_length or _positions(tokenizer_folder)
        if settings.split is not None and self._foreseen is not None:
            # Before a model is loaded.
            self._chosen("holdout", len(range(0, len(ids) - 1, self._foreseen)))

    @property
    def key(self) -> str:
        return digest([self._text, self._ids, self._settings.scoring_settings])

    @property
    def version(self) -> str:
        return f"perplexity of {self._name}"

    def has(self, split: str) -> bool:
        return split == "steer" or self._settings.split is not None

    def readings(self, split: str) -> list[Reading]:
        """What one measurement reads."""
        tokens, length, items = len(self._ids), self._foreseen, 1
        if length:  # else the model says it, which is not loaded yet
            windows = len(self._chosen(split, len(range(0, tokens - 1, length))))
            items = min(windows, self._settings.limit or windows)
            tokens = min(tokens, items * length)
        return [Reading(self._name, items, tokens)]

    def score(self, weights: Any, split: str, limit: int | None = None) -> Scores:
        """See `Scorer`; an item is a window of the text."""
        import torch

        model = model_of(weights)
        windows = self._read(model, split, limit)
        losses, tokens = [], []
        with torch.no_grad():
            for window in windows:
                ids = window[None].to(model.device)
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
                losses.append(float(loss))
                tokens.append(len(window) - 1)
        mean = float(np.average(losses, weights=tokens))
        items = tuple(100.0 * math.exp(-loss) for loss in losses)
        detail = {"perplexity": math.exp(mean) if mean < 700 else math.inf}
        task = TaskScore(
            float(np.mean(items)), "100/perplexity", len(items), {self._name: items}, detail
        )
        return Scores({self._name: task})

    def targets(self, model: Any, split: str, limit: int | None = None) -> list[Target]:
        """See `Differentiable`: all of a window but its first token."""
        windows = [window.tolist() for window in self._read(model, split, limit)]
        return [Target(ids[:1], ids[1:], 1 / len(windows)) for ids in windows]

    def _read(self, model: Any, split: str, limit: int | None) -> list[Any]:
        """The windows of a split, in the order of the text."""
        if not self.has(split):
            raise ValueError("this perplexity has no hold-out")
        if self._windows is None:
            self._windows = self._cut(model)
        chosen = self._chosen(split, len(self._windows))[: self._settings.fewest(limit)]
        return [self._windows[i] for i in sorted(chosen)]

    def _chosen(self, split: str, windows: int) -> Sequence[int]:
        """The windows' numbers, in the order in which a limit takes them."""
        if self._settings.split is None:
            return range(windows)
        return self._settings.split.drawn(self._name, range(windows), split)

    def _cut(self, model: Any) -> Any:
        import torch

        ids = torch.tensor(self._ids, dtype=torch.long)
        length = self._settings.max_length or int(
            getattr(model.config, "max_position_embeddings", 1024)
        )
        return [window for window in torch.split(ids, length) if len(window) > 1]


def _positions(folder: Path) -> int | None:
    """How long the windows of the model in ``folder`` will be, where its config says so by the name
    that most have.
    """
    if not os.path.isfile(folder / "config.json"):
        return None
    found = read_object(folder / "config.json").get("max_position_embeddings")
    return found if isinstance(found, int) and found > 1 else None

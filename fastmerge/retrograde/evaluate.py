"""Scores states of a walk: one resident model whose weights change in place, cached by content.

Three ways to score: tasks of lm-evaluation-harness, a Python callable, the perplexity of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastmerge import _C, backends, engine, live, llama
from fastmerge.errors import FastmergeError
from fastmerge.plan import Plan, TensorPlan
from fastmerge.retrograde.callables import CallableScorer, ScoreFunction, load_callable
from fastmerge.retrograde.harness import Harness, quiet
from fastmerge.retrograde.schedule import Evaluate
from fastmerge.retrograde.scores import Journal, Scores, TaskScore, digest
from fastmerge.retrograde.states import Expr, Geometry, Space

Observer = Callable[[TensorPlan, "np.ndarray[Any, Any]"], None]


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
    if function is not None or settings.callable is not None:
        return CallableScorer(function or load_callable(settings, folder), settings)
    if settings.perplexity is not None:
        return _Perplexity(settings, folder, tokenizer_folder)
    return Harness(settings, folder, tokenizer_folder)


def _check_device(settings: Evaluate) -> None:
    import torch

    try:
        device = torch.device(settings.device)
    except RuntimeError:
        raise FastmergeError(
            f"{settings.at('device')}: unknown device '{settings.device}'; use cpu or cuda"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FastmergeError(
            f"{settings.at('device')}: this machine has no device '{settings.device}'; use cpu"
        )


class _Perplexity:
    """100 / perplexity of a text, window by window: bounded, and higher is better."""

    def __init__(self, settings: Evaluate, folder: Path, tokenizer_folder: Path) -> None:
        assert settings.perplexity is not None
        near = folder / settings.perplexity
        path = near if near.exists() else Path(settings.perplexity)
        try:
            self._text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise FastmergeError(
                f"{settings.at('perplexity')}: {path}: cannot be read ({error.strerror})"
            ) from error
        except UnicodeDecodeError as error:
            raise FastmergeError(f"{settings.at('perplexity')}: {path}: {error}") from error
        self._settings = settings
        self._name = path.stem
        ids = llama.load_tokenizer(tokenizer_folder)(self._text)["input_ids"]
        if len(ids) < 2:
            raise FastmergeError(f"{settings.at('perplexity')}: {path}: the text is too short")
        self._ids = ids
        self._windows: Any = None

    @property
    def key(self) -> str:
        return digest([self._text, self._ids, self._settings.scoring_settings])

    @property
    def version(self) -> str:
        return f"perplexity of {self._name}"

    def has(self, split: str) -> bool:
        return split == "steer"

    def score(self, model: Any, split: str, limit: int | None = None) -> Scores:
        import torch

        if split != "steer":
            raise ValueError("a perplexity has no hold-out")
        if self._windows is None:
            self._windows = self._cut(model)
        limits = [n for n in (limit, self._settings.limit) if n is not None]
        windows = self._windows[: min(limits)] if limits else self._windows
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

    def _cut(self, model: Any) -> Any:
        import torch

        ids = torch.tensor(self._ids, dtype=torch.long)
        length = self._settings.max_length or int(
            getattr(model.config, "max_position_embeddings", 1024)
        )
        return [window for window in torch.split(ids, length) if len(window) > 1]


class Resident:
    """One transformers model whose weights change in place: what a written folder would hold."""

    def __init__(self, settings: Evaluate, threads: int | None = None) -> None:
        self._settings = settings
        self._threads = threads
        self._model: Any = None

    def load(self, plan: Plan, observe: Observer | None = None) -> Any:
        """Materialises ``plan`` into the model and returns it; ``observe`` sees every tensor."""
        import torch

        if self._model is None:
            dtype = getattr(torch, self._settings.dtype)
            with quiet():
                # From the plan and not from a folder: its config may untie the head.
                model = llama.load_merged(plan, threads=self._threads, dtype=dtype)
                self._model = model.to(self._settings.device).requires_grad_(False)
            if observe is None:
                return self._model
        if observe is None:
            live.merge_into(self._model, plan, threads=self._threads)
            return self._model
        parameters = self._model.state_dict()
        with torch.no_grad():
            for item, array in engine.materialise(plan, threads=self._threads):
                observe(item, array)
                target = parameters.get(item.name)
                if target is None:
                    raise FastmergeError(f"the model has no parameter '{item.name}'")
                if item.dtype.mergeable:  # integers stay
                    raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
                    target.copy_(raw.view(getattr(torch, item.dtype.name)).reshape(item.shape))
        return self._model


class Lab:
    """Measures states: makes their weights, loads them into one model, scores it, remembers."""

    def __init__(
        self,
        space: Space,
        settings: Evaluate | None,
        scorer: Scorer | None,
        journal: Journal,
        *,
        threads: int | None = None,
    ) -> None:
        self.space = space
        self.scorer = scorer
        self._journal = journal
        self._threads = threads
        self._resident = None if settings is None else Resident(settings, threads)
        self._loaded: tuple[str, Any] | None = None

    def score(self, state: Expr, split: str = "steer", limit: int | None = None) -> Scores:
        """The scores of ``state``; the same state and settings are measured once."""
        if self.scorer is None:
            raise ValueError("this run does not evaluate")
        key = digest([self.space.fingerprint(state), self.scorer.key, split, limit])
        known = self._journal.get(f"score:{key}")
        if known is None:
            known = self.scorer.score(self.model(state), split, limit).as_json()
            self._journal.put(f"score:{key}", known)
        return Scores.from_json(known)  # also when new: a resumed run must see the same digits

    def model(self, state: Expr) -> Any:
        """The resident model with the weights of ``state``."""
        assert self._resident is not None
        key = self.space.fingerprint(state)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # half-loaded weights are nobody's
            meter = None
            if self.space.coefficients(state) is None:
                meter = GramMeter(self.space)
            model = self._resident.load(self.space.plan(state), meter)
            if meter is not None:
                self._keep(key, meter)
            self._loaded = key, model
        return self._loaded[1]

    def geometry(self, state: Expr) -> Geometry:
        """Where ``state`` lies; one that does not collapse is materialised for it, once."""
        factors = self.space.coefficients(state)
        if factors is not None:
            return self.space.geometry(factors)
        key = self.space.fingerprint(state)
        if self._journal.get(f"geometry 2:{key}") is None:
            meter = GramMeter(self.space)
            for item, array in engine.materialise(self.space.plan(state), threads=self._threads):
                meter(item, array)
            self._keep(key, meter)
        return Geometry.from_json(self._journal.get(f"geometry 2:{key}"))

    def _keep(self, key: str, meter: GramMeter) -> None:
        geometry = self.space.geometry_of(meter.grams)
        self._journal.put(f"geometry 2:{key}", geometry.as_json())


class GramMeter:
    """Gram matrices of [x_0, x_1 - x_0, ..., state - x_0], filled in tensor by tensor."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._index = {name: i for i, name in enumerate(space.names)}
        self._backend = backends.cpu(1)
        size = space.count + 1
        self.grams = np.zeros((len(space.names), size, size))

    def __call__(self, item: TensorPlan, array: np.ndarray[Any, Any]) -> None:
        """One tensor of the state; those that are only copied do not count."""
        index = self._index.get(item.name)
        if index is None:
            return
        models = self._space.template.models
        sources = self._space.sources(item.name)
        first, *others = [models[s.model].view(s.name) for s in sources]
        own = _C.View(array.ctypes.data, array.size, item.dtype.code, array)
        self.grams[index] = self._backend.gram(
            [*others, own], first, axis=None, rows=1, cols=array.size
        )

"""Scores states of a walk: one resident model whose weights change in place, cached by content.

Three ways to score: tasks of lm-evaluation-harness, a Python callable, the perplexity of a text.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastmerge import _C, backends, engine, live, llama
from fastmerge.errors import FastmergeError
from fastmerge.plan import Plan, TensorPlan
from fastmerge.retrograde.harness import Harness, quiet
from fastmerge.retrograde.schedule import Evaluate
from fastmerge.retrograde.scores import Journal, Scores, TaskScore, digest
from fastmerge.retrograde.states import Expr, Geometry, Space

_PLAIN = (bool, int, float, str, bytes, type(None))
ScoreFunction = Callable[..., Mapping[str, Any]]
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
        return _Callable(function or _load_callable(settings, folder), settings)
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


_TEXTS: dict[str, str] = {}  # of the modules as they were imported
_STARTED = time.time()


def _imported(name: str) -> Any:
    """The module; imported anew where its file has changed since this process imported it."""
    module = sys.modules.get(name)
    if module is not None:
        file = Path(getattr(module, "__file__", None) or "")
        changed = (
            _TEXTS[name] != _text_of(module)
            if name in _TEXTS
            else file.is_file() and file.stat().st_mtime > _STARTED  # somebody else imported it
        )
        if changed:
            invalidate_caches()
            del sys.modules[name]  # a reload would keep what is no longer there
    module = import_module(name)
    _TEXTS[name] = _text_of(module)
    return module


def _load_callable(settings: Evaluate, folder: Path) -> ScoreFunction:
    """Imports 'module:function'; the module may lie beside the schedule."""
    assert settings.callable is not None
    module, _, name = settings.callable.partition(":")
    beside = str(folder.resolve())
    if beside not in sys.path:
        sys.path.append(beside)  # last: it must not hide an installed module
    where = f"{settings.at('callable')}: '{settings.callable}'"
    try:
        found = _imported(module)
    except Exception as error:  # importing runs the user's own code
        raise FastmergeError(f"{where}: {_in_user_code(error)}") from error
    # A module of that name may be installed, or have lain beside another schedule.
    near = [folder / f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py")]
    loaded = Path(getattr(found, "__file__", None) or "").resolve()
    if any(file.is_file() and file.resolve() != loaded for file in near):
        raise FastmergeError(
            f"{where}: beside the schedule lies a '{module}', and another one is loaded "
            f"({loaded}); rename one of them"
        )
    function: ScoreFunction | None = getattr(found, name, None)
    if function is None:
        raise FastmergeError(f"{where}: the module has no '{name}'")
    if not callable(function):
        raise FastmergeError(f"{where}: is no function")
    return function


def _in_user_code(error: BaseException) -> str:
    """What went wrong and where, in a line: 'scoring.py:12: ZeroDivisionError: ...'."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or '').name}:{error.lineno}: "
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())}"


def _model_settings(settings: Evaluate) -> dict[str, Any]:
    """What decides a score beside the weights and what scores them."""
    return settings.model_dump(include={"dtype", "device", "max_length", "limit"})


def _identity(function: Any) -> list[str]:
    """What shows that a function has changed: the texts of its file and its decorators' (which hold
    helpers and constants too), and the plain values that it closes over or is bound to.
    """
    found: list[str] = []
    seen: set[int] = set()
    left = [function]
    while left:
        value = left.pop()
        if isinstance(value, (*_PLAIN, np.generic, Path)):
            found.append(repr(value))
        elif id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (list, tuple)):
            left += ["]", *value, f"[{len(value)}"]
        elif isinstance(value, (set, frozenset)):
            found.append(repr(sorted(map(repr, value))))
        elif isinstance(value, np.ndarray):
            found.append(digest([value.dtype.str, value.shape, value.tobytes().hex()]))
        elif isinstance(value, dict):
            left += ["]", *(x for pair in value.items() for x in pair), f"[{len(value)}"]
        elif isinstance(value, functools.partial):
            left += [value.func, value.args, value.keywords]
        elif inspect.ismethod(value):
            left += [value.__func__, *_attributes(value.__self__)]
        elif inspect.isfunction(value):
            found += [value.__qualname__, _text_of(value)]
            left += [value.__defaults__, value.__kwdefaults__, getattr(value, "__wrapped__", None)]
            left += [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        elif value is function:  # an object that can be called
            found += [type(value).__qualname__, _text_of(type(value))]
            left += _attributes(value)
    return found


def _attributes(thing: Any) -> list[Any]:
    return [] if inspect.isclass(thing) else list(getattr(thing, "__dict__", {}).items())


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _text_of(thing: Any) -> str:
    """The text of the file that defines it; in a notebook its own; "" where there is none."""
    try:
        # Not getsource alone: it looks through decorators, which may close over something.
        file = Path(inspect.getsourcefile(thing) or "")
        return file.read_text("utf-8") if file.is_file() else inspect.getsource(thing)
    except (OSError, TypeError, UnicodeDecodeError):
        return ""  # built in, or made by exec


class _Callable:
    """A function of the model; it may also take ``split`` and ``limit``.

    It returns a number, or the list of its items' numbers, for each task. They are taken as they
    are: return percent where they meet accuracies given in the schedule.
    """

    def __init__(self, function: ScoreFunction, settings: Evaluate) -> None:
        self._function = function
        self._name = settings.callable or getattr(function, "__qualname__", "callable")
        signature = inspect.signature(function)
        try:
            signature.bind(None)
        except TypeError as error:
            raise FastmergeError(f"{self._name}: is called with the model alone: {error}") from None
        # By name only: **kwargs may drop the split, and the hold-out would be the steering items.
        self._takes = {"split", "limit"} & set(signature.parameters)
        self._limit = settings.limit
        for key, asked in (("limit", settings.limit), ("stages", settings.stages)):
            if asked and "limit" not in self._takes:
                raise FastmergeError(
                    f"{settings.at(key)}: {self._name} takes no 'limit': give it that argument, "
                    "or remove the key"
                )
        self._key = digest([self._name, _identity(function), _model_settings(settings)])

    @property
    def key(self) -> str:
        return self._key

    @property
    def version(self) -> str:
        return f"callable {self._name}"

    def has(self, split: str) -> bool:
        return split == "steer" or "split" in self._takes

    def score(self, model: Any, split: str, limit: int | None = None) -> Scores:
        limits = [n for n in (limit, self._limit) if n is not None]
        given = {"split": split, "limit": min(limits, default=None)}
        options = {name: value for name, value in given.items() if name in self._takes}
        try:
            answer = self._function(model, **options)
        except Exception as error:  # the user's own code
            raise FastmergeError(f"{self._name}: {_in_user_code(error)}") from error
        if not isinstance(answer, Mapping) or not answer:
            raise FastmergeError(
                f"{self._name}: must return a dict of task names and numbers, "
                f"not {type(answer).__name__}"
            )
        return Scores({str(name): self._task(name, value) for name, value in answer.items()})

    def _task(self, name: str, value: Any) -> TaskScore:
        try:
            # None would become NaN, a score that is refused without a word about why.
            if value is None or (isinstance(value, (list, tuple)) and None in value):
                raise TypeError("it is None")
            numbers = np.asarray(value, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor's gradient
            raise FastmergeError(
                f"{self._name}: the score of '{name}' is no number: {error}"
            ) from error
        if numbers.ndim == 0:
            return TaskScore(float(numbers), "score", 1)
        if not numbers.size:
            raise FastmergeError(f"{self._name}: '{name}' has no items to score")
        items = {str(name): tuple(float(x) for x in numbers.ravel())}
        return TaskScore(float(numbers.mean()), "score", numbers.size, items)


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
        return digest([self._text, self._ids, _model_settings(self._settings)])

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

    def __init__(self, folder: Path, settings: Evaluate, threads: int | None = None) -> None:
        """``folder``: a model of the same architecture, for the config and the first weights."""
        self._folder = folder
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
            live.merge_into(self._model, plan, threads=self._threads)
            return self._model
        parameters = self._model.state_dict()
        with torch.no_grad():
            for item, array in engine.materialise(plan, threads=self._threads):
                observe(item, array)
                target = parameters.get(item.name)
                if target is None and not item.name.endswith("rotary_emb.inv_freq"):
                    raise FastmergeError(f"the model has no parameter '{item.name}'")
                # Old checkpoints hold inv_freq, which the model computes; integers stay.
                if target is not None and item.dtype.mergeable:
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
        folder = space.template.models[0].path
        self._resident = None if settings is None else Resident(folder, settings, threads)
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

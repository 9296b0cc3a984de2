"""Scorers that users write: functions of the model, imported by name or given from Python.

Their scores are kept under what shows that a function has changed, so that an edit is measured.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.machinery import PathFinder
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge.errors import FOREIGN, FastmergeError, RecipeError, argument, brief, nearest
from fastmerge.evaluation.as_read import AsRead
from fastmerge.evaluation.identity import MAIN, identity_of
from fastmerge.evaluation.journal import digest
from fastmerge.evaluation.outlook import Unread
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.settings import Evaluate
from fastmerge.evaluation.texts import text_of
from fastmerge.evaluation.weights import model_of
from fastmerge.limits import MAX_RECIPE_BYTES

ScoreFunction = Callable[..., Any]  # of a number, or of numbers by task


def load_callable(settings: Evaluate, folder: Path) -> tuple[ScoreFunction, AsRead]:
    """Imports 'module:function', and with it what its file imports from beside it; the module may
    lie beside the schedule. Raises FastmergeError.
    """
    assert settings.callable is not None
    module, _, name = settings.callable.partition(":")
    beside = str(folder.resolve())
    if beside not in sys.path:
        sys.path.append(beside)  # last: it must not hide an installed module
    where = f"{settings.at('callable')}: '{settings.callable}'"
    own = AsRead(module, folder)
    try:
        with _staying():
            found = own.load()
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise FastmergeError(f"{where}: {in_user_code(error)}") from error
        raise _no_module(where, module, folder) from None
    except FOREIGN as error:  # importing runs the user's own code
        raise FastmergeError(f"{where}: {in_user_code(error)}") from error
    # A module of that name may be installed, or have lain beside another schedule.
    near = _beside(module, folder)
    loaded = Path(getattr(found, "__file__", None) or "").resolve()
    if near is not None and near.resolve() != loaded:
        raise RecipeError(
            f"{where}: beside the schedule lies a '{module}', and another one is loaded "
            f"({loaded}); rename one of them"
        )
    function: ScoreFunction | None = getattr(found, name, None)
    if function is None:
        raise RecipeError(f"{where}: the module has no '{name}'")
    if not callable(function):
        raise RecipeError(f"{where}: is no function")
    return function, own


@contextmanager
def _staying() -> Iterator[None]:
    """The working directory is what it was, wherever a user's code goes: the folder of a run, and
    models, may be named from it.
    """
    here = os.open(".", os.O_PATH)  # of a folder that may not be listed, too
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def _no_module(where: str, module: str, folder: Path) -> RecipeError:
    beside_it = [file.stem for file in folder.glob("*.py")]
    hint = f"; {nearest(module, beside_it)}" if beside_it else ""
    file = f"{module.replace('.', '/')}.py"
    return RecipeError(
        f"{where}: no module '{module}' is installed, and no {file} lies beside the file that "
        f"names it{hint}"
    )


def _beside(module: str, folder: Path) -> Path | None:
    """The file of that module's name beside the schedule."""
    near = (folder / f"{module.replace('.', '/')}{end}" for end in (".py", "/__init__.py"))
    return next((file for file in near if os.path.isfile(file)), None)


def _installed(module: str) -> Path | None:
    """The file that Python would import as the module; none of its packages is imported for it."""
    parts, within = module.split("."), None
    for last in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:last]), within)
        if spec is None:
            return None
        within = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin else None


def unread(settings: Evaluate, folder: Path) -> Unread:
    """What the text of the file that a callable names says of it, which a dry run does not import.
    Raises FastmergeError as `load_callable` and `CallableScorer` do, for what shows in the text.
    """
    assert settings.callable is not None
    module, _, name = settings.callable.partition(":")
    where = f"{settings.at('callable')}: '{settings.callable}'"
    file = _beside(module, folder) or _installed(module)
    if file is None:
        raise _no_module(where, module, folder)
    if file.suffix != ".py":
        return Unread(holdout=False)
    try:
        body = ast.parse(text_of(file, where, MAX_RECIPE_BYTES), str(file)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise FastmergeError(f"{where}: {in_user_code(error)}") from error
    defined = (node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    last = max(defined, key=lambda node: node.lineno, default=None)
    if last is None or last.decorator_list:  # an import, an object, of another signature
        return Unread(holdout=False)
    every = last.args
    takes = {own.arg for own in (*every.posonlyargs, *every.args, *every.kwonlyargs)}
    _check_limit(settings, takes, settings.callable)
    return Unread(holdout="split" in takes)


def _check_limit(settings: Evaluate, takes: set[str], name: str) -> None:
    for key, asked in (("limit", settings.limit), ("stages", settings.stages)):
        if asked and "limit" not in takes:
            raise RecipeError(
                f"{settings.at(key)}: {name} takes no 'limit': give it that argument, or remove "
                "the key"
            )


def in_user_code(error: BaseException) -> str:
    """What went wrong and where, in a line: 'scoring.py:12: ZeroDivisionError: ...'."""
    found = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in found if not frame.filename.startswith("<frozen ")] or found
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}: " if frames else ""
    if isinstance(error, SyntaxError):  # of bytes that are no text it has no place
        place = f"{Path(error.filename).name}:{error.lineno}: " if error.filename else ""
    try:
        said = " ".join(str(error).split())
    except FOREIGN as failed:  # its own __str__
        said = f"its text cannot be read: {type(failed).__name__}"
    return f"{place}{type(error).__name__}{said and f': {said}'}"


def _name_of(function: Any) -> str:
    """What a function given from Python is called, with its module's name unless it is a script."""
    while isinstance(function, functools.partial):
        function = function.func
    own = function if hasattr(function, "__qualname__") else type(function)
    name = own.__qualname__.replace("<locals>.", "")
    module = getattr(own, "__module__", None) or "__main__"
    return name if module in MAIN else f"{module}.{name}"


def _asks_for_folder(signature: inspect.Signature) -> bool:
    """Whether it has an argument ``folder`` that must be given: with a default it means its own."""
    asked = signature.parameters.get("folder")
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return asked is not None and asked.kind in by_name and asked.default is asked.empty


def _binds(signature: inspect.Signature, **given: Any) -> bool:
    try:
        signature.bind(**given)
    except TypeError:
        return False
    return True


class CallableScorer:
    """A function of the model, or of a ``folder``; it may also take ``split`` and ``limit``.

    It returns a number; or, by task, numbers or the lists of their items' numbers. They are taken
    as they are: return percent where they meet accuracies given in the schedule.
    """

    def __init__(
        self, function: ScoreFunction, settings: Evaluate, own: AsRead | None = None
    ) -> None:
        """``own``: the modules that ``function`` was imported with."""
        self._own = own
        self._function = function
        self._given = own is None
        self._name = _name_of(function) if own is None else str(settings.callable)
        self._task_name = self._name.rpartition(":")[2].rpartition(".")[2]
        try:
            signature = inspect.signature(function)
        except (ValueError, TypeError) as error:  # int
            raise FastmergeError(f"{self._name}: its arguments cannot be read ({error})") from None
        # By name only: **kwargs may drop the split, and the hold-out would be the steering items.
        self._takes = {"split", "limit"} & set(signature.parameters)
        folder = {"folder": None} if _asks_for_folder(signature) else {}
        self._takes |= folder.keys()
        named = dict.fromkeys(self._takes)
        self._takes_model = not (folder and _binds(signature, **named))
        try:
            signature.bind(*[None][: self._takes_model], **named)
        except TypeError as error:
            raise FastmergeError(f"{self._name}: is called with the model alone: {error}") from None
        self._limit = settings.limit
        _check_limit(settings, self._takes, self._name)
        texts = {} if own is None else own.texts
        found = identity_of(function, texts)
        identity = [*found.parts, *sorted(set(texts.values()) - {*found.parts, ""})]
        self._unknown = found.unknown
        self._key = digest([self._name, identity, settings.scoring_settings])

    @classmethod
    def imported(cls, settings: Evaluate, folder: Path, _tokenizer_folder: Path) -> CallableScorer:
        """The function that ``settings`` name."""
        function, own = load_callable(settings, folder)
        return cls(function, settings, own)

    @property
    def key(self) -> str:
        return self._key

    @property
    def version(self) -> str:
        return f"{'score=' if self._given else 'callable '}{self._name}"

    def check_kept(self) -> None:
        """Raises FastmergeError where nothing shows whether the function is the one that the scores
        of an earlier run are of.
        """
        if self._unknown:
            raise FastmergeError(
                f"{argument('resume', True)}: {self._name} reads what does not show whether it has "
                f"changed ({self._unknown}), nor is there a file of it: put it in a module and "
                "name that ('module:function'), or give a new folder"
            )

    def has(self, split: str) -> bool:
        return split == "steer" or "split" in self._takes

    def score(self, weights: Any, split: str, limit: int | None = None) -> Scores:
        """See `Scorer`."""
        limits = [n for n in (limit, self._limit) if n is not None]
        given: dict[str, Any] = {"split": split, "limit": min(limits, default=None)}
        options = {name: value for name, value in given.items() if name in self._takes}
        if "folder" in self._takes:
            options["folder"] = weights.folder()
        models = [model_of(weights)] if self._takes_model else []
        try:
            with _staying(), self._own or nullcontext():  # it may import as it runs
                answer = self._function(*models, **options)
        except FOREIGN as error:  # the user's own code
            raise FastmergeError(f"{self._name}: {in_user_code(error)}") from error
        return scores_of(answer, self._name, self._task_name)


def scores_of(answer: Any, who: str, task: str = "score") -> Scores:
    """What a function or a person says of a model: a number (of ``task``), or by task a number or
    the numbers of its items; `Scores` as they are. Raises FastmergeError, which begins with
    ``who``, for anything else.
    """
    if isinstance(answer, Scores):
        return answer
    if isinstance(answer, Number) or getattr(answer, "ndim", None) == 0:
        answer = {task: answer}
    if not isinstance(answer, Mapping) or not answer:
        raise FastmergeError(
            f"{who}: must return a dict of task names and numbers, or one number, "
            f"not {brief(answer)}"
        )
    found = {str(name): _task_score(who, name, value) for name, value in answer.items()}
    if len(found) < len(answer):
        raise FastmergeError(f"{who}: two tasks have one name as text, of {brief([*answer])}")
    return Scores(found)


# Above, a float has no fraction left, so that a difference of two scores says nothing.
_MOST = 1e15


def _task_score(who: str, name: str, value: Any) -> TaskScore:
    try:
        numbers = np.asarray(_as_python(value))
        # None would become NaN, a score that is refused without a word about why.
        if numbers.dtype.kind == "O" and any(one is None for one in numbers.flat):
            raise TypeError("it is None")
        if numbers.dtype.kind in "SU":  # which NumPy reads, too
            raise TypeError(f"{brief(value)} is text")
        if numbers.dtype.kind == "c":  # of which NumPy takes the real part
            raise TypeError(f"{brief(value)} is complex")
        numbers = numbers.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise FastmergeError(f"{who}: the score of '{name}' is no number: {error}") from error
    if not numbers.size:
        raise FastmergeError(f"{who}: '{name}' has no items to score")
    mean = float(numbers.mean()) if np.isfinite(numbers).all() else math.nan
    if np.abs(numbers).max() > _MOST and not math.isnan(mean):
        raise FastmergeError(
            f"{who}: the score of '{name}' is {mean:.3g}; return percent (at most {_MOST:g} in "
            "size), or NaN for a model that has none"
        )
    # An infinity is no number either: the journal has neither, and a choice must not depend on it.
    if numbers.ndim == 0 or math.isnan(mean):
        return TaskScore(mean, "score", numbers.size)
    items = {str(name): tuple(float(x) for x in numbers.ravel())}
    return TaskScore(mean, "score", numbers.size, items)


def _as_python(value: Any) -> Any:
    """Arrays and tensors, of any element type and with a gradient or not, as lists or numbers."""
    if isinstance(value, (list, tuple)):
        return [_as_python(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value

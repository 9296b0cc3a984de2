"""lm-evaluation-harness in process, on a model that exists only in memory.

The tasks and the model wrapper are built once; the weights change in place between calls. The
harness's own result cache (``use_cache``) is never used: its key does not see the weights change.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from fastmerge.errors import (
    FOREIGN,
    FastmergeError,
    RecipeError,
    ResourceError,
    brief,
    first_line,
    nearest,
)
from fastmerge.evaluation import likelihoods
from fastmerge.evaluation.answers import right_answer
from fastmerge.evaluation.callables import in_user_code
from fastmerge.evaluation.journal import digest
from fastmerge.evaluation.leaderboard import LEADERBOARD_V1
from fastmerge.evaluation.local_data import LocalData, local_data
from fastmerge.evaluation.loss import Target
from fastmerge.evaluation.outlook import Reading, Unread, tokens_each
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.settings import Evaluate, Task, overlap
from fastmerge.evaluation.split import Split
from fastmerge.evaluation.task_files import data_files, task_name, task_texts
from fastmerge.evaluation.texts import bytes_of, text_of
from fastmerge.evaluation.weights import model_of
from fastmerge.extras import install
from fastmerge.limits import MAX_RECIPE_BYTES
from fastmerge.llama import load_tokenizer
from fastmerge.recipe.located import placed

_MMLU_SUBJECTS = 57
BUILT_IN = True  # whether names may be tasks of the harness's own
_FEWSHOT_SEED = 1234  # the harness's own default

# Their samples are (log-likelihood, weight); the score is exp(ll / weight), which is bounded.
_PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")


@dataclass(frozen=True)
class _Unit:
    """One row of a score table: one harness task, or the plain mean of several."""

    key: str
    parts: Mapping[str, Any]  # the harness's task objects by name
    metric: str  # "acc,none"; "" = the first the task lists
    span: tuple[int, int | None]
    # By part, in the order in which a limit takes them; none of a part: all of its documents.
    documents: Mapping[str, Sequence[int]]


class Harness:
    """The tasks of one run, loaded once."""

    def __init__(self, settings: Evaluate, folder: Path, tokenizer_folder: Path) -> None:
        """Loads every task. Raises FastmergeError for unknown tasks and data that is not there."""
        self._settings = settings
        self._preset = settings.preset is not None
        sources = _Sources(settings, folder)
        if sources.local_only:
            # Nothing to look up: do not let the libraries try the network first.
            for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
                os.environ.setdefault(name, "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._lm: Any = None
        self._model: Any = None
        manager = sources.manager()
        self._brought = sources.brought
        with self._own_code():
            self._load(manager, sources)
        self._tokenizer = load_tokenizer(tokenizer_folder)
        self._texts = sources.texts | (sources.local.digests if sources.local else {})

    def _load(self, manager: Any, sources: _Sources) -> None:
        settings = self._settings
        if self._preset and sources.local is not None:
            six = [(name, shots) for _, name, shots, _ in LEADERBOARD_V1]
            sources.local.check(six, settings.at("preset"))
        elif self._preset:
            check_leaderboard_data(manager)
        self._units = {
            "steer": [self._unit(manager, sources, entry) for entry in sources.steering],
            "holdout": [self._unit(manager, sources, entry) for entry in sources.holdout],
        }
        for entries, side in ((sources.steering, "steer"), (sources.holdout, "holdout")):
            self._check_shared(entries, self._units[side])
        self._check_holdout(sources.holdout)
        if settings.split is not None:
            whole, split = self._units["steer"], settings.split
            with quiet():
                for side in self._units:
                    self._units[side] = [_part_of(unit, split, side) for unit in whole]
        for units in self._units.values():
            with quiet():
                _samples(units, settings.limit)  # refuses ranges without documents

    @contextlib.contextmanager
    def _own_code(self) -> Iterator[None]:
        """Says in a line what functions and templates of task files that were brought along raise,
        which is anything.
        """
        try:
            yield
        except FastmergeError:
            raise
        except FOREIGN as error:
            if not self._brought:
                raise
            raise FastmergeError(f"{self._settings.at('tasks')}: {in_user_code(error)}") from error

    @property
    def version(self) -> str:
        """The harness's version, for the report."""
        from importlib.metadata import version

        return f"lm_eval {version('lm_eval')}"

    @property
    def key(self) -> str:
        """A digest of all settings that decide a score, the task files' texts included."""
        from importlib.metadata import version

        # Not the data's place but its content, which `_texts` has, decides a score.
        beside = {"every", "stages", "bootstrap", "registered", "data"}
        if self._settings.split is None:  # what was scored before there were any keeps its key
            beside.add("split")
        values = self._settings.plain(without=beside)
        return digest([values, self._texts, version("lm_eval")])

    def has(self, split: str) -> bool:
        """Whether any task belongs to ``split`` ('steer' or 'holdout')."""
        return bool(self._units[split])

    def readings(self, split: str) -> list[Reading]:
        """What one measurement of ``split`` reads, by task."""
        units = self._units[split]
        with quiet(), self._own_code():
            chosen = _samples(units, self._settings.limit) or {}
            found = []
            for unit in units:
                parts = {n: chosen.get(n, range(len(t.eval_docs))) for n, t in unit.parts.items()}
                items = sum(map(len, parts.values()))
                each = tokens_each(list(unit.parts.values()), self._tokenizer)
                found.append(Reading(unit.key, items, round(items * each)))
        return found

    def score(self, weights: Any, split: str, limit: int | None = None) -> Scores:
        """See `Scorer`."""
        import lm_eval

        units = self._units[split]
        tasks = {name: task for unit in units for name, task in unit.parts.items()}
        with quiet():
            samples = _samples(units, self._settings.fewest(limit))
        lm = self._wrapped(model_of(weights))
        for task in tasks.values():
            # The sampler's generator runs on from call to call: the same examples need a new start.
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        with quiet(), self._own_code():
            results = lm_eval.evaluate(
                lm=lm,
                task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
                samples=samples,
                bootstrap_iters=0,
                log_samples=True,
            )
        return Scores({unit.key: _read(unit, results) for unit in units})

    def targets(self, model: Any, split: str, limit: int | None = None) -> list[Target]:
        """See `Differentiable`: the right choice, the continuation, or the text itself."""
        units = self._units[split]
        lm = self._wrapped(model)
        found = []
        with quiet(), self._own_code():
            samples = _samples(units, self._settings.fewest(limit)) or {}
            for unit in units:
                own = []
                for name, task in unit.parts.items():
                    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
                    task.build_all_requests(samples=samples.get(name))
                    pairs = (right_answer(lm, task, one) for one in task.instances)
                    own += [pair for pair in pairs if pair is not None]
                most = self._settings.max_length or lm.max_length
                share = 1 / (len(units) * max(1, len(own)))
                for given, asked in own:
                    room = max(1, most - len(asked))
                    found.append(Target(list(given)[-room:], list(asked), share))
        return found

    def _wrapped(self, model: Any) -> Any:
        if self._lm is None or self._model is not model:
            from lm_eval.models.huggingface import HFLM

            options: dict[str, Any] = {"batch_size": self._settings.batch_size}
            if self._settings.max_length is not None:
                options["max_length"] = self._settings.max_length
            if self._preset:
                options["add_bos_token"] = False  # the leaderboard's harness added none
            with quiet():
                made = _reading_once(HFLM) if likelihoods.reads(model) else HFLM
                self._lm = made(pretrained=model, tokenizer=self._tokenizer, **options)
            self._model = model
        return self._lm

    def _check_shared(self, entries: Sequence[Task], units: Sequence[_Unit]) -> None:
        """Refuses a harness task that two entries of a split hold: it would be scored once, by the
        settings of the last, and its items counted twice.
        """
        owners: dict[str, str] = {}
        for entry, unit in zip(entries, units, strict=True):
            for name in unit.parts:
                if name in owners:
                    raise RecipeError(
                        f"{entry.where}: '{name}' is part of '{owners[name]}' already; name it "
                        "once, with one range of 'items'"
                    )
                owners[name] = unit.key

    def _check_holdout(self, entries: Sequence[Task]) -> None:
        """Refuses what steers too: the schedule cannot see what a preset or a group consists of."""
        for entry, held in zip(entries, self._units["holdout"], strict=True):
            for unit in self._units["steer"]:
                shared = [name for name in held.parts if name in unit.parts]
                if shared and overlap(held.span, unit.span):
                    raise RecipeError(
                        f"{entry.where}: '{shared[0]}' is both a steering task (of '{unit.key}') "
                        "and a hold-out: give the hold-out another task"
                    )

    def _unit(self, manager: Any, sources: _Sources, entry: Task) -> _Unit:
        name = sources.names[entry.name]
        local = sources.local_of(name)
        if local is None and name not in manager.all_tasks:
            hint = nearest(name, manager.all_tasks, limit=6)
            raise RecipeError(f"{entry.where}: unknown task '{name}'; {hint}")
        try:
            with quiet():
                tasks = (
                    manager.load([name])["tasks"]
                    if local is None
                    else local.load(manager, name, entry.where)
                )
        except _load_errors() as error:
            reason = f"{type(error).__name__}: {first_line(error)[:200]}"
            raise RecipeError(
                f"{entry.where}: task '{name}' cannot be loaded ({reason})"
            ) from error
        parts = dict(sorted(tasks.items()))
        if self._preset and name == "mmlu" and len(parts) != _MMLU_SUBJECTS:
            raise RecipeError(f"mmlu: {len(parts)} subjects, not {_MMLU_SUBJECTS}")
        shots = entry.num_fewshot if entry.num_fewshot is not None else self._settings.num_fewshot
        for part in parts.values():
            own = part.get_config("num_fewshot")
            if shots is not None and own != 0:  # as the harness: a 0 in the task file is final
                part.set_config(key="num_fewshot", value=shots)
            elif own is None:
                part.set_config(key="num_fewshot", value=0)
            if local is not None:
                local.require_examples(name, part.get_config("num_fewshot"), entry.where)
            _check_metric(entry, part)
            _check_shots(entry, part)
        with quiet():
            documents = _documents(parts, entry.span)
        title = sources.titles.get(name, entry.key)
        return _Unit(title, parts, entry.metric or "", entry.span, documents)


def unread(settings: Evaluate, folder: Path) -> Unread | None:
    """None where all tasks are the harness's own. Of others to load one is to run what its file
    says: functions, and templates that Jinja does not confine. Raises FastmergeError as `Harness`
    does, for what shows in the files' texts.
    """
    if not _Sources(settings, folder).brought:
        return None
    return Unread(holdout=bool(settings.holdout) or settings.split is not None)


def _reading_once(wrapper: Any) -> Any:
    """The harness's wrapper of models, which reads what requests share once for each of them,
    without that.
    """

    class ReadingOnce(wrapper):  # type: ignore[misc]
        def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[Any]:
            if all(text is None for text, _, _ in requests):
                # Windows of texts share nothing, and all their places are asked.
                return list(super()._loglikelihood_tokens(requests, **options))
            pairs = [(given, asked) for _, given, asked in requests]
            return likelihoods.likelihoods(self.model, pairs, self.max_length)

    return ReadingOnce


class _Sources:
    """Where the tasks come from: names of the harness, or local files."""

    def __init__(self, settings: Evaluate, folder: Path) -> None:
        self.steering: Sequence[Task] = settings.tasks
        self.holdout: Sequence[Task] = settings.holdout
        self.names: dict[str, str] = {}
        self.titles: dict[str, str] = {}  # of a preset's tasks
        self.texts: dict[str, str] = {}
        self._folders = [str(_find(folder, path)) for path in settings.include_path]
        for given, path in zip(settings.include_path, self._folders, strict=True):
            if not os.path.isdir(path):
                raise RecipeError(f"{settings.at('include_path')}: no such folder: {given}")
        if settings.preset is not None:
            where = settings.at("preset")  # the user wrote the preset, not these tasks
            self.steering = [
                Task(placed(where, name=name, num_fewshot=shots, metric=metric))
                for _, name, shots, metric in LEADERBOARD_V1
            ]
        for title, name, _, _ in LEADERBOARD_V1 if settings.preset is not None else ():
            self.titles[name] = title
        for path in self._folders:
            self.texts |= task_texts(Path(path), settings.at("include_path"))
        self._known = known = {task_name(text) for text in self.texts.values()}
        for entry in (*self.steering, *self.holdout):
            name = entry.name
            if name.endswith((".yaml", ".yml")):
                file = _find(folder, name)
                if not os.path.isfile(file):
                    raise RecipeError(f"{entry.where}: no such task file: {name}")
                self.texts[file.name] = text_of(file, entry.where, MAX_RECIPE_BYTES)
                self._folders.append(str(file.parent))
                found = task_name(self.texts[file.name])
                if found is None:
                    raise RecipeError(f"{entry.where}: {name} has no 'task:' line")
                name = found
                known.add(name)
            self.names[entry.name] = name
        for file_name, text in dict(self.texts).items():
            for data in data_files(file_name, text):
                self.texts[str(data)] = hashlib.sha256(bytes_of(data, file_name)).hexdigest()
        self.local = local_data(
            settings.data, lambda path: _find(folder, path), settings.at("data")
        )
        layouts = [
            self.local.layout(name, entry.where)
            for entry in (*self.steering, *self.holdout)
            if self.local is not None and (name := self.names[entry.name]) not in known
        ]
        self._harness_folders = sorted({layout.tasks for layout in layouts})
        self.local_only = bool(self.local) or all(name in known for name in self.names.values())

    @property
    def brought(self) -> bool:
        """Whether the settings bring task files along."""
        return bool(self._folders)

    def local_of(self, name: str) -> LocalData | None:
        """The local data, where the task ``name`` takes its rows from there."""
        return None if name in self._known else self.local

    def manager(self) -> Any:
        """The task index; without the 13 000 built-in tasks (12.8 s) when none is used."""
        _import_harness()
        import lm_eval.tasks
        from lm_eval.tasks import TaskManager

        own = Path(lm_eval.tasks.__file__).parent
        folders = [*self._folders, *(str(own / name) for name in self._harness_folders)]
        with quiet():
            return TaskManager(
                include_path=list(dict.fromkeys(folders)) or None,
                include_defaults=BUILT_IN and not self.local_only,
            )


def _find(folder: Path, path: str) -> Path:
    """A path of the schedule: from the schedule's folder, else from the working directory."""
    try:
        near = folder / Path(path).expanduser()
        return (near if os.path.exists(near) else Path(path).expanduser()).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a user who has no home
        raise RecipeError(f"{brief(path)}: no path that can be opened ({error})") from None


def _import_harness() -> None:
    try:
        import lm_eval
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"evaluation tasks need the harness ({error.name} is missing); install it with: "
            f"{install('eval')}"
        ) from error


def _load_errors() -> tuple[type[Exception], ...]:
    """What loading a task raises; for damaged data that is a class of the data library's own."""
    own = import_module("datasets.exceptions").DatasetsError
    # TypeError: a key that no task has; StopIteration: a data file without a line.
    return OSError, ValueError, KeyError, TypeError, StopIteration, own


def _check_shots(entry: Task, part: Any) -> None:
    shots = part.get_config("num_fewshot")
    if not shots:
        return
    examples = len(part.sampler.fewshot_docs())
    # Drawn from the documents that are scored, one more is drawn and the scored one left out.
    own = part.config.fewshot_split == (part.config.test_split or part.config.validation_split)
    if shots + own > examples:
        raise RecipeError(
            f"{entry.where}: num_fewshot {shots} is more than the task's {examples} examples allow"
        )


def _check_metric(entry: Task, part: Any) -> None:
    metrics = list(part.aggregation())
    if entry.metric is not None and entry.metric.partition(",")[0] not in metrics:
        hint = nearest(entry.metric, metrics)
        raise RecipeError(f"{entry.where}: task has no metric '{entry.metric}'; {hint}")
    chosen = (entry.metric or metrics[0]).partition(",")[0]
    higher = part.higher_is_better().get(chosen, True)
    if not higher and chosen not in _PERPLEXITIES:
        raise RecipeError(
            f"{entry.where}: metric '{chosen}' falls as models improve; choose one of "
            f"{', '.join(m for m in metrics if m != chosen) or 'another task'}"
        )


def _documents(
    parts: Mapping[str, Any], span: tuple[int, int | None]
) -> Mapping[str, Sequence[int]]:
    """The documents of a range, by part; {} for all of all."""
    begin, end = span
    if span == (0, None):
        return {}
    found = {}
    for name, task in parts.items():
        last = len(task.eval_docs) if end is None else min(end, len(task.eval_docs))
        if last <= begin:
            raise RecipeError(f"task '{name}' has no documents from {begin} on")
        found[name] = range(begin, last)
    return found


def _part_of(unit: _Unit, split: Split, side: str) -> _Unit:
    """The unit with the documents of one side of a split."""
    drawn = {
        name: split.drawn(name, unit.documents.get(name, range(len(task.eval_docs))), side)
        for name, task in unit.parts.items()
    }
    return replace(unit, documents=drawn)


def _samples(units: Sequence[_Unit], limit: int | None) -> dict[str, list[int]] | None:
    """The documents of each task, None for all of all tasks."""
    if limit is None and not any(unit.documents for unit in units):
        return None
    chosen = {}
    for unit in units:
        for name, task in unit.parts.items():
            own = unit.documents.get(name, range(len(task.eval_docs)))
            if not own:
                raise RecipeError(f"task '{name}' has no documents")
            chosen[name] = sorted(own[:limit])
    return chosen


def _read(unit: _Unit, results: Mapping[str, Any]) -> TaskScore:
    values, items, count = [], {}, 0
    complete = True
    metric = ""
    for name in unit.parts:
        row = results["results"][name]
        metric = _metric_key(unit, name, row)
        plain, _, chosen = metric.partition(",")
        samples = [s for s in results["samples"][name] if s.get("filter", chosen) == chosen]
        found = [_item(plain, sample.get(plain)) for sample in samples]
        count += len(samples)
        if any(item is None for item in found):
            complete = False
        else:
            items[name] = tuple(item for item in found if item is not None)
        if plain in _PERPLEXITIES:
            if name not in items:
                raise RecipeError(f"task '{name}': no log-likelihoods to score '{plain}' by")
            values.append(sum(items[name]) / len(items[name]))
        else:
            values.append(100.0 * float(row[metric]))
            # An aggregation other than the mean has no per-item values to resample.
            own = sum(items.get(name, ())) / max(len(items.get(name, ())), 1)
            complete = complete and abs(own - values[-1]) < 1e-6 * max(abs(own), 1.0)
    first = next(iter(unit.parts))
    detail = {metric: float(results["results"][first][metric])} if len(values) == 1 else None
    return TaskScore(sum(values) / len(values), metric, count, items if complete else None, detail)


def _metric_key(unit: _Unit, name: str, row: Mapping[str, Any]) -> str:
    """ "acc,none" from "acc": the first filter; or the task's first metric."""
    keys = [key for key in row if "," in key and "_stderr" not in key]
    wanted = unit.metric
    if not wanted:
        wanted = next(iter(unit.parts[name].aggregation()))
    if wanted in keys:
        return wanted
    found = next((key for key in keys if key.partition(",")[0] == wanted), None)
    if found is None:
        raise RecipeError(f"task '{name}': no metric '{wanted}'; {nearest(wanted, keys)}")
    return found


def _item(metric: str, value: Any) -> float | None:
    """One document's score in percent; None for what is not a number."""
    if metric in _PERPLEXITIES:
        if isinstance(value, float):  # of a last word: one log-likelihood, no weight
            value = value, 1.0
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not value[1]:
            return None
        return 100.0 * math.exp(min(float(value[0]) / float(value[1]), 0.0))
    if isinstance(value, (bool, int, float)):
        return 100.0 * float(value)
    try:
        return 100.0 * float(value)
    except (TypeError, ValueError):
        return None


def check_leaderboard_data(manager: Any) -> None:
    """Says at once which data sets of the leaderboard cannot be had."""
    missing = []
    for title, name, _, _ in LEADERBOARD_V1:
        probe = "mmlu_anatomy" if name == "mmlu" else name  # one subject stands for the data set
        try:
            with quiet():
                manager.load([probe])
        except _load_errors() as error:
            missing.append(f"{title} ({first_line(error)[:80]})")
    if missing:
        raise ResourceError(
            f"open_llm_leaderboard_v1: {len(missing)} of {len(LEADERBOARD_V1)} data sets cannot be "
            f"loaded: {'; '.join(missing)}; run once with internet, or bring a filled HF_HOME"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the harness's logs and progress bars from the terminal; warnings of ours still show."""
    names = ("lm_eval", "lm-eval", "datasets", "transformers")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)

"""The harness's own tasks over local files of JSON lines: where each finds its rows, what a row
must hold, and the rows as the data set that the task file asks for.

The rows go to the harness in memory, so that nothing is looked up, downloaded or copied to a cache.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fastmerge.errors import FastmergeError, RecipeError, brief, is_whole, nearest
from fastmerge.limits import MAX_DATA_BYTES
from fastmerge.models.header import open_regular

VARIABLE = "FASTMERGE_DATA"  # the folder of schedules that name none
_MMLU = "mmlu"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """One data set: the harness's folder of task files, the data's folder, its two splits (the
    harness's names, and the files'), the fields of a row and what else must hold of one.
    """

    tasks: str
    folder: str
    scored: str
    shown: str | None  # where examples are drawn from; None: the task takes none
    fields: Mapping[str, Any]  # a type, [a type] for a list, or a mapping
    fault: Callable[[Row], str | None]


def _arc(row: Row) -> str | None:
    labels = row["choices"]["label"]
    if len(labels) != len(row["choices"]["text"]):
        return "'choices' has other numbers of 'text' and 'label'"
    return None if row["answerKey"] in labels else "'answerKey' is none of the labels"


def _hellaswag(row: Row) -> str | None:
    label = str(row["label"])
    known = label.isdecimal() and len(label) < 10 and int(label) < len(row["endings"])
    return None if known else "'label' is no number of an ending"


def _mmlu(row: Row) -> str | None:
    if len(row["choices"]) != 4:
        return "'choices' must be four"
    return None if 0 <= row["answer"] < 4 else "'answer' must be 0, 1, 2 or 3"


def _truthfulqa(row: Row) -> str | None:
    for name in ("mc1_targets", "mc2_targets"):
        if len(row[name]["choices"]) != len(row[name]["labels"]):
            return f"'{name}' has other numbers of 'choices' and 'labels'"
        if 1 not in row[name]["labels"]:
            return f"'{name}' has no label 1, so no right answer"
    return None


def _winogrande(row: Row) -> str | None:
    if "_" not in row["sentence"]:
        return "'sentence' has no '_' to fill"
    return None if row["answer"] in ("1", "2") else "'answer' must be '1' or '2'"


def _gsm8k(row: Row) -> str | None:
    return None if "#### " in row["answer"] else "'answer' has no '#### ' before its number"


def _two(row: Row) -> str | None:
    return None if row["label"] in (0, 1) else "'label' must be 0 or 1"


def _piqa(row: Row) -> str | None:
    blank = next((name for name in ("sol1", "sol2") if not row[name].strip()), None)
    return _two(row) if blank is None else f"'{blank}' is a text without a word"


def _lambada(row: Row) -> str | None:
    return None if " " in row["text"] else "'text' has no last word"


_CHOICES = {"choices": [str], "labels": [int]}
_ARC = {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}
_TRUTHFULQA = Layout(
    "truthfulqa", "truthfulqa", "validation", None,
    {"question": str, "mc1_targets": _CHOICES, "mc2_targets": _CHOICES}, _truthfulqa,
)  # fmt: skip

LAYOUTS: Mapping[str, Layout] = {
    "arc_challenge": Layout("arc", "arc_challenge", "test", "train", _ARC, _arc),
    "arc_easy": Layout("arc", "arc_easy", "test", "train", _ARC, _arc),
    "hellaswag": Layout(
        "hellaswag", "hellaswag", "validation", "train",
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": [str], "label": (str, int)},
        _hellaswag,
    ),
    _MMLU: Layout(
        "mmlu/default", "mmlu", "test", "dev",
        {"question": str, "subject": str, "choices": [str], "answer": int}, _mmlu,
    ),
    "truthfulqa_mc1": _TRUTHFULQA,
    "truthfulqa_mc2": _TRUTHFULQA,
    "winogrande": Layout(
        "winogrande", "winogrande", "validation", "train",
        {"sentence": str, "option1": str, "option2": str, "answer": str}, _winogrande,
    ),
    "gsm8k": Layout(
        "gsm8k", "gsm8k", "test", "train", {"question": str, "answer": str}, _gsm8k
    ),
    "piqa": Layout(
        "piqa", "piqa", "validation", "train",
        {"goal": str, "sol1": str, "sol2": str, "label": int}, _piqa,
    ),
    "boolq": Layout(
        "super_glue/boolq", "boolq", "validation", "train",
        {"passage": str, "question": str, "label": int}, _two,
    ),
    "lambada_openai": Layout(
        "lambada", "lambada_openai", "test", None, {"text": str}, _lambada
    ),
}  # fmt: skip


class LocalData:
    """A folder with a folder for each data set, in it ``<split>.jsonl`` or ``<split>.jsonl.gz``."""

    def __init__(self, folder: Path, where: str) -> None:
        """``where``: what named the folder. Raises FastmergeError where there is none."""
        self._where = where
        self._folder = folder
        if not os.path.isdir(folder):
            raise RecipeError(f"{where}: no such folder: {folder}")
        self._rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.digests: dict[str, str] = {}  # sha256 of what was read, by place within the folder

    def layout(self, name: str, where: str) -> Layout:
        """The data set of the task ``name``; FastmergeError where no layout of one is known."""
        known = name if name in LAYOUTS else _MMLU if name.startswith(f"{_MMLU}_") else None
        if known is None:
            raise RecipeError(
                f"{where}: '{name}' is no task of local data ({self._where}); "
                f"{nearest(name, LAYOUTS)}; for others give a task file of your own"
            )
        return LAYOUTS[known]

    def check(self, wanted: Sequence[tuple[str, int | None]], where: str) -> None:
        """Says at once which files are missing for tasks with so many examples."""
        missing = [
            f"{self._shown(layout, split)}.jsonl"
            for name, shots in wanted
            for layout in [self.layout(name, where)]
            for split in (layout.scored, layout.shown if shots else None)
            if split is not None and not self._file(layout, split, where)
        ]
        if missing:
            raise RecipeError(
                f"{where}: {self._folder} ({self._where}) lacks {', '.join(dict.fromkeys(missing))}"
                " (or .jsonl.gz)"
            )

    def load(self, manager: Any, name: str, where: str) -> dict[str, Any]:
        """The harness's task objects of ``name`` over the local rows, by their names.

        ``manager``: a TaskManager that knows the harness's task files. Raises FastmergeError for
        rows that are not there or of another layout.
        """
        layout = self.layout(name, where)
        self.check([(name, None)], where)
        names = [name]
        if name == _MMLU:
            names = [n for n in manager.all_subtasks if n.startswith(f"{_MMLU}_")]
        parts = []
        for part in names:
            if part not in manager.all_subtasks:
                raise RecipeError(f"{where}: unknown task '{part}'")
            subject = part.removeprefix(f"{_MMLU}_") if layout is LAYOUTS[_MMLU] else None
            parts.append({"task": part, **self._overrides(layout, subject, where)})
        # A group is the way to give the harness a task of its own with other keys.
        loaded = manager.load([{"group": "fastmerge_local", "task": parts}])
        for task in loaded["tasks"].values():
            _process_once(task)
        return dict(loaded["tasks"])

    def require_examples(self, name: str, shots: int, where: str) -> None:
        """Refuses examples that no file holds: the harness would show documents that it scores."""
        if shots and self.layout(name, where).shown is not None:
            self.check([(name, shots)], where)

    def _overrides(self, layout: Layout, subject: str | None, where: str) -> dict[str, Any]:
        splits = {layout.scored: self._read(layout, layout.scored, where)}
        keys: dict[str, Any] = {"dataset_path": "json", "dataset_name": None}
        if layout.shown is not None and self._file(layout, layout.shown, where):
            splits[layout.shown] = self._read(layout, layout.shown, where)
        else:
            # ARC's file names a validation split, too: the harness would look for examples there.
            others = ("training_split", "fewshot_split", "validation_split")
            keys |= {name: None for name in others if name != f"{layout.scored}_split"}
        if subject is not None:
            for split, rows in splits.items():
                splits[split] = [row for row in rows if row["subject"] == subject]
                if not splits[split]:
                    raise RecipeError(
                        f"{where}: {self._file(layout, split, where)}: no row of subject "
                        f"'{subject}'"
                    )

        def rows_as_data_set(**_: Any) -> Any:
            library = import_module("datasets")
            made = {split: library.Dataset.from_list(rows) for split, rows in splits.items()}
            return library.DatasetDict(made)

        return {**keys, "custom_dataset": rows_as_data_set}

    def _shown(self, layout: Layout, split: str) -> str:
        return f"{layout.folder}/{split}"

    def _file(self, layout: Layout, split: str, where: str) -> Path | None:
        stem = self._folder / self._shown(layout, split)
        both = [Path(f"{stem}{end}") for end in (".jsonl", ".jsonl.gz")]
        found = [file for file in both if os.path.isfile(file)]
        if len(found) > 1:
            raise RecipeError(f"{where}: {found[0]} lies packed beside it, too; remove one")
        return found[0] if found else None

    def _read(self, layout: Layout, split: str, where: str) -> list[dict[str, Any]]:
        key = layout.folder, split
        if key not in self._rows:
            file = self._file(layout, split, where)
            assert file is not None
            try:
                with open_regular(file) as stored:
                    data = _unpacked(stored) if file.suffix == ".gz" else _bounded(stored)
                lines = data.decode("utf-8-sig").split("\n")
            except (OSError, EOFError, ValueError, zlib.error, FastmergeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise RecipeError(f"{where}: {file}: cannot be read ({reason})") from None
            self.digests[self._shown(layout, split)] = hashlib.sha256(data).hexdigest()
            self._rows[key] = [
                _row(layout, line, f"{where}: {file}: line {number}")
                for number, line in enumerate(lines, start=1)
                if line.strip()
            ]
            if not self._rows[key]:
                raise RecipeError(f"{where}: {file}: holds no rows")
        return self._rows[key]


def _bounded(file: Any) -> bytes:
    """The whole file; ValueError where it is larger than any data set of the harness's."""
    found = bytearray()
    while piece := file.read(1 << 20):
        found += piece
        if len(found) > MAX_DATA_BYTES:
            raise ValueError(f"over {MAX_DATA_BYTES >> 20} MiB")
    return bytes(found)


def _unpacked(file: io.RawIOBase) -> bytes:
    with gzip.open(file) as unpacked:
        return _bounded(unpacked)


def local_data(data: str | None, found: Callable[[str], Path], where: str) -> LocalData | None:
    """The folder that a schedule names, else that of the environment; None where neither does.

    ``found``: the folder that a schedule's path means. Raises FastmergeError where it is none.
    """
    if data is not None:
        return LocalData(found(data), where)
    own = os.environ.get(VARIABLE)
    return LocalData(Path(own).expanduser().resolve(), VARIABLE) if own else None


def _process_once(task: Any) -> None:
    """What the harness does at every look at a split (HellaSwag's 10 042 rows: 1.5 s)."""
    process = task.config.process_docs
    if process is None:
        return
    task.dataset = {split: process(rows) for split, rows in task.dataset.items()}
    if task.fewshot_cfg.process_docs is process:
        task.fewshot_cfg.process_docs = None
    task.config.process_docs = None


def _row(layout: Layout, line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else brief(str(error))
        raise RecipeError(f"{where}: is no JSON ({why}); a row is one object on one line") from None
    fault = _misfit(row, layout.fields, "the row") or layout.fault(row)
    if fault:
        raise RecipeError(
            f"{where}: {fault}; rows of {layout.folder} hold {_in_words(layout.fields)}"
        )
    found = _only(row, layout.fields)
    assert isinstance(found, dict)
    return found


def _only(value: Any, kind: Any) -> Any:
    """Without fields that no task reads, and of two types the first: the data library takes one
    type for each.
    """
    if isinstance(kind, tuple):
        return kind[0](value)
    if not isinstance(kind, Mapping):
        return value
    return {name: _only(value[name], inner) for name, inner in kind.items()}


def _misfit(value: Any, kind: Any, what: str) -> str | None:
    """Why ``value`` is not of ``kind``, None where it is."""
    if isinstance(kind, Mapping):
        if not isinstance(value, Mapping):
            return f"{what} must be a mapping, not {brief(value)}"
        for name, inner in kind.items():
            if name not in value:
                return f"{what} has no '{name}'"
            fault = _misfit(value[name], inner, f"'{name}'")
            if fault:
                return fault
        return None
    if isinstance(kind, list):
        if not isinstance(value, list) or not value:
            return f"{what} must be a list, not {brief(value)}"
        if kind[0] is str and any(isinstance(item, str) and not item.strip() for item in value):
            return f"{what} holds a text without a word, whose likelihood nothing says"
        return next((fault for item in value if (fault := _misfit(item, kind[0], what))), None)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = any(is_whole(value) if k is int else isinstance(value, k) for k in kinds)
    return None if fits else f"{what} must be {_in_words(kind)}, not {brief(value)}"


def _in_words(kind: Any) -> str:
    if isinstance(kind, Mapping):
        inner = (
            f"{name} {{{_in_words(own)}}}" if isinstance(own, Mapping) else name
            for name, own in kind.items()
        )
        return ", ".join(inner)
    if isinstance(kind, list):
        return f"a list of {_in_words(kind[0])}s"
    if isinstance(kind, tuple):
        return " or ".join(map(_in_words, kind))
    return "whole number" if kind is int else "text"

"""Which items steer and which are tested: rows drawn by a fixed seed, named by their numbers.

Steering reads other files than testing does (validation and training parts), but for TruthfulQA,
which has one file: there two disjoint sets of its rows. Test items come in blocks of equal size, so
that a longer run adds blocks and measures no item twice. The chosen rows are written below the
run's folder in the layout of docs/evaluation.md; the files that examples are drawn from are linked.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from models import RUNS, unseen

from fastmerge.errors import FastmergeError

SEED = 16
# Spanish is no skill that anybody wants here: its model is the weak one, as in the source.
SKILLS = ("maths", "python", "dialogue")
CHARACTERS = 600  # of a text: some 150 to 200 tokens


@dataclass(frozen=True)
class Source:
    """One task: the harness's name, where its rows lie, the row of the layout that is scored."""

    task: str
    column: str  # of the leaderboard's table
    metric: str
    shots: int
    steer: str | None  # None: it does not steer
    test: str
    layout: str  # the file of docs/evaluation.md that the harness scores
    examples: str | None = None


SOURCES = (
    Source(
        "arc_challenge", "ARC", "acc_norm", 25, "arc_challenge/validation", "arc_challenge/test",
        "arc_challenge/test", "arc_challenge/train",
    ),
    Source(
        "hellaswag", "HellaSwag", "acc_norm", 10, "hellaswag/train", "hellaswag/validation",
        "hellaswag/validation", "hellaswag/train",
    ),
    Source("mmlu", "MMLU", "acc", 5, None, "mmlu/test", "mmlu/test", "mmlu/dev"),
    Source(
        "truthfulqa_mc2", "TruthfulQA", "acc", 0, "truthfulqa/validation", "truthfulqa/validation",
        "truthfulqa/validation",
    ),
    Source(
        "winogrande", "Winogrande", "acc", 5, "winogrande/train_xs", "winogrande/validation",
        "winogrande/validation", "winogrande/train",
    ),
    Source(
        "gsm8k", "GSM8K", "exact_match,strict-match", 5, None, "gsm8k/test", "gsm8k/test",
        "gsm8k/train",
    ),
)  # fmt: skip
COLUMNS = tuple(source.column for source in SOURCES)
_TRUTHFULQA_STEERS = 100  # of its 817 rows


@dataclass(frozen=True)
class Sizes:
    """Items a task of the steering set and of one test block; MMLU's are for each subject.

    GSM8K is generated, which takes longer than all else: it has sets of its own, measured last.
    """

    steer: Mapping[str, int]
    test: Mapping[str, int]
    subjects: int  # of MMLU, 57 in all


def find(data: Path, name: str, what: str) -> Path:
    """The file of a split, packed or not; FastmergeError where there is none."""
    for end in (".jsonl", ".jsonl.gz"):
        file = data / "leaderboard" / f"{name}{end}"
        if file.is_file():
            return file
    raise FastmergeError(
        f"{data / 'leaderboard' / name}.jsonl: missing, {what}; --data names the folder that has "
        "leaderboard/ and text/ (docs/evaluation.md lays out its files)"
    )


def check(data: Path) -> None:
    """Refuses a folder that lacks a split, before anything is loaded."""
    for source in SOURCES:
        if source.steer is not None:
            find(data, source.steer, f"the steering split of {source.task}")
        find(data, source.test, f"the test split of {source.task}")
        if source.examples is not None:
            find(data, source.examples, f"the examples of {source.task}")


def _rows(file: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in text.decode().split("\n") if line.strip()]


def _shuffled(count: int, purpose: str) -> list[int]:
    rng = np.random.default_rng([SEED, zlib.crc32(purpose.encode())])
    return [int(i) for i in rng.permutation(count)]


def choose(data: Path, sizes: Sizes, blocks: int) -> dict[str, dict[str, list[int]]]:
    """Row numbers by set ("steer", "test-0", "generate-0", ...) and task; MMLU's tasks are its
    subjects.
    """
    chosen: dict[str, dict[str, list[int]]] = {"steer": {}}
    for kind in ("test", "generate"):
        chosen |= {f"{kind}-{number}": {} for number in range(blocks)}
    for source in SOURCES:
        steer = [] if source.steer is None else _shuffled(
            len(_rows(find(data, source.steer, "steering"))), f"steer {source.task}"
        )  # fmt: skip
        rows = _rows(find(data, source.test, "test"))
        if source.test == source.steer:
            order = steer[_TRUTHFULQA_STEERS:]
            steer = steer[:_TRUTHFULQA_STEERS]
        else:
            order = _shuffled(len(rows), f"test {source.task}")
        if steer:
            chosen["steer"][source.task] = sorted(steer[: sizes.steer[source.task]])
        groups = {source.task: order}
        if source.task == "mmlu":
            subjects = sorted({row["subject"] for row in rows})
            kept = [subjects[i] for i in sorted(_shuffled(57, "subjects")[: sizes.subjects])]
            groups = {f"mmlu_{s}": [i for i in order if rows[i]["subject"] == s] for s in kept}
        each = sizes.test[source.task]
        kind = "generate" if source.task == "gsm8k" else "test"
        for number in range(blocks):
            for task, members in groups.items():
                block = members[number * each : (number + 1) * each]
                if block:
                    chosen[f"{kind}-{number}"][task] = sorted(block)
    for skill in SKILLS:
        numbers = unseen(RUNS[skill], data)[0]
        count = sizes.steer["texts"]
        chosen["steer"][skill] = numbers[:count]
        for number in range(blocks):
            first = count + number * sizes.test["texts"]
            chosen[f"test-{number}"][skill] = numbers[first : first + sizes.test["texts"]]
    return chosen


def write(data: Path, chosen: Mapping[str, Mapping[str, Sequence[int]]], out: Path) -> None:
    """The chosen rows as folders of local data, one for each set."""
    files: dict[str, list[dict[str, Any]]] = {}
    texts = {skill: unseen(RUNS[skill], data) for skill in SKILLS}
    for name, tasks in chosen.items():
        lines: dict[str, list[str]] = {}
        for task, numbers in tasks.items():
            if task in SKILLS:
                known = dict(zip(*texts[task], strict=True))
                own = [{"text": known[i][:CHARACTERS]} for i in numbers]
                _text_task(out / name / "texts", task, own)
                continue
            source = _source(task)
            origin = source.steer if name == "steer" else source.test
            assert origin is not None
            if origin not in files:
                files[origin] = _rows(find(data, origin, "rows"))
            rows = [json.dumps(files[origin][i]) for i in numbers]
            lines.setdefault(source.layout, []).extend(rows)
            if name != "steer" and source.examples is not None:
                _link(find(data, source.examples, "examples"), out / name)
        for layout, rows in lines.items():
            file = out / name / f"{layout}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(rows) + "\n")


def _source(task: str) -> Source:
    name = "mmlu" if task.startswith("mmlu_") else task
    return next(source for source in SOURCES if source.task == name)


def _link(file: Path, folder: Path) -> None:
    target = folder / file.parent.name / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    for end in (".jsonl", ".jsonl.gz"):
        link = target.with_name(file.name.partition(".")[0] + end)
        if link.is_symlink() and (link != target or link.readlink() != file.resolve()):
            link.unlink()  # of another --data
    if not target.is_symlink():
        target.symlink_to(file.resolve())


def write_task(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], **settings: Any) -> None:
    """A local task of lm-evaluation-harness over its own file of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = {
        "task": name,
        "dataset_path": "json",
        # Absolute: the harness resolves them against the working directory.
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        **settings,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def _text_task(folder: Path, skill: str, rows: Sequence[Mapping[str, str]]) -> None:
    """A task of the harness that reads texts: e^(log-likelihood per byte), bounded."""
    write_task(
        folder, skill, rows,
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": "byte_perplexity"}],
    )  # fmt: skip


def evaluate(
    name: str, tasks: Mapping[str, Sequence[int]], out: Path, device: str, batch: int
) -> dict[str, Any]:
    """The `evaluate` section of one set; tasks that steer show no examples."""
    entries: list[dict[str, Any]] = []
    for task in tasks:
        if task in SKILLS:
            entries.append({"name": str((out / name / "texts" / f"{task}.yaml").resolve())})
            continue
        source = _source(task)
        shots = 0 if name == "steer" else source.shots
        entries.append({"name": task, "metric": source.metric, "num_fewshot": shots})
    return {
        "every": "cycle",
        "tasks": entries,
        "data": str((out / name).resolve()),
        "dtype": "bfloat16",
        "device": device,
        "batch_size": batch,
    }

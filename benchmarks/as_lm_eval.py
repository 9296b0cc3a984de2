"""The leaderboard's six tasks by the evaluator and by the ``lm_eval`` command, item by item.

    python benchmarks/as_lm_eval.py MODEL DATA [--limit 2] [--tasks winogrande,mmlu_anatomy]

MODEL: a llama's folder. DATA: JSON lines as docs/evaluation.md lays them out. Both tools read the
same files in float32; the command gets the harness's own task files, changed in where the rows
are. Exit code 1 where a log-likelihood lies further than 1e-3 apart, or an answer is another.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fastmerge import llama
from fastmerge.errors import FastmergeError
from fastmerge.evaluation.leaderboard import LEADERBOARD_V1
from fastmerge.evaluation.local_data import LAYOUTS
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.settings import load_evaluate

TOLERANCE = 1e-3
USED = ("none", "strict-match")  # filters: of GSM8K, the leaderboard's

Samples = Mapping[str, list[Mapping[str, Any]]]  # by task


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=positive, default=2, help="items of each task and subject")
    parser.add_argument("--tasks", type=of_the_six, help="default: the preset")
    parser.add_argument("--batch-size", type=positive, default=4)
    parser.add_argument("--threads", type=positive, default=1)
    given = parser.parse_args()
    started = time.process_time()
    ours = by_evaluator(given)
    print(f"the evaluator: {time.process_time() - started:.0f} CPU seconds", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        theirs = by_command(given, Path(folder))
    print("task: items, numbers or answers compared, the largest difference")
    wrong = 0
    for title, name, _, _ in LEADERBOARD_V1:
        parts = [part for part in ours if part == name or part.startswith(f"{name}_")]
        if not parts:
            continue
        items = compared = 0
        apart = 0.0
        for part in parts:
            found, expected = (_by_item(side[part]) for side in (ours, theirs))
            assert found.keys() == expected.keys(), part
            for number, sample in expected.items():
                items += 1
                if name == "gsm8k":
                    compared += 1
                    wrong += found[number]["filtered_resps"] != sample["filtered_resps"]
                    continue
                pair = [_numbers(found[number]), _numbers(sample)]
                compared += len(pair[1])
                apart = max(apart, *(abs(a - b) for a, b in zip(*pair, strict=True)))
        wrong += apart > TOLERANCE
        print(f"{title}: {items}, {compared}, {apart:.1e}")
    print(f"{wrong} differ")
    return int(wrong > 0)


def positive(text: str) -> int:
    """A number of 1 or more."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def of_the_six(text: str) -> list[str]:
    """Tasks of the leaderboard, or subjects of MMLU."""
    known = [name for _, name, _, _ in LEADERBOARD_V1]
    for name in text.split(","):
        if name not in known and not name.startswith("mmlu_"):
            raise argparse.ArgumentTypeError(
                f"'{name}' is none of {', '.join(known)}, nor a subject, as mmlu_anatomy"
            )
    return text.split(",")


def _by_item(samples: list[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    return {s["doc_id"]: s for s in samples if s["filter"] in USED}


def _numbers(sample: Mapping[str, Any]) -> list[float]:
    # The command's files have them as text.
    return [float(response[0]) for (response,) in sample["resps"]]


def by_evaluator(given: argparse.Namespace) -> Samples:
    """The samples of one measurement of the preset."""
    import lm_eval
    import torch

    torch.set_num_threads(given.threads)
    settings = load_evaluate(
        {
            **_asked(given.tasks),
            "data": str(given.data.resolve()),
            "limit": given.limit,
            "batch_size": given.batch_size,
            "dtype": "float32",
        }
    )
    evaluate, samples = lm_eval.evaluate, {}

    def listening(**options: Any) -> Any:
        results = evaluate(**options)
        samples.update((results or {"samples": {}})["samples"])
        return results

    lm_eval.evaluate = listening
    try:
        scorer = make_scorer(settings, Path(), given.model)
        scorer.score(llama.load(given.model, dtype="float32"), "steer")
    finally:
        lm_eval.evaluate = evaluate
    return samples


def _asked(tasks: list[str] | None) -> dict[str, Any]:
    if tasks is None:
        return {"preset": "open_llm_leaderboard_v1"}
    shots = {name: shots for _, name, shots, _ in LEADERBOARD_V1}
    known = {task: "mmlu" if task.startswith("mmlu_") else task for task in tasks}
    return {"tasks": [{"name": t, "num_fewshot": shots[name]} for t, name in known.items()]}


def by_command(given: argparse.Namespace, folder: Path) -> Samples:
    """The samples that the command logs, one call for each number of examples."""
    (folder / "tasks").mkdir()
    files = dict(_task_files(given, folder / "tasks"))
    found: dict[str, list[Mapping[str, Any]]] = {}
    for shots in dict.fromkeys(shots for _, _, shots, _ in LEADERBOARD_V1):
        names = [name for name, own in files.items() if own == shots]
        if not names:
            continue
        out = folder / str(shots)
        words = (
            f"run --model hf --model_args pretrained={given.model},dtype=float32"
            f"{'' if given.tasks else ',add_bos_token=False'} --num_fewshot {shots} --device cpu "
            f"--batch_size {given.batch_size} --limit {given.limit} --log_samples"
        ).split()
        command = [sys.executable, "-c", THREADS.format(given.threads), *words, "--tasks"]
        command += [",".join(names), "--include_path", str(folder / "tasks")]
        command += ["--output_path", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"lm_eval: {done.stderr[-2000:]}")
        for name in names:
            (file,) = out.rglob(f"samples_{name}_*.jsonl")
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name.removeprefix(MARK)] = rows
    return found


MARK = "local_"  # the harness has tasks of the plain names, which the files would meet
# ``python -m lm_eval`` with the threads that were asked for.
THREADS = (
    "import runpy, torch; torch.set_num_threads({});"
    "runpy.run_module('lm_eval', run_name='__main__')"
)


def _task_files(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, int]]:
    """Writes each task's file; its name and its number of examples."""
    import lm_eval

    own = Path(lm_eval.__file__).parent / "tasks"
    for _, name, shots, _ in LEADERBOARD_V1:
        layout = LAYOUTS[name]
        for source in sorted((own / layout.tasks).glob("*.yaml")):
            text = source.read_text().replace('"', "")
            lines = [line for line in text.splitlines() if line.startswith("task:")]
            task = lines[0].partition(":")[2].strip() if lines else ""
            if task != name and not (name == "mmlu" and task.startswith("mmlu_")):
                continue
            if given.tasks and task not in given.tasks:
                continue
            files = {}
            for split in filter(None, (layout.scored, layout.shown)):
                rows = _rows(given.data.resolve() / layout.folder / f"{split}.jsonl")
                if name == "mmlu":
                    subject = task.removeprefix("mmlu_")
                    rows = [row for row in rows if row["subject"] == subject]
                file = folder / f"{task}_{split}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in rows))
                files[split] = str(file)
            changed = {
                "include": str(source), "task": MARK + task, "dataset_path": "json",
                "dataset_name": None, "dataset_kwargs": {"data_files": files},
            }  # fmt: skip
            (folder / f"{task}.yaml").write_text(yaml.safe_dump(changed))
            yield MARK + task, shots


@cache  # MMLU's file, of which each of 57 subjects is a part
def _rows(file: Path) -> list[Mapping[str, Any]]:
    packed = file.with_name(file.name + ".gz")
    with gzip.open(packed, "rt") if packed.exists() else file.open() as stream:
        return [json.loads(line) for line in stream]


if __name__ == "__main__":
    try:
        code = main()
    except FastmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    raise SystemExit(code)

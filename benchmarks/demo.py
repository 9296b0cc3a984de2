"""Two minutes of training, then everything fastmerge does, on small llamas that really differ.

    make demo            # or: python benchmarks/demo.py --out demo

Trains a small llama on seven character skills and three short, noisy branches of it; merges the
branches with SLERP (command line) and TIES (Python); loads the results with transformers, scores
them and asks them questions; then runs a retrograde schedule steered by lm-evaluation-harness on
local tasks. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent / "retrograde"))

import data
import torch
import train
import transformers
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from scoring import Items, score

import fastmerge

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SEED = 20
BRANCHES = ("branch_1", "branch_2", "branch_3")
TRAINED = ("base", "strong", *BRANCHES)
QUESTIONS = {
    "37+58=": "the sum, last digit first",
    "r:abcde=": "the word reversed",
    "s:hbaec=": "the letters sorted",
    "m:40718=": "the largest digit",
    "c2:abgh=": "each letter two places on",
    "n:abcabca?a=": "how many a",
    "x:([<{(/=": "the brackets closed",
}
STEER_ITEMS, HOLDOUT_ITEMS = 20, 60  # a skill
SEARCHES = 4  # evaluations of each one-shot method: what keeps the demo within minutes

console = Console()


def train_models(folder: Path) -> None:
    """The soup of benchmarks/retrograde: a base, longer training, three short branches of that."""
    corpus = train.Corpus(SEED, lines_per_skill=10_000)
    steps = sum(train.RUNS[name].steps for name in TRAINED)
    with Progress(
        "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    ) as bar:
        task = bar.add_task("training", total=steps)
        done = 0
        for index, name in enumerate(TRAINED):
            run = train.RUNS[name]
            bar.update(task, description=f"training {name:9}", completed=done)
            if not (folder / name).exists():
                parent = folder / str(run.parent)
                model = train.build(SEED) if run.parent is None else train.load(parent)
                train.train(
                    model,
                    run,
                    corpus,
                    [SEED, index],
                    lambda step, start=done: bar.update(task, completed=start + step),
                )
                train.save(model, folder / name)
            done += run.steps
        bar.update(task, completed=done, description="trained")


def command(*arguments: str | Path) -> None:
    """Run the fastmerge command line as a user would, in its own process."""
    shown = " ".join(str(a) for a in arguments)
    print(f"\n$ fastmerge {shown}", flush=True)
    subprocess.run(
        [sys.executable, "-m", "fastmerge", *map(str, arguments)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def merge_models(home: Path) -> None:
    """SLERP of two branches by the command line, TIES of all three from Python."""
    first, second, _ = (str(home / "models" / name) for name in BRANCHES)
    slerp = {
        "merge_method": "slerp",
        "base_model": first,
        "models": [{"model": first}, {"model": second}],
        "parameters": {"t": 0.5},
        "dtype": "float32",
    }
    recipe = home / "slerp.yml"
    recipe.write_text(yaml.safe_dump(slerp, sort_keys=False))
    command("merge", recipe, home / "slerp", "--overwrite")

    ties = {
        "merge_method": "ties",
        "base_model": str(home / "models" / "strong"),
        "models": [
            {"model": str(home / "models" / name), "parameters": {"weight": 1, "density": 0.7}}
            for name in BRANCHES
        ],
        "dtype": "float32",
    }
    (home / "ties.yml").write_text(yaml.safe_dump(ties, sort_keys=False))
    print(f"\n>>> fastmerge.merge('{home / 'ties.yml'}', '{home / 'ties'}')")
    report = fastmerge.merge(home / "ties.yml", home / "ties", overwrite=True)
    print(f"{report.out}: {report.tensors} tensors in {report.seconds:.2f} s")


def show_accuracies(models: dict[str, LlamaForCausalLM]) -> None:
    items = Items.draw(data.OLD_SKILLS, "test", 200, SEED)
    table = Table("model", *data.OLD_SKILLS, "mean", title="\naccuracy on 7 x 200 test items, %")
    for name, model in models.items():
        found = score(model, items)
        cells = [f"{100 * row.mean():.0f}" for row in found.right]
        table.add_row(name, *cells, f"{found.accuracy:.1f}")
    console.print(table)


def ask(model: LlamaForCausalLM, folder: Path, title: str) -> None:
    """Let a merged model answer, through transformers' generate."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    table = Table("prompt", "answer", "asked for", title=f"\n{title}", title_justify="left")
    for prompt, meaning in QUESTIONS.items():
        ids = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=8,
            do_sample=False,
        )
        answer = tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :]).split("\n")[0]
        table.add_row(*(cell.replace("[", r"\[") for cell in (prompt, answer, meaning)))
    console.print(table)


def write_tasks(folder: Path) -> None:
    """The skills as two local tasks of lm-evaluation-harness: one steers, one is held out."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = {index: character for character, index in data.VOCABULARY.items()}
    for task, split, per_skill in (
        ("skills_steer", "search", STEER_ITEMS),
        ("skills_holdout", "test", HOLDOUT_ITEMS),
    ):
        items = Items.draw(data.OLD_SKILLS, split, per_skill, SEED)
        rows = []
        for lines in items.skills.values():
            for row in lines.ids:
                text = "".join(letters[i] for i in row[:-1])
                cut = len(text) - lines.answer + 1
                rows.append(json.dumps({"prompt": text[:cut], "answer": text[cut:]}))
        documents = folder / f"{task}.jsonl"
        documents.write_text("\n".join(rows) + "\n")
        settings: dict[str, Any] = {
            "task": task,
            "dataset_path": "json",
            # Absolute: the harness resolves them against the working directory.
            "dataset_kwargs": {"data_files": {"test": str(documents.resolve())}},
            "output_type": "generate_until",
            "test_split": "test",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [
                {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
            ],
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def run_schedule(home: Path) -> Path:
    """Three cycles: SLERP toward a weaker branch, SLERP back toward the start."""
    write_tasks(home / "tasks")
    models = home / "models"
    schedule = {
        "baseline": str(models / "branch_1"),
        "pool": [str(models / name) for name in BRANCHES[1:]],
        "base_model": str(models / "strong"),
        "schedule": {
            "cycles": 3,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.5},
            "retrace": {"toward": "baseline", "method": "slerp", "t": 0.2},
        },
        "accept": "always",
        "evaluate": {
            "every": "step",
            "tasks": ["tasks/skills_steer.yaml"],
            "holdout": ["tasks/skills_holdout.yaml"],
            "batch_size": 128,
        },
        "compare": {
            "methods": [
                "best_single",
                "linear",
                "slerp",
                "ties",
                "dare_ties",
                "task_arithmetic",
                "model_stock",
                "greedy_soup",
                "line_search",
            ],
            "budget": SEARCHES,
        },
        "seed": SEED,
    }
    file = home / "schedule.yml"
    file.write_text(yaml.safe_dump(schedule, sort_keys=False))
    out = home / "retrograde"
    command("retrograde", file, out, *(["--resume"] if out.exists() else []))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--threads", type=int, default=1, help="torch's, while training")
    arguments = parser.parse_args()
    # Matrices of 128 columns gain little from a second thread, and on a busy machine lose tenfold.
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    home: Path = arguments.out
    (home / "models").mkdir(parents=True, exist_ok=True)

    train_models(home / "models")
    merge_models(home)
    merged = {
        f"{name} (merged)": fastmerge.llama.load(home / name.lower()) for name in ("SLERP", "TIES")
    }
    trained = {name: fastmerge.llama.load(home / "models" / name) for name in TRAINED[1:]}
    show_accuracies(trained | merged)
    ask(merged["SLERP (merged)"], home / "slerp", "the SLERP merge answers")
    out = run_schedule(home)
    ask(fastmerge.llama.load(out / "model"), out / "model", "the schedule's final model answers")
    seconds = time.perf_counter() - started
    folders = (home / "models", home / "slerp", home / "ties", out / "model")
    print(f"\n{seconds:.0f} s in all. Models: {', '.join(map(str, folders))}")
    print("What the schedule came to, on items that it never saw (95 % intervals over items):")
    for line in (out / "report.md").read_text().splitlines():
        if line.startswith("- against "):
            print(line)
    print(f"The whole report: {out / 'report.html'}")


if __name__ == "__main__":
    main()

"""The optimisers of `fastmerge search` at equal budget, on a real llama and texts: a protocol.

    python benchmarks/optimisers.py OUT --models MODELS --data DATA [--seeds 1,2] [--record]

Written and committed before the first score. **Question**: with as many measured candidates, which
optimiser finds coefficients that are better on texts that it never saw, and is any better than
drawing them evenly? **Models**: SmolLM2-135M-Instruct and its four fine-tunes of benchmarks/real
(maths, python, dialogue, spanish); MODELS is the folder that run.py there makes. **Space**: task
arithmetic on the baseline, eight numbers: each fine-tune's weight at the first and at the last
layer, 0..1, from 0.25 (the mean of the four). **Score**: 100 e^(mean log-likelihood of a token) of
a text's first 24 tokens, mean over texts, mean over maths, python and dialogue (Spanish is wanted
by nobody: its model is the weak one), in bfloat16. **Items**: a seed draws its own 5 steering
texts of each kind; the hold-out is 40 others of each, the same for all. **Budget**: 40 candidates,
counted in items, a gradient as three times its items; less where an optimiser converges.
**Seeds**: 1 to 5, of the items and of all that is drawn. **Entry**: the best on the steering
items, which meets the hold-out once. **Comparison**: the hold-out score less the start's and less
that of `random`, paired by seed: mean and 95 % t interval over seeds, Holm over the six
differences to `random`. No optimiser's options are tuned: all have their defaults.

The same command goes on where it stopped, a seed after another; results/optimisers.{json,md} hold
the seeds that are whole, and keep those that a run does not name. One process and one thread: its
seconds are of CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.append(str(Path(__file__).resolve().parent / "real"))

import numpy as np
from items import SKILLS
from merge_model import HERE
from models import RUNS, unseen
from record import record

from fastmerge import search
from fastmerge.evaluation import scorers
from fastmerge.evaluation.journal import digest
from fastmerge.evaluation.loss import Target
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.statistics import holm
from fastmerge.evaluation.weights import model_of
from fastmerge.llama import load_tokenizer
from fastmerge.search.expressions import Model, average
from fastmerge.search.search import drive

OPTIMISERS = ("random", "line", "coordinate", "walk", "cma", "tpe", "gradient")
SEEDS = (1, 2, 3, 4, 5)
LAYERS, CANDIDATES = 2, 40  # numbers of a weight along the layers; the budget
STEER, HOLDOUT, TOKENS = 5, 40, 24
_DRAWN = 17  # the seed of the hold-out


class Texts:
    """The likelihood of texts: a scorer as `fastmerge.evaluation.scorers` wants one."""

    version = f"likelihood of {TOKENS} tokens of texts"

    def __init__(self, settings: Any, folder: Path, tokenizer_folder: Path) -> None:
        said = settings.registered["texts"]
        tokenizer = load_tokenizer(tokenizer_folder)
        self._ids: dict[str, dict[str, list[list[int]]]] = {"steer": {}, "holdout": {}}
        for skill in SKILLS:
            _, texts = unseen(RUNS[skill], folder / said["data"])
            rows = [ids[:TOKENS] for ids in tokenizer(texts)["input_ids"] if len(ids) >= TOKENS]
            order = np.random.default_rng(_DRAWN).permutation(len(rows))
            held, left = order[:HOLDOUT], order[HOLDOUT:]
            drawn = np.random.default_rng(said["seed"]).permutation(left)[:STEER]
            self._ids["holdout"][skill] = [rows[i] for i in held]
            self._ids["steer"][skill] = [rows[i] for i in drawn]
        self.key = digest([self._ids, settings.dtype])

    def has(self, split: str) -> bool:
        return split in self._ids

    def score(self, weights: Any, split: str, limit: int | None = None) -> Scores:
        import torch

        model = model_of(weights)
        tasks = {}
        for skill, rows in self._ids[split].items():
            found: list[float] = []
            for begin in range(0, len(rows[:limit]), 20):
                ids = torch.tensor(rows[:limit][begin : begin + 20])
                with torch.no_grad():
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                losses = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), ids[:, 1:], reduction="none"
                )
                found += (100 * (-losses.mean(1)).exp()).tolist()
            items = {skill: tuple(found)}
            tasks[skill] = TaskScore(float(np.mean(found)), "likelihood", len(found), items)
        return Scores(tasks)

    def targets(self, _model: Any, split: str, limit: int | None = None) -> list[Target]:
        return [
            Target(row[:1], row[1:], 1 / len(SKILLS) / len(rows[:limit]))
            for rows in self._ids[split].values()
            for row in rows[:limit]
        ]


def file_of(models: Path, data: Path, optimiser: str, seed: int) -> dict[str, Any]:
    """One search, as a user would write it."""
    weight = {"low": 0, "high": 1, "start": 0.25, "layers": LAYERS}
    return {
        "space": {
            "merge_method": "task_arithmetic",
            "base_model": str(models / "baseline"),
            "models": [{"model": str(models / n), "parameters": {"weight": weight}} for n in RUNS],
        },
        "optimiser": optimiser,
        "budget": {"items": CANDIDATES * STEER * len(SKILLS)},
        "evaluate": {"texts": {"data": str(data), "seed": seed}, "dtype": "bfloat16"},
        "seed": seed,
    }


def contest(models: Path, data: Path, out: Path, seed: int) -> list[dict[str, Any]]:
    """Every optimiser with one seed, and the models by themselves. All share a lab, so that a state
    is measured once; each pays for all that it asks for.
    """
    home = out / f"seed-{seed}"
    first = search.open_study(
        file_of(models, data, OPTIMISERS[0], seed), home, resume=home.exists(), threads=1,
        scored=True,
    )  # fmt: skip
    lab = first.lab
    count = len(RUNS) + 1
    alone = {"baseline": Model(0), **{name: Model(i) for i, name in enumerate(RUNS, 1)}}
    alone["mean of all five"] = average([Model(i) for i in range(count)], [1 / count] * count)
    found = []
    for name, state in alone.items():
        steer, held = lab.score(state), lab.score(state, "holdout")
        found.append({"seed": seed, "model": name, "steer": steer.value, "holdout": held.value})
    for name in OPTIMISERS:
        begun = time.process_time()
        file = search.load(file_of(models, data, name, seed))
        study = search.Study(file, file.ranges(), lab, seed)
        drive(study, lab.score)
        best, start = study.best, study.start
        assert best is not None and start is not None
        held = lab.score(best.state, "holdout")
        found.append(
            {
                "seed": seed,
                "optimiser": name,
                "candidates": len(study.trials),
                "spent": study.spent,
                "best": best.number,
                "point": list(best.point),
                "start": [start.scores.value, lab.score(start.state, "holdout").value],
                "steer": best.scores.value,
                "holdout": held.value,
                "by task": {task: one.value for task, one in held.tasks.items()},
                "scores": [round(trial.value, 6) for trial in study.trials],
            }
        )
        seconds = time.process_time() - begun
        print(f"seed {seed}, {name}: {study.spent} items, {seconds:.0f} s of CPU", flush=True)
    return found


def over_seeds(values: list[float]) -> tuple[str, float]:
    """The mean with its 95 % t interval, and the two-sided p of a mean of 0."""
    from scipy import stats

    mean, count = float(np.mean(values)), len(values)
    error = float(np.std(values, ddof=1)) / count**0.5 if count > 1 else float("nan")
    if error == 0:
        return f"{mean:+.3f} [{mean:+.3f}, {mean:+.3f}]", 1.0 if mean == 0 else 0.0
    wide = float(stats.t.ppf(0.975, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, count - 1))
    return f"{mean:+.3f} [{mean - wide:+.3f}, {mean + wide:+.3f}]", p


def rows_of(runs: list[dict[str, Any]]) -> list[list[str]]:
    """A row an optimiser: gains over the start, and the difference to `random`; then the models."""
    own = {name: [r for r in runs if r.get("optimiser") == name] for name in OPTIMISERS}
    pairs = {n: zip(own[n], own["random"], strict=True) for n in OPTIMISERS}
    leads = [over_seeds([a["holdout"] - b["holdout"] for a, b in pairs[n]]) for n in OPTIMISERS]
    adjusted = holm([float("nan"), *(p for _, p in leads[1:])])
    rows = []
    for name, (lead, _), p in zip(OPTIMISERS, leads, adjusted, strict=True):
        steer = over_seeds([r["steer"] - r["start"][0] for r in own[name]])[0]
        held = over_seeds([r["holdout"] - r["start"][1] for r in own[name]])[0]
        count = np.mean([r["candidates"] for r in own[name]])
        versus = ["-", "-"] if name == "random" else [lead, f"{p:.3f}"]
        rows.append([name, f"{count:.0f}", steer, held, *versus])
    starts = {r["seed"]: r["start"] for r in own["random"]}
    for model in dict.fromkeys(r["model"] for r in runs if "model" in r):
        alone = [r for r in runs if r.get("model") == model]
        steer = over_seeds([r["steer"] - starts[r["seed"]][0] for r in alone])[0]
        held = over_seeds([r["holdout"] - starts[r["seed"]][1] for r in alone])[0]
        rows.append([f"*{model}*", "-", steer, held, "-", "-"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="some of them")
    parser.add_argument("--record", action="store_true", help="write results/optimisers.*")
    given = parser.parse_args()
    scorers.register("texts", Texts)
    runs: list[dict[str, Any]] = []
    seeds = list(map(int, given.seeds.split(",")))
    for seed in seeds:
        runs += contest(given.models.resolve(), given.data.resolve(), given.out, seed)
    file = HERE / "results" / "optimisers.json"
    if given.record:
        kept = json.loads(file.read_text())["runs"] if file.exists() else []
        runs += [run for run in kept if run["seed"] not in seeds]
        runs.sort(key=lambda run: run["seed"])
        whole = sorted({run["seed"] for run in runs})
        head = (
            "| optimiser | candidates | steering, less the start | hold-out, less the start "
            "[95 % over seeds] | hold-out, less random | p (Holm) |"
        )
        title = "Optimisers at equal budget on a real llama"
        about = {
            "seeds": " ".join(map(str, whole)),
            "candidates": CANDIDATES,
            "steering items": STEER * len(SKILLS),
            "items held out": HOLDOUT * len(SKILLS),
        }
        record("optimisers", title, head, rows_of(runs), about)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"runs": runs}, indent=1) + "\n")
    for row in rows_of(runs):
        print(" | ".join(row))


if __name__ == "__main__":
    main()

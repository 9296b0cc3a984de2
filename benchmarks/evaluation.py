"""Items a second of the evaluator and of the plain harness, in turn, on the same items.

    python benchmarks/evaluation.py MODEL DATA [--tasks arc_challenge:25:2,piqa:0:20]

MODEL: a llama's folder. DATA: JSON lines as docs/evaluation.md lays them out. A task is
name:examples:items. CPU seconds are shown beside the clock's: on a machine with other work only
they are steady. The plain harness reads ``--batch-size`` sequences at once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmerge import llama
from fastmerge.evaluation import likelihoods
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.settings import load_evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", default="arc_challenge:25:2,mmlu_anatomy:5:12,piqa:0:20")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()

    import torch

    torch.set_num_threads(given.threads)
    model = llama.load(given.model, dtype=given.dtype)
    print("task, items: ratio of seconds, of CPU seconds (plain / ours); items per CPU second of")
    print("ours; the largest difference of a log-likelihood")
    for text in given.tasks.split(","):
        name, shots, items = text.split(":")
        settings = load_evaluate(
            {
                "data": str(given.data.resolve()),
                "tasks": [{"name": name, "num_fewshot": int(shots)}],
                "limit": int(items),
                "batch_size": given.batch_size,
                "dtype": given.dtype,
            }
        )
        for _ in range(given.pairs):
            ours = _timed(settings, given.model, model, plain=False)
            plain = _timed(settings, given.model, model, plain=True)
            assert ours[2].keys() == plain[2].keys()
            apart = max(abs(ours[2][key] - plain[2][key]) for key in ours[2])
            print(
                f"{name}, {items}: {plain[0] / ours[0]:.2f}, {plain[1] / ours[1]:.2f}; "
                f"{int(items) / ours[1]:.2f}; {apart:.1e}",
                flush=True,
            )


def _timed(
    settings: Any, folder: Path, model: Any, *, plain: bool
) -> tuple[float, float, Mapping[Any, float]]:
    """Seconds, CPU seconds, and the log-likelihoods by item and ending."""
    import lm_eval

    scorer = make_scorer(settings, Path(), folder)
    reads, evaluate = likelihoods.reads, lm_eval.evaluate
    answers: dict[Any, float] = {}

    def listening(**options: Any) -> Any:
        results = evaluate(**options)
        for name, samples in (results or {"samples": {}})["samples"].items():
            for sample in samples:
                for number, (found,) in enumerate(sample["resps"]):
                    answers[name, sample["doc_id"], number] = float(found[0])
        return results

    lm_eval.evaluate = listening
    if plain:
        likelihoods.reads = lambda _: False
    try:
        clock, cpu = time.perf_counter(), time.process_time()
        scorer.score(model, "steer")
        return time.perf_counter() - clock, time.process_time() - cpu, answers
    finally:
        likelihoods.reads, lm_eval.evaluate = reads, evaluate


if __name__ == "__main__":
    main()

"""The whole experiment: train every seed, run the protocol, write tables and plots. Resumable.

    python benchmarks/retrograde/run.py                 # 5 seeds, two processes
    python benchmarks/retrograde/run.py --seeds 0 --jobs 1

What exists is kept: a trained model (benchmarks/data/), a finished regime (results/). To rerun from
scratch, delete both.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FASTMERGE_NUM_THREADS", "1")  # a process per seed, a core per process

import numpy as np
import torch
from train import FOLDER, REGIMES, RUNS, load, train_seed

RESULTS = Path(__file__).resolve().parent / "results"


def run_seed(seed: int, regimes: list[str], results: Path, log: Path) -> int:
    """Train and evaluate one seed in this process, one thread; returns the seed."""
    import transformers
    from protocol import Bench, run_regime

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)

    def report(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    home = train_seed(seed, report=report)
    states = {name: load(home / name).state_dict() for name in RUNS}
    for name in regimes:
        stem = results / f"{name}_{seed}"
        if stem.with_suffix(".json").exists():
            continue
        started = time.perf_counter()
        bench = Bench(REGIMES[name], states, load(home / "base"), seed)
        record, right = run_regime(
            bench, lambda family, n=name: report(f"seed {seed} {n} {family}")
        )
        record |= {"seed": seed, "regime": name, "seconds": round(time.perf_counter() - started, 1)}
        np.savez_compressed(stem.with_suffix(".npz"), **pack(right))
        working = stem.with_suffix(".part")
        working.write_text(json.dumps(record) + "\n")
        working.rename(stem.with_suffix(".json"))  # last: its presence means the regime is done
        report(f"seed {seed} {name}: done, {bench.evaluations} scorings, {record['seconds']} s")
    return seed


def pack(right: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Eight items a byte where an item is right or wrong; counts over masks stay one byte each."""
    return {
        family: np.packbits(hits, axis=1) if hits.dtype == bool else hits
        for family, hits in right.items()
    }


def unpack(file: Path, items: int) -> dict[str, np.ndarray]:
    """The hits as `pack` got them: bool or uint8, (skills, items)."""
    with np.load(file) as packed:
        return {
            family: hits if hits.shape[1] == items else np.unpackbits(hits, axis=1, count=items) > 0
            for family, hits in packed.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--no-report", action="store_true", help="leave tables and plots as they are"
    )
    arguments = parser.parse_args()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    arguments.results.mkdir(parents=True, exist_ok=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    log = FOLDER / "progress.log"
    log.write_text("")
    with (
        Progress(
            "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        ) as bar,
        ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool,
    ):
        task = bar.add_task("starting", total=None)
        work = partial(run_seed, regimes=arguments.regimes, results=arguments.results, log=log)
        futures = [pool.submit(work, seed) for seed in arguments.seeds]
        lines_per_seed = len(RUNS) + 18 * len(arguments.regimes)
        bar.update(task, total=lines_per_seed * len(futures))
        while not all(future.done() for future in futures):
            time.sleep(1)
            lines = log.read_text().splitlines()
            bar.update(task, completed=len(lines), description=lines[-1] if lines else "starting")
        for future in futures:
            future.result()  # raises what a seed raised
        bar.update(task, completed=lines_per_seed * len(futures), description="done")
    if not arguments.no_report:
        from analyse import write_report

        write_report(arguments.results)


if __name__ == "__main__":
    main()

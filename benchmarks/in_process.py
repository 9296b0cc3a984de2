"""fastmerge and mergekit in one process, by CPU seconds: what is left without their start.

    python benchmarks/in_process.py --size 0.2b --methods nearswap,ram,ramplus_tl,arcee_fusion

Of fastmerge the median of ``--repeat`` merges behind a first one, which the pool and the caches get
used to; of mergekit one. CPU seconds, since others' load adds less to them than to the clock's.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

import fastmerge
from fastmerge.bench import peers, request
from fastmerge.bench.checkpoints import SHAPES, write_set
from fastmerge.bench.recipes import JOBS


def cpu_seconds(work: Callable[[], object], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    begin = time.process_time()
    work()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=list(SHAPES), default="0.2b")
    parser.add_argument(
        "--methods", type=request.methods, default="nearswap,ram,ramplus_tl,arcee_fusion"
    )
    parser.add_argument("--repeat", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as kept:
        folder = Path(kept)
        models = write_set(folder / "models", options.size, 3)
        recipe, out = folder / "recipe.yml", folder / "out"
        print("| method | fastmerge | mergekit | x |\n| --- | ---: | ---: | ---: |")
        for name in options.methods:
            recipe.write_text(yaml.safe_dump(JOBS[name].recipe(models, "bfloat16")))
            runs = [
                cpu_seconds(lambda: fastmerge.merge(recipe, out), out)
                for _ in range(options.repeat + 1)
            ]
            ours = statistics.median(runs[1:])
            theirs = cpu_seconds(peers.mergekit(str(recipe), str(out)), out)
            print(f"| {name} | {ours:.2f} | {theirs:.1f} | {theirs / ours:.0f} |", flush=True)


if __name__ == "__main__":
    main()

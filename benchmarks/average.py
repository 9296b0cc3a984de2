"""Averages llama-shaped checkpoints with fastmerge and the machine's floor, side by side.

    python benchmarks/average.py --size 0.2b --models 8 --repeat 5

Each repetition runs the floor (reads every model once, writes the output's bytes) and
`fastmerge average` as a whole process, one after the other on warm inputs, so that a noisy
neighbour hits both. ``--torch`` adds what labs write by hand: a loop over safetensors that sums in
fp32 and saves. Prints one JSON object; the ratios are medians over repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import commit

from fastmerge.bench.checkpoints import SHAPES, write_set
from fastmerge.bench.floor import run_floor
from fastmerge.bench.machine import machine
from fastmerge.bench.pagecache import bytes_of, files_of, settle
from fastmerge.bench.process import measure
from fastmerge.bench.recipes import JOBS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="0.2b")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the models are, or are made and kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="average-") as made:
        print(json.dumps(bench(options.folder or Path(made), options), indent=1))


def bench(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    models = write_set(folder, options.size, options.models)
    files = [file for model in models for file in files_of(model)]
    out, floor_out, peer_out = folder / "out", folder / "floor.bin", folder / "peer"
    recipe = folder / "linear.yml"
    recipe.write_text(json.dumps(JOBS["linear"].of(len(models)).recipe(models, None)))
    peer = [sys.executable, "-m", "fastmerge.bench.peers", "torch", recipe, peer_out]
    command = [Path(sys.executable).with_name("fastmerge"), "average", *models, "-o", out, "-q"]
    runs: dict[str, list[Any]] = {"floor": [], "fastmerge": [], "torch": []}
    for _ in range(options.repeat):
        settle(models, [out, floor_out, peer_out])
        runs["floor"].append(run_floor(files, floor_out, bytes_of(models[0])))
        settle(models, [out, floor_out])
        runs["fastmerge"].append(measure(command))
        if options.torch:
            settle(models, [out, peer_out])
            runs["torch"].append(measure(peer))
        print({name: round(done[-1].seconds, 2) for name, done in runs.items() if done},
              file=sys.stderr)  # fmt: skip
    settle([], [out, floor_out, peer_out])
    ratios = [a.seconds / b.seconds for a, b in zip(runs["fastmerge"], runs["floor"], strict=True)]
    return {
        "size": options.size,
        "models": options.models,
        "bytes": sum(map(bytes_of, models)) + bytes_of(models[0]),
        "seconds": {
            name: statistics.median(run.seconds for run in done)
            for name, done in runs.items()
            if done
        },
        "cpu_seconds": statistics.median(run.cpu_seconds for run in runs["fastmerge"]),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in runs["fastmerge"]),
        "times_floor": statistics.median(ratios),
        "every_ratio": [round(ratio, 3) for ratio in ratios],
        "machine": machine(folder),
        "commit": commit(),
    }  # fmt: skip


if __name__ == "__main__":
    main()

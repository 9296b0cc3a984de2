"""A merge in parts, one after another, beside the same merge without parts.

    python benchmarks/parts.py --size 1.1b --parts 3 --repeat 3

Each repetition runs `fastmerge merge`, then `merge --part I/N` for each part and `finish`, every
one a whole process on warm inputs. The parts' ratio leaves out what a process takes to start and
plan, which is measured apart (`fastmerge plan`): the bar is 1.05. CPU seconds are given too, which
a busy machine does not stretch. Prints one JSON object.
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
from fastmerge.bench.process import Usage, measure
from fastmerge.bench.recipes import JOBS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SHAPES, default="0.2b")
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--shard-size", default="100MB")
    parser.add_argument("--trim", action="store_true", help="TIES with trim: model, not linear")
    parser.add_argument("--folder", type=Path, help="where the models are, or are made and kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="parts-") as made:
        print(json.dumps(bench(options.folder or Path(made), options), indent=1))


def bench(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    models = write_set(folder, options.size, 3 if options.trim else 2)
    files = [file for model in models for file in files_of(model)]
    recipe, out, floor_out = folder / "recipe.yml", folder / "out", folder / "floor.bin"
    recipe.write_text(json.dumps(recipe_of(models, trim=options.trim)))
    command = [Path(sys.executable).with_name("fastmerge"), "merge", recipe, out, "-q"]
    command += ["--max-shard-size", options.shard_size]
    names = ("floor", "plan", "one", "parts", "finish")
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}

    def note(name: str, *used: Usage) -> None:
        wall[name].append(sum(each.seconds for each in used))
        cpu[name].append(sum(each.cpu_seconds for each in used))

    for _ in range(options.repeat):
        settle(models, [out, floor_out])
        wall["floor"].append(run_floor(files, floor_out, bytes_of(models[0])).seconds)
        settle(models, [out, floor_out])
        note("plan", measure([command[0], "plan", recipe]))
        note("one", measure(command))
        settle(models, [out])
        numbers = range(1, options.parts + 1)
        note("parts", *[measure([*command, "--part", f"{i}/{options.parts}"]) for i in numbers])
        note("finish", measure([command[0], "finish", out, "-q"]))
        print({name: round(found[-1], 2) for name, found in wall.items()}, file=sys.stderr)
    settle([], [out, floor_out])

    def ratios(runs: dict[str, list[float]]) -> list[float]:
        rows = zip(runs["parts"], runs["finish"], runs["plan"], runs["one"], strict=True)
        return [(parts + end - options.parts * plan) / one for parts, end, plan, one in rows]

    moved = sum(map(bytes_of, models)) + bytes_of(models[0])
    seconds = {name: statistics.median(found) for name, found in wall.items()}
    return {
        "size": options.size,
        "parts": options.parts,
        "method": "ties, trim: model" if options.trim else "linear",
        "bytes": moved,
        "seconds": seconds,
        "cpu_seconds": {name: statistics.median(found) for name, found in cpu.items() if found},
        "bytes_per_second": moved / (seconds["one"] - seconds["plan"]),
        "times_one": statistics.median(ratios(wall)),
        "times_one_cpu": statistics.median(ratios(cpu)),
        "every_ratio": [round(ratio, 3) for ratio in ratios(wall)],
        "machine": machine(folder),
        "commit": commit(),
    }


def recipe_of(models: list[Path], *, trim: bool) -> dict[str, Any]:
    if not trim:
        return JOBS["linear"].recipe(models, "bfloat16")
    base, *tunes = models
    return {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(m), "parameters": {"weight": 0.5, "density": 0.3}} for m in tunes],
        "parameters": {"trim": "model"},
        "dtype": "bfloat16",
    }


if __name__ == "__main__":
    main()

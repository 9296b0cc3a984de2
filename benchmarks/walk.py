"""A ten-step SLERP walk over three models beside a one-shot merge of the same models, and beside
the same walk as ten merges through the disk with mergekit.

    python benchmarks/walk.py --size 1.1b --repeat 3

Walk and one-shot merge (multislerp) are timed as whole processes, in turn, on warm inputs.
The bars: the walk takes at most 1.2 times the one-shot merge and no more anonymous memory;
planning ten steps over known Gram matrices takes less than 0.1 s; making an accepted state again is
one pass.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from checkpoints import SHAPES, write_set
from merge_model import HERE, Run, commit, run_fastmerge, run_mergekit, settle
from process import machine, measure

STEPS = 10
DEGRADE, RETRACE = 0.35, 0.6


def schedule_text(models: list[Path]) -> str:
    """Five cycles: toward each of the two others in turn, and back."""
    return yaml.safe_dump(
        {
            "baseline": str(models[0]),
            "pool": [str(path) for path in models[1:]],
            "schedule": {
                "cycles": STEPS // 2,
                "degrade": {"partner": "next", "method": "slerp", "t": DEGRADE},
                "retrace": {"toward": "baseline", "method": "slerp", "t": RETRACE},
            },
            "seed": 0,
        }
    )


def run_walk(schedule: Path, out: Path) -> Run:
    """The walk as a process, start to exit."""
    command = Path(sys.executable).with_name("fastmerge")
    usage = measure([command, "retrograde", schedule, out, "--no-evaluate", "--quiet"])
    return Run(usage.seconds, usage.cpu_seconds, usage.peak_rss_bytes, usage.peak_anonymous_bytes)


def run_peer(models: list[Path], folder: Path) -> float:
    """Seconds of the ten mergekit merges, imports left out; two states at most stay on disk."""
    state, seconds = models[0], 0.0
    for step in range(STEPS):
        other = models[0] if step % 2 else models[1 + (step // 2) % (len(models) - 1)]
        if other == state:
            continue
        recipe, out = folder / "peer.yml", folder / f"peer{step}"
        recipe.write_text(
            yaml.safe_dump(
                {
                    "merge_method": "slerp",
                    "base_model": str(state),
                    "models": [{"model": str(state)}, {"model": str(other)}],
                    "parameters": {"t": RETRACE if step % 2 else DEGRADE},
                    "dtype": "bfloat16",
                }
            )
        )
        seconds += run_mergekit(recipe, out).seconds
        if state != models[0]:
            shutil.rmtree(state)
        state = out
    shutil.rmtree(state)
    return seconds


def planning_and_again(schedule: Path, folder: Path) -> dict[str, float]:
    """Seconds to plan the walk over known Gram matrices, and to make its last state again."""
    from fastmerge.engine.merge import merge_plan
    from fastmerge.retrograde import load, open_space, walk
    from fastmerge.search.space import Space

    read = load(schedule)
    space = open_space(read, cache=folder / "grams.npz")
    plans = []
    for _ in range(5):
        fresh = Space(space.template, space.grams, [0.0] * len(space.names))
        began = time.perf_counter()
        plan = fresh.plan(walk(read, fresh, None, 0).states[-1])
        plans.append(time.perf_counter() - began)
    began = time.perf_counter()
    report = merge_plan(plan, folder / "again")
    again = time.perf_counter() - began
    shutil.rmtree(folder / "again")
    (folder / "grams.npz").unlink()
    return {
        "planning_seconds": min(plans),
        "again_seconds": again,
        "again_bytes_read": report.bytes_read,
        "bytes_of_sources": space.template.bytes_in,
    }


def bench(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs; the ratio is the median of the ratios within a repetition."""
    models = write_set(folder, options.size, 3)
    recipe, schedule = folder / "multislerp.yml", folder / "walk.yml"
    listed = [{"model": str(path), "parameters": {"weight": 0.33}} for path in models]
    text = {"merge_method": "multislerp", "models": listed, "dtype": "bfloat16"}
    recipe.write_text(yaml.safe_dump(text))
    schedule.write_text(schedule_text(models))
    one, walks = [], []
    out, walk_out = folder / "out", folder / "walk"
    for number in range(options.repeat):
        settle(models, [out, walk_out])
        one.append(run_fastmerge(recipe, out))
        settle(models, [out, walk_out])
        walks.append(run_walk(schedule, walk_out))
        print(
            f"{number + 1} of {options.repeat}: one-shot {one[-1].seconds:.2f} s, "
            f"walk {walks[-1].seconds:.2f} s",
            flush=True,
        )
    settle(models, [out, walk_out])
    ratios = [b.seconds / a.seconds for a, b in zip(one, walks, strict=True)]
    return {
        "one_shot_seconds": statistics.median(run.seconds for run in one),
        "walk_seconds": statistics.median(run.seconds for run in walks),
        "walk_times_one_shot": statistics.median(ratios),
        "cpu_times_one_shot": sum(r.cpu_seconds for r in walks) / sum(r.cpu_seconds for r in one),
        "one_shot_anonymous_bytes": max(run.peak_anonymous_bytes for run in one),
        "walk_anonymous_bytes": max(run.peak_anonymous_bytes for run in walks),
        **planning_and_again(schedule, folder),
        **({} if options.skip_mergekit else {"mergekit_seconds": run_peer(models, folder)}),
    }


def markdown(report: dict[str, Any]) -> str:
    """The report for people; bars in brackets."""
    found, mib = report["result"], 2**20
    rows = [
        ("one-shot merge (multislerp), s", f"{found['one_shot_seconds']:.2f}"),
        (f"walk of {STEPS} SLERP steps, s", f"{found['walk_seconds']:.2f}"),
        ("walk / one-shot", f"{found['walk_times_one_shot']:.2f} (≤ 1.2)"),
        ("the same in CPU seconds", f"{found['cpu_times_one_shot']:.2f}"),
        ("one-shot, anonymous MiB", f"{found['one_shot_anonymous_bytes'] / mib:.0f}"),
        ("walk, anonymous MiB", f"{found['walk_anonymous_bytes'] / mib:.0f}"),
        ("planning over known Gram matrices, s", f"{found['planning_seconds']:.3f} (< 0.1)"),
        (
            "an accepted state again",
            (
                f"{found['again_seconds']:.2f} s, "
                f"{found['again_bytes_read'] / found['bytes_of_sources']:.2f} passes"
            ),
        ),
    ]
    if "mergekit_seconds" in found:
        times = found["mergekit_seconds"] / found["walk_seconds"]
        rows.append(
            (f"{STEPS} mergekit merges, s", f"{found['mergekit_seconds']:.1f} ({times:.0f} x)")
        )
    lines = "\n".join(f"| {name} | {value} |" for name, value in rows)
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    return (
        f"# A walk of {STEPS} steps, {report['size']} llama shape, three models\n\n"
        f"| | |\n|---|---:|\n{lines}\n\n"
        f"Medians of {report['repeat']} runs; commit {report['commit']}.\n{about}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=list(SHAPES), default="0.2b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; kept if it is given")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="walk-", dir=HERE))
    try:
        report = {
            "size": options.size,
            "repeat": options.repeat,
            "machine": machine(root),
            "commit": commit(),
            "result": bench(options, root / options.size),
        }
    finally:
        if options.folder is None:
            shutil.rmtree(root, ignore_errors=True)
    path = HERE / "results" / f"walk-{options.size}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

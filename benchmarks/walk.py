"""A ten-step SLERP walk over three models beside a one-shot merge of the same models, and beside
the same walk as ten merges through the disk with mergekit: `fastmerge bench walk`, for results/.

    python benchmarks/walk.py --size 1.1b --repeat 3

The bars: the walk takes at most 1.2 times the one-shot merge and no more anonymous memory;
planning ten steps over known Gram matrices takes less than 0.1 s; making an accepted state again is
one pass.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from record import HERE, commit, save, tell

from fastmerge.bench import recipes
from fastmerge.bench.checkpoints import SHAPES, write_set
from fastmerge.bench.report import markdown
from fastmerge.bench.request import WALKED, Request
from fastmerge.bench.run import run
from fastmerge.compute.cpu import thread_count

STEPS = 10


def planning_and_again(models: list[Path], folder: Path) -> dict[str, float]:
    """Seconds to plan the walk over known Gram matrices, and to make its last state again."""
    from fastmerge.engine.merge import merge_plan
    from fastmerge.retrograde import load, open_space, walk
    from fastmerge.search.space import Space

    schedule = folder / "walk.yml"
    schedule.write_text(json.dumps(recipes.walk(models, STEPS)))
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
    return {
        "planning_seconds": min(plans),
        "again_seconds": again,
        "again_passes": report.bytes_read / space.template.bytes_in,
    }


def page(report: dict[str, Any]) -> str:
    """The report for people; bars in brackets."""
    (row,) = report["jobs"]
    one, mib = row["peers"]["one-shot"], 2**20
    said = [
        f"walk / one-shot: {1 / one['times']['median']:.2f} (≤ 1.2)",
        f"in CPU seconds {report['cpu_times_one_shot']:.2f}",
        f"anonymous MiB {row['peak_anonymous_bytes'] / mib:.0f}",
        f"of the one-shot merge {one['peak_anonymous_bytes'] / mib:.0f}",
        f"planning over known Gram matrices {report['planning_seconds']:.3f} s (< 0.1)",
        f"an accepted state again {report['again_seconds']:.2f} s",
        f"by {report['again_passes']:.2f} passes",
        f"commit {report['commit']}",
    ]
    title = f"A walk of {STEPS} steps, {report['size']} llama shape, three models"
    return f"{markdown(report, title)}\n{', '.join(said)}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=list(SHAPES), default="0.2b")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--folder", type=Path, default=HERE, help="whose disk is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="walk-", dir=options.folder) as name:
        sets = Path(name)
        report = run(
            Request(
                kinds=("walk",), sizes=(options.size,), steps=(STEPS,), repeat=options.repeat,
                against=() if options.skip_mergekit else ("mergekit",), threads=thread_count(),
                folder=options.folder, sets=sets,
            ),
            tell,
        )  # fmt: skip
        models = write_set(sets / options.size, options.size, WALKED)  # which are there already
        report |= planning_and_again(models, sets)
    runs = report["jobs"][0]["runs"]
    ours, one = (sum(run["cpu_seconds"] for run in runs[k]) for k in ("fastmerge", "one-shot"))
    report |= {"size": options.size, "commit": commit(), "cpu_times_one_shot": ours / one}
    text = page(report)
    save(HERE / "results" / f"walk-{options.size}.json", report, text)
    print(text)


if __name__ == "__main__":
    main()

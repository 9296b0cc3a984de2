"""Merges llama-shaped checkpoints with fastmerge, mergekit and the machine's floor, side by side in
one run: `fastmerge bench merge` with the project's own targets, for results/.

    python benchmarks/merge_model.py --size 1.1b --repeat 5
    python benchmarks/merge_model.py --size 1.1b --repeat 5 --cache both --isa avx2

All recipes say ``dtype: bfloat16``, as users' recipes do: for mergekit that means arithmetic in
bf16, for fastmerge fp32 arithmetic and a bf16 result. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from record import HERE, commit, save, tell

from fastmerge import _C
from fastmerge.bench import request as asked
from fastmerge.bench.checkpoints import SHAPES
from fastmerge.bench.report import markdown
from fastmerge.bench.run import run
from fastmerge.compute.cpu import thread_count

# At 1.1 B on two cores: at least so many times faster than mergekit, at most so many times the
# floor.
BARS = {
    "linear": {"times_mergekit": 15, "times_floor": 1.0},
    "slerp": {"times_mergekit": 25, "times_floor": 1.4},
    "ties": {"times_mergekit": 100, "times_floor": 1.6},
    "dare_ties": {"times_mergekit": 40, "times_floor": 1.6},
}
MERGEKIT = 20  # of any other method, where mergekit has it


def start_up(folder: Path, repeat: int) -> dict[str, float]:
    """Seconds of a whole `fastmerge merge` of a model too small to take time: what starting
    costs."""
    report = run(
        asked.Request(
            kinds=("merge",), sizes=("tiny",), methods=("linear",), repeat=repeat, folder=folder,
            caches=("warm",), threads=thread_count(),
        )
    )  # fmt: skip
    (row,) = report["jobs"]
    return {"median": row["seconds"]["median"], "cpu": row["cpu_seconds"]["median"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=list(SHAPES), default="0.2b")
    parser.add_argument("--jobs", default="linear,slerp,ties,dare_ties", type=asked.methods)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--mergekit-repeat", type=int, default=1, help="its TIES takes minutes at 1.1 B"
    )
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument("--cache", choices=(*asked.CACHES, "both"), default="warm")
    parser.add_argument(
        "--isa", choices=_C.isas(), help="no more than it; results/ have a table of their own"
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="holes for weights: for memory, not for time; no floor",
    )
    parser.add_argument("--folder", type=Path, default=HERE, help="whose disk is measured")
    parser.add_argument("--keep", type=Path, help="where the checkpoints are left for the next run")
    parser.add_argument(
        "--json", type=Path, help="where the report goes (default: benchmarks/results/)"
    )
    options = parser.parse_args()
    if options.isa:
        os.environ["FASTMERGE_ISA"] = options.isa  # of the processes that are measured, too
    report = run(
        asked.Request(
            kinds=("merge",), sizes=(options.size,), methods=options.jobs, repeat=options.repeat,
            against=() if options.skip_mergekit else ("mergekit",), sparse=options.sparse,
            peer_repeat=options.mergekit_repeat, threads=thread_count(), folder=options.folder,
            caches=asked.CACHES if options.cache == "both" else (options.cache,),
            sets=options.keep,
        ),
        tell,
    )  # fmt: skip
    for row in report["jobs"]:
        row["bars"] = BARS.get(row["method"], {"times_mergekit": MERGEKIT})
    report |= {
        "size": options.size + (", sparse zeros" if options.sparse else ""),
        "parameters": SHAPES[options.size].parameters,
        "mergekit_repeat": 0 if options.skip_mergekit else options.mergekit_repeat,
        "commit": commit(),
        "start_up_seconds": start_up(options.folder, max(3, options.repeat)),
    }
    kinds = ("sparse" if options.sparse else None, options.isa)
    name = "-".join(["merge_model", options.size, *filter(None, kinds)]) + ".json"
    text = page(report)
    save(options.json or HERE / "results" / name, report, text)
    print(text)


def page(report: dict[str, Any]) -> str:
    """The report for people; a bar stands in brackets behind what it judges."""
    start = report["start_up_seconds"]
    title = f"Whole merges, {report['size']} llama shape ({report['parameters']:,} parameters)"
    return (
        f"{markdown(report, title)}\n"
        f"Start-up (whole merge, 0.1 M parameters): {start['median']:.2f} s, CPU "
        f"{start['cpu']:.2f} s. mergekit ran {report['mergekit_repeat']} times; commit "
        f"{report['commit']}.\n"
    )


if __name__ == "__main__":
    main()

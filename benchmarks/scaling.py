"""How seconds and memory grow with models' size, with their number and with the steps of a walk:
`fastmerge bench` of merges and walks, for results/, with a picture.

    python benchmarks/scaling.py                                  # to 7 B: 56 GB of disk
    python benchmarks/scaling.py --sizes 0.2b,1.1b --repeat 1     # less of it
    python benchmarks/scaling.py --sizes 7b                       # one alone: results/scaling-7b.*

Numbers of models and walks are those of the first size, of at least two. Sizes whose models, with
the output, fill more than half of memory are measured cold alone, and once: in memory they would be
in part.
One size's models are gone before the next one's are made, and what is measured is saved after
each: a run that is ended keeps the sizes before.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import HERE, commit, save, tell

from fastmerge.bench import request as asked
from fastmerge.bench.checkpoints import bytes_of_size
from fastmerge.bench.plots import report_png
from fastmerge.bench.report import markdown
from fastmerge.bench.run import run
from fastmerge.compute.cpu import thread_count

COUNTS = (2, 3, 4, 8, 16)  # 2 and 3 are what linear and TIES are measured with at other sizes
STEPS = (1, 4, 16, 64)
TITLE = "Merges and walks against size, number of models and number of steps"


def request(options: argparse.Namespace, size: str) -> asked.Request:
    """What is measured of one size."""
    first = size == options.sizes[0] and len(options.sizes) > 1
    made = asked.Request(
        kinds=("merge", "walk") if first else ("merge",), sizes=(size,),
        methods=("linear", "ties"), counts=COUNTS if first else (), steps=STEPS,
        threads=thread_count(), folder=options.folder,
        repeat=options.repeat, caches=asked.CACHES,
    )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * (made.most_models + 1) * bytes_of_size(size) > memory:
        made = replace(made, repeat=1, caches=("cold",))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=asked.sizes, default=("0.2b", "1.1b", "3b", "7b"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=HERE, help="whose disk is measured")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    requests = [asked.refuse(request(options, size)) for size in options.sizes]  # before any runs
    name = "scaling" if len(requests) > 1 else f"scaling-{options.sizes[0]}"
    whole: dict[str, Any] = {}
    for own in requests:
        report = run(own, tell)
        if own.repeat < options.repeat:
            report["notes"].append(f"{own.sizes[0]}: one run, cold: more than half of memory")
        if whole:
            whole["jobs"] += report["jobs"]
            whole["notes"] += report["notes"]
        else:
            whole = report | {"commit": commit()}
        text = f"{markdown(whole, TITLE)}\nCommit {whole['commit']}.\n"
        save(options.out / f"{name}.json", whole, text)
        (options.out / f"{name}.png").write_bytes(report_png(whole))
    print(text)


if __name__ == "__main__":
    main()

"""How seconds and memory grow with models' size, with their number and with the steps of a walk:
`fastmerge bench` of merges and walks, for results/, with a picture.

    python benchmarks/scaling.py                                  # to 7 B: 75 GB of disk, an hour
    python benchmarks/scaling.py --sizes 0.2b,1.1b --repeat 1     # less of it

Numbers of models and of steps are those of the first size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import HERE, commit, save, tell

from fastmerge.bench import request as asked
from fastmerge.bench.plots import report_png
from fastmerge.bench.report import markdown
from fastmerge.bench.run import run
from fastmerge.compute.cpu import thread_count

COUNTS = (2, 3, 4, 8, 16)  # 2 and 3 are what linear and TIES are measured with at other sizes
STEPS = (1, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=asked.sizes, default=("0.2b", "1.1b", "3b", "7b"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=HERE, help="whose disk is measured")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    report = run(
        asked.Request(
            kinds=("merge", "walk"), sizes=options.sizes, methods=("linear", "ties"), counts=COUNTS,
            steps=STEPS, repeat=options.repeat, caches=("warm",), threads=thread_count(),
            folder=options.folder,
        ),
        tell,
    )  # fmt: skip
    report["commit"] = commit()
    title = "Merges and walks against size, number of models and number of steps"
    text = f"{markdown(report, title)}\nCommit {report['commit']}.\n"
    save(options.out / "scaling.json", report, text)
    (options.out / "scaling.png").write_bytes(report_png(report))
    print(text)


if __name__ == "__main__":
    main()

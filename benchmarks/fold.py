"""Folds a LoRA into a llama-shaped base with fastmerge, PEFT and the machine's floor, side by side:
`fastmerge bench fold`, for results/.

    python benchmarks/fold.py --size 1.1b --rank 16 --repeat 5

Of PEFT ``merge_and_unload`` and ``save_pretrained`` are timed, without its imports and its loading.
The bars: at most 1.33 times the floor, at least 10 times PEFT's speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import HERE, commit, save, tell

from fastmerge.bench.checkpoints import SHAPES
from fastmerge.bench.report import markdown
from fastmerge.bench.request import Request
from fastmerge.bench.run import run
from fastmerge.compute.cpu import thread_count

BARS = {"times_floor": 1.33, "times_peft": 10}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=list(SHAPES), default="0.2b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--skip-peft", action="store_true")
    parser.add_argument("--folder", type=Path, default=HERE, help="whose disk is measured")
    options = parser.parse_args()
    report = run(
        Request(
            kinds=("fold",), sizes=(options.size,), rank=options.rank, repeat=options.repeat,
            against=() if options.skip_peft else ("peft",), threads=thread_count(),
            folder=options.folder,
        ),
        tell,
    )  # fmt: skip
    for row in report["jobs"]:
        row["bars"] = BARS
    report |= {"size": options.size, "commit": commit()}
    title = f"Folding an adapter, {options.size} llama shape"
    text = f"{markdown(report, title)}\nCommit {report['commit']}.\n"
    save(HERE / "results" / f"fold-{options.size}.json", report, text)
    print(text)


if __name__ == "__main__":
    main()

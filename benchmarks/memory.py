"""Memory of a linear merge of two models against their size, on files of holes.

    python benchmarks/memory.py --record                # 0.2 B to 70 B: 27 GB written in all
    python benchmarks/memory.py --sizes 7b 70b --parts 28

The output of 70 B is 138 GB, which small disks have no room for. So above two weight files (of
5 GB) a merge is run by parts (`--part I/N`, one weight file each), of which only ``--parts`` are
run, spread over the model, and each is removed before the next. A part is a process of its own: its
memory is measured, not extrapolated; of what was not run nothing is said. Holes are read from the
page cache's empty pages: seconds say little, CPU seconds what copying and computing take.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from record import HERE, record

from fastmerge.bench.checkpoints import SHAPES, Shape, write_set
from fastmerge.bench.process import Usage, measure
from fastmerge.search.figures import new_panels, png

SHAPES |= {"13b": Shape(5120, 40, 13824, 40, 40), "70b": Shape(8192, 80, 28672, 64, 8)}  # Llama 2
FILE_BYTES = 5_000_000_000
HEAD = (
    "| parameters, B | weight files, run of all | GB read and written | seconds | "
    "CPU seconds a GB | peak anonymous MiB | peak RSS MiB |"
)


def chosen(files: int, parts: int) -> list[int]:
    """So many of the parts 1 to ``files``, the first and the last among them."""
    if parts >= files:
        return list(range(1, files + 1))
    return [1 + round(step * (files - 1) / max(1, parts - 1)) for step in range(parts)]


def merged(folder: Path, recipe: Path, part: str | None) -> tuple[Usage, int]:
    """One process, and the bytes that it moved; what it wrote is removed."""
    out = folder / "out"
    words = [sys.executable, "-m", "fastmerge", "merge", recipe, out, "--json"]
    try:
        usage = measure([*words, *(["--part", part] if part else [])], folder=folder)
    finally:
        for left in folder.glob("*out*"):
            shutil.rmtree(left)
    report = json.loads(usage.stdout)
    return usage, report["bytes_read"] + report["bytes_written"]


def row_of(size: str, parts: int, folder: Path) -> list[float | str]:
    models = write_set(folder, size, 2, sparse=True)
    recipe = folder / "recipe.json"
    listed = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    said = {"merge_method": "linear", "dtype": "bfloat16", "models": listed}
    recipe.write_text(json.dumps(said))
    files = -(-2 * SHAPES[size].parameters // FILE_BYTES)
    run = chosen(files, parts) if files > 2 else [0]
    found = [merged(folder, recipe, f"{number}/{files}" if number else None) for number in run]
    for model in models:
        shutil.rmtree(model)
    moved = sum(nbytes for _, nbytes in found)
    return [
        round(SHAPES[size].parameters / 1e9, 1),
        f"{len(run) if run[0] else files} of {files}",
        round(moved / 1e9, 1),
        round(sum(usage.seconds for usage, _ in found), 1),
        round(sum(usage.cpu_seconds for usage, _ in found) / (moved / 1e9), 3),
        max(usage.peak_anonymous_bytes for usage, _ in found) >> 20,
        max(usage.peak_rss_bytes for usage, _ in found) >> 20,
    ]


def picture(rows: list[list[float | str]]) -> bytes:
    """Memory against size."""
    figure, panels = new_panels(7.0, [3.2])
    (axes,) = panels
    sizes = [float(row[0]) for row in rows]
    axes.plot(sizes, [float(row[5]) for row in rows], "o-", label="anonymous memory")
    axes.plot(sizes, [float(row[6]) for row in rows], "o--", label="with mapped pages of files")
    axes.set_xscale("log")
    axes.set_ylim(0)
    axes.set_xlabel("parameters, billions")
    axes.set_ylabel("peak, MiB")
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = ["0.2b", "1.1b", "7b", "13b", "70b"]
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=known)
    parser.add_argument("--parts", type=int, default=2, help="that are run of a large merge")
    parser.add_argument("--folder", type=Path, help="whose disk is used")
    parser.add_argument("--record", action="store_true", help="into results/memory.*")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="memory-", dir=options.folder) as made:
        for size in options.sizes:
            rows.append(row_of(size, options.parts, Path(made)))
            print(size, *rows[-1], flush=True)
    if options.record:
        record(
            "memory", "Memory of a merge against the models' size", HEAD, rows,
            {"merge": "linear of two, bf16, holes for weights", "parts run": options.parts},
        )  # fmt: skip
        (HERE / "results" / "memory.png").write_bytes(picture(rows))


if __name__ == "__main__":
    main()

"""Memory, bytes and seconds of a linear merge, on files of holes, against the models' size, the
number of models and the number of parts.

    python benchmarks/memory.py --record                # 40 GB written in all
    python benchmarks/memory.py --against size --sizes 7b 70b --parts 28

The output of 70 B is 138 GB, which small disks have no room for. So above two weight files (of
5 GB) a merge is run by parts (`--part I/N`, one weight file each), of which only ``--parts`` are
run, spread over the model, and each is removed before the next. A part is a process of its own: its
memory is measured, not extrapolated; of what was not run nothing is said. Holes are read from the
page cache's empty pages: seconds say little, CPU seconds what copying and computing take.

Models: of 0.2 B each. Parts: of two models of 1.1 B in files of 100 MB, one after another, and
`finish`; 1 is a merge without parts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import HERE, record

from fastmerge.bench.checkpoints import SHAPES, Shape, write_set
from fastmerge.bench.process import Usage, measure
from fastmerge.search.figures import new_panels, png

SHAPES |= {"13b": Shape(5120, 40, 13824, 40, 40), "70b": Shape(8192, 80, 28672, 64, 8)}  # Llama 2
FILE_BYTES = 5_000_000_000
_USED = "GB read and written | seconds | CPU seconds a GB | peak anonymous MiB | peak RSS MiB |"
HEADS = {
    "size": f"| parameters, B | weight files, run of all | {_USED}",
    "models": f"| models | {_USED}",
    "parts": f"| parts | {_USED}",
}
TITLES = {
    "size": "Memory of a merge against the models' size",
    "models": "Memory of a merge against the number of models",
    "parts": "Memory of a merge against the number of parts",
}
NAMES = {"size": "memory", "models": "memory-models", "parts": "memory-parts"}
MODELS, OF_MODELS = (2, 4, 8, 16), "0.2b"
PARTS, OF_PARTS, PART_FILES = (1, 2, 4, 8, 16), "1.1b", "100MB"
Row = list[float | str]


def chosen(files: int, parts: int) -> list[int]:
    """So many of the parts 1 to ``files``, the first and the last among them."""
    if parts >= files:
        return list(range(1, files + 1))
    return [1 + round(step * (files - 1) / max(1, parts - 1)) for step in range(parts)]


def recipe_of(folder: Path, size: str, count: int) -> tuple[list[Path], Path]:
    """Models of holes, and their mean."""
    models = write_set(folder / size, size, count, sparse=True)
    recipe = folder / "recipe.json"
    listed = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    recipe.write_text(json.dumps({"merge_method": "linear", "dtype": "bfloat16", "models": listed}))
    return models, recipe


def ran(folder: Path, *words: str | Path) -> tuple[Usage, int]:
    """One process, and the bytes that it moved."""
    usage = measure([sys.executable, "-m", "fastmerge", *words, "--json"], folder=folder)
    report = json.loads(usage.stdout)
    joins = words[0] == "finish"
    return usage, 0 if joins else report["bytes_read"] + report["bytes_written"]


def removed(folder: Path) -> None:
    for left in folder.glob("*out*"):
        shutil.rmtree(left)


def used(found: list[tuple[Usage, int]]) -> Row:
    """The last columns: of all these processes together, their memory of the largest."""
    moved = sum(nbytes for _, nbytes in found)
    return [
        round(moved / 1e9, 1),
        round(sum(usage.seconds for usage, _ in found), 1),
        round(sum(usage.cpu_seconds for usage, _ in found) / (moved / 1e9), 3),
        max(usage.peak_anonymous_bytes for usage, _ in found) >> 20,
        max(usage.peak_rss_bytes for usage, _ in found) >> 20,
    ]


def of_size(size: str, parts: int, folder: Path) -> Row:
    models, recipe = recipe_of(folder, size, 2)
    files = -(-2 * SHAPES[size].parameters // FILE_BYTES)
    run = chosen(files, parts) if files > 2 else [0]
    found = []
    for number in run:
        part = ["--part", f"{number}/{files}"] if number else []
        found.append(ran(folder, "merge", recipe, "out", *part))
        removed(folder)
    for model in models:
        shutil.rmtree(model)
    many = f"{len(run) if run[0] else files} of {files}"
    return [round(SHAPES[size].parameters / 1e9, 1), many, *used(found)]


def of_models(count: int, folder: Path) -> Row:
    _, recipe = recipe_of(folder, OF_MODELS, count)
    found = ran(folder, "merge", recipe, "out")
    removed(folder)
    return [count, *used([found])]


def of_parts(count: int, folder: Path) -> Row:
    _, recipe = recipe_of(folder, OF_PARTS, 2)
    merge = ["merge", recipe, "out", "--max-shard-size", PART_FILES]
    if count == 1:
        found = [ran(folder, *merge)]
    else:
        parts = [f"{number}/{count}" for number in range(1, count + 1)]
        found = [ran(folder, *merge, "--part", part) for part in parts]
        found.append(ran(folder, "finish", "out"))
    removed(folder)
    return [count, *used(found)]


def picture(tables: dict[str, list[Row]]) -> bytes:
    """Memory, and to the right bytes and CPU seconds, one panel for each table."""
    figure, panels = new_panels(7.0, [3.0] * len(tables))
    labels = {
        "size": "parameters, billions", "models": f"models of {OF_MODELS.upper()}",
        "parts": f"parts of a merge of two models of {OF_PARTS.upper()}",
    }  # fmt: skip
    for axes, (name, rows) in zip(panels, tables.items(), strict=True):
        x = [float(row[0]) for row in rows]
        moved, _, a_gb, anonymous, resident = (
            [float(v) for v in c] for c in list(zip(*rows, strict=True))[-5:]
        )
        axes.plot(x, anonymous, "o-", label="anonymous memory")
        axes.plot(x, resident, "o--", label="with mapped pages of files")
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.minorticks_off()
        axes.set_ylim(0)
        axes.set_xlabel(labels[name])
        axes.set_ylabel("peak, MiB")
        right = axes.twinx()
        right.plot(x, moved, "s:", color="grey", label="GB read and written")
        seconds = [each * gb for each, gb in zip(a_gb, moved, strict=True)]
        right.plot(x, seconds, "^:", color="black", label="CPU seconds")
        right.set_ylim(0)
        right.spines[["top"]].set_visible(False)
        right.set_ylabel("GB, CPU seconds")
        lines = [*axes.get_lines(), *right.get_lines()]
        axes.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=8)
    return png(figure)


def known() -> dict[str, list[Row]]:
    """The tables that are recorded."""
    found = {}
    for name, file in NAMES.items():
        path = HERE / "results" / f"{file}.json"
        if path.exists():
            found[name] = json.loads(path.read_text())["result"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    sizes = ["0.2b", "1.1b", "7b", "13b", "70b"]
    parser.add_argument("--against", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=sizes)
    parser.add_argument("--parts", type=int, default=2, help="that are run of a large merge")
    parser.add_argument("--folder", type=Path, help="whose disk is used")
    parser.add_argument("--record", action="store_true", help="into results/memory*")
    options = parser.parse_args()
    about: dict[str, dict[str, Any]] = {
        "size": {"merge": "linear of two, bf16, holes for weights", "parts run": options.parts},
        "models": {"merge": f"linear, bf16, {OF_MODELS} each, holes for weights"},
        "parts": {
            "merge": f"linear of two, bf16, {OF_PARTS}, holes for weights, files of {PART_FILES}"
        },
    }
    with tempfile.TemporaryDirectory(prefix="memory-", dir=options.folder) as made:
        folder = Path(made)
        runs: dict[str, list[Any]] = {
            "size": [lambda size=s: of_size(size, options.parts, folder) for s in options.sizes],
            "models": [lambda count=c: of_models(count, folder) for c in MODELS],
            "parts": [lambda count=c: of_parts(count, folder) for c in PARTS],
        }
        for name in options.against:
            rows = []
            for run in runs[name]:
                rows.append(run())
                print(name, *rows[-1], flush=True)
            if options.record:
                record(NAMES[name], TITLES[name], HEADS[name], rows, about[name])
    if options.record:
        (HERE / "results" / "memory.png").write_bytes(picture(known()))


if __name__ == "__main__":
    main()

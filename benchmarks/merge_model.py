"""Merges llama-shaped checkpoints with fastmerge, mergekit and the machine's floor, side by side in
one run.

    python benchmarks/merge_model.py --size 1.1b --repeat 5

Each repetition runs floor, fastmerge and mergekit one after another on warm inputs, so that a noisy
neighbour hits all three. fastmerge is timed as a whole process, from start to exit; of mergekit's
process the imports (torch, transformers: seconds) are left out. All recipes say ``dtype:
bfloat16``, as users' recipes do: for mergekit that means arithmetic in bf16, for fastmerge fp32
arithmetic and a bf16 result. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from checkpoints import SHAPES, write_set
from process import machine, measure

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Job:
    """One recipe; ``models`` counts the base. The bars are the project's own targets at 1.1 B on
    two cores."""

    method: str
    models: int
    parameters: dict[str, Any]
    per_model: dict[str, Any]
    bar_mergekit: float | None = None  # at least so many times faster than mergekit
    bar_floor: float | None = None  # at most so many times the floor

    @property
    def title(self) -> str:
        density = f", density {self.per_model['density']}" if "density" in self.per_model else ""
        return f"{self.method}, {self.models} models{density}"

    def recipe(self, models: list[Path]) -> str:
        base, *tunes = (str(path) for path in models[: self.models])
        needs_base = self.method not in ("linear", "multislerp")
        listed = [base, *tunes] if self.method in ("linear", "slerp", "multislerp") else tunes
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "models": [
                {"model": path, **({"parameters": dict(self.per_model)} if self.per_model else {})}
                for path in listed
            ],
            "dtype": "bfloat16",
        }
        if needs_base:
            recipe["base_model"] = base
        if self.parameters:
            recipe["parameters"] = self.parameters
        return yaml.safe_dump(recipe, sort_keys=False)


SPARSE = {"weight": 0.5, "density": 0.5}
JOBS = {
    "linear": Job("linear", 2, {}, {"weight": 0.5}, 15, 1.0),
    "slerp": Job("slerp", 2, {"t": 0.4}, {}, 25, 1.4),
    "ties": Job("ties", 3, {}, SPARSE, 100, 1.6),
    "dare_ties": Job("dare_ties", 3, {}, SPARSE, 40, 1.6),
    "multislerp": Job("multislerp", 3, {}, {"weight": 0.33}),
    "breadcrumbs": Job("breadcrumbs", 3, {}, {**SPARSE, "gamma": 0.01}, 20),
    "breadcrumbs_ties": Job("breadcrumbs_ties", 3, {}, {**SPARSE, "gamma": 0.01}, 20),
    "della": Job("della", 3, {}, {**SPARSE, "epsilon": 0.1}, 20),
    "della_linear": Job("della_linear", 3, {}, {**SPARSE, "epsilon": 0.1}, 20),
    "sce": Job("sce", 3, {"select_topk": 0.3}, {}, 20),
    "ram": Job("ram", 3, {}, {}, 20),
    "ramplus_tl": Job("ramplus_tl", 3, {}, {}, 20),
    "nearswap": Job("nearswap", 2, {"t": 0.001}, {}, 20),
    "arcee_fusion": Job("arcee_fusion", 2, {}, {}, 20),
}
DEFAULT_JOBS = "linear,slerp,ties,dare_ties"


def files_of(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


def bytes_of(model: Path) -> int:
    return sum(path.stat().st_size for path in files_of(model))


def settle(inputs: list[Path], outputs: list[Path]) -> None:
    """Inputs into the page cache; old outputs gone and nothing left to be written back by an
    earlier run."""
    leftovers = [left for path in outputs for left in path.parent.glob(f".{path.name}.*")]
    for path in (*outputs, *leftovers):  # leftovers: an interrupted merge would be continued
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    os.sync()
    for model in inputs:
        for path in files_of(model):
            with open(path, "rb", buffering=0) as stream:
                while stream.read(1 << 22):
                    pass


@dataclass(frozen=True)
class Run:
    """One timed run of one tool."""

    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int = 0
    peak_anonymous_bytes: int = 0
    detail: Any = None


def run_floor(inputs: list[Path], out: Path) -> Run:
    paths = [path for model in inputs for path in files_of(model)]
    usage = measure([sys.executable, HERE / "floor.py", out, str(bytes_of(inputs[0])), *paths])
    detail = json.loads(usage.stdout)
    return Run(detail["seconds"], usage.cpu_seconds, detail=detail)


def run_fastmerge(recipe: Path, out: Path) -> Run:
    command = Path(sys.executable).with_name("fastmerge")
    usage = measure([command, "merge", recipe, out, "--fresh", "--quiet"])
    return Run(usage.seconds, usage.cpu_seconds, usage.peak_rss_bytes, usage.peak_anonymous_bytes)


def run_mergekit(recipe: Path, out: Path) -> Run:
    usage = measure([sys.executable, HERE / "peer_mergekit.py", recipe, out])
    detail = json.loads(usage.stdout.splitlines()[-1])
    return Run(
        detail["merge"],
        usage.cpu_seconds,
        usage.peak_rss_bytes,
        usage.peak_anonymous_bytes,
        detail,
    )


def run_job(job: Job, models: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    inputs = models[: job.models]
    folder = models[0].parent
    recipe = folder / f"{job.method}.yml"
    recipe.write_text(job.recipe(models))
    out, floor_out = folder / "out", folder / "floor.bin"
    runs: dict[str, list[Run]] = {"floor": [], "fastmerge": [], "mergekit": []}
    for repetition in range(options.repeat):
        if not options.sparse:  # holes read at no speed that means anything
            settle(inputs, [out, floor_out])
            runs["floor"].append(run_floor(inputs, floor_out))
        settle([] if options.sparse else inputs, [out, floor_out])
        runs["fastmerge"].append(run_fastmerge(recipe, out))
        if repetition < options.mergekit_repeat:
            settle(inputs, [out, floor_out])
            runs["mergekit"].append(run_mergekit(recipe, out))
        said = {tool: f"{done[-1].seconds:.2f} s" for tool, done in runs.items() if done}
        print(f"{job.title}, {repetition + 1} of {options.repeat}: {said}", flush=True)
    settle([], [out, floor_out])
    moved = sum(map(bytes_of, inputs)) + bytes_of(inputs[0])
    return {
        "job": job.title,
        "bytes": moved,
        "bars": {"times_mergekit": job.bar_mergekit, "times_floor": job.bar_floor},
        "runs": {tool: [run.__dict__ for run in done] for tool, done in runs.items()},
        **summary(runs, moved),
    }


def summary(runs: dict[str, list[Run]], moved: int) -> dict[str, Any]:
    """Medians. A ratio to the floor is the median over repetitions of the ratio within one
    repetition."""
    ours, floor, peer = runs["fastmerge"], runs["floor"], runs["mergekit"]
    seconds = statistics.median(run.seconds for run in ours)
    result: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": statistics.median(run.cpu_seconds for run in ours),
        "gigabytes_per_second": moved / seconds / 1e9,
        "peak_rss_bytes": max(run.peak_rss_bytes for run in ours),
        "peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in ours),
    }
    if floor:
        ratios = [a.seconds / b.seconds for a, b in zip(ours, floor, strict=True)]
        result |= {
            "floor_seconds": statistics.median(run.seconds for run in floor),
            "times_floor": statistics.median(ratios),
        }
    if peer:
        peer_seconds = statistics.median(run.seconds for run in peer)
        result |= {
            "mergekit_seconds": peer_seconds,
            "times_mergekit": peer_seconds / seconds,
            "mergekit_peak_rss_bytes": max(run.peak_rss_bytes for run in peer),
            "mergekit_peak_anonymous_bytes": max(run.peak_anonymous_bytes for run in peer),
        }
    return result


def start_up(folder: Path, repeat: int) -> dict[str, float]:
    """Seconds of a whole `fastmerge merge` of a model too small to take time: what starting
    costs."""
    models = write_set(folder / "tiny", "tiny", 2)
    recipe = folder / "tiny" / "linear.yml"
    recipe.write_text(JOBS["linear"].recipe(models))
    out = folder / "tiny" / "out"
    runs = []
    for _ in range(repeat):
        settle(models, [out])
        runs.append(run_fastmerge(recipe, out))
    return {
        "median": statistics.median(run.seconds for run in runs),
        "cpu": statistics.median(run.cpu_seconds for run in runs),
    }


MIB = 2**20
# heading, key of the job's summary, format, unit, and the bar's key and sense
COLUMNS = (
    ("fastmerge s", "seconds", ".2f", 1, None, ""),
    ("its CPU s", "cpu_seconds", ".2f", 1, None, ""),
    ("GB/s", "gigabytes_per_second", ".1f", 1, None, ""),
    ("floor s", "floor_seconds", ".2f", 1, None, ""),
    ("x floor", "times_floor", ".2f", 1, "times_floor", "≤"),
    ("mergekit s", "mergekit_seconds", ".1f", 1, None, ""),
    ("x faster than mergekit", "times_mergekit", ".0f", 1, "times_mergekit", "≥"),
    ("peak anonymous MiB", "peak_anonymous_bytes", ".0f", MIB, None, ""),
    ("peak RSS MiB", "peak_rss_bytes", ".0f", MIB, None, ""),
    ("mergekit's anonymous MiB", "mergekit_peak_anonymous_bytes", ".0f", MIB, None, ""),
)


def markdown(report: dict[str, Any]) -> str:
    """The report as a table for people; a bar stands in brackets behind what it judges."""
    columns = [column for column in COLUMNS if any(column[1] in row for row in report["jobs"])]
    if "sparse" in report["size"]:  # holes are read at no speed that means anything
        columns = [column for column in columns if column[3] == MIB]
    table = [["job", *(column[0] for column in columns)], ["---"] * (1 + len(columns))]
    for row in report["jobs"]:
        cells = [row["job"]]
        for _, key, form, unit, bar_key, sense in columns:
            bar = row["bars"][bar_key] if bar_key else None
            value = format(row[key] / unit, form) if key in row else "-"
            cells.append(value if bar is None else f"{value} ({sense} {bar:g})")
        table.append(cells)
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    start = report["start_up_seconds"]
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    return f"""# Whole merges, {report["size"]} llama shape ({report["parameters"]:,} parameters)

{rows}

Start-up (whole merge, 0.1 M parameters): {start["median"]:.2f} s, CPU {start["cpu"]:.2f} s.
Medians of {report["repeat"]} runs, mergekit {report["mergekit_repeat"]}; commit {report["commit"]}.
{about}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--size", choices=[name for name in SHAPES if name != "tiny"], default="0.2b"
    )
    parser.add_argument(
        "--jobs", default=DEFAULT_JOBS, help=f"comma-separated, of {', '.join(JOBS)}"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--mergekit-repeat", type=int, default=1, help="its TIES takes minutes at 1.1 B"
    )
    parser.add_argument("--skip-mergekit", action="store_true")
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="holes for weights: for memory, not for time; no floor",
    )
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoints go (default: a temporary folder here)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave the checkpoints for the next run"
    )
    parser.add_argument(
        "--json", type=Path, help="where the report goes (default: benchmarks/results/)"
    )
    options = parser.parse_args()
    unknown = [name for name in options.jobs.split(",") if name not in JOBS]
    if unknown:
        parser.error(f"unknown job {unknown[0]}; known are {', '.join(JOBS)}")
    if options.skip_mergekit:
        options.mergekit_repeat = 0
    # With bytecode, as after an installation: to compile every module takes as long as to run it.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    jobs = [JOBS[name] for name in options.jobs.split(",")]
    root = options.folder or Path(tempfile.mkdtemp(prefix="merge_model-", dir=HERE))
    folder = root / options.size
    try:
        models = write_set(
            folder, options.size, max(job.models for job in jobs), sparse=options.sparse
        )
        report: dict[str, Any] = {
            "size": options.size + (", sparse zeros" if options.sparse else ""),
            "parameters": SHAPES[options.size].parameters,
            "repeat": options.repeat,
            "mergekit_repeat": options.mergekit_repeat,
            "machine": machine(root),
            "commit": commit(),
            "start_up_seconds": start_up(root, max(3, options.repeat)),
            "jobs": [run_job(job, models, options) for job in jobs],
        }
    finally:
        if not options.keep:  # only what this script made: --folder may hold other things
            for path in (folder, root / "tiny", *([] if options.folder else [root])):
                shutil.rmtree(path, ignore_errors=True)
    name = f"merge_model-{options.size}{'-sparse' if options.sparse else ''}.json"
    path = options.json or HERE / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


def commit() -> str:
    """The commit measured, with a plus sign when the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()

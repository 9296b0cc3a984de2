"""How long fastmerge takes to start, beside ``python -c "import numpy"``.

    python benchmarks/startup.py --pairs 25

Every line is a whole process, from start to exit, on warm files. In each round all of them run in
turn, NumPy first; a figure is the median over the rounds of its time divided by NumPy's in the same
round, so that a busy machine, which slows both, does not count. CPU time is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from record import HERE, commit

from fastmerge.bench.checkpoints import write_set
from fastmerge.bench.machine import machine
from fastmerge.bench.process import measure

UNIT = 'python -c "import numpy"'


@dataclass(frozen=True)
class Start:
    """One process to time; ``goal`` is in times the unit, None where there is none."""

    name: str
    command: Sequence[str]
    goal: float | None = None


def starts(recipe: Path, out: Path) -> list[Start]:
    """Everything that is timed, the unit first."""

    def code(text: str, goal: float | None = None) -> Start:
        return Start(f'python -c "{text}"', [sys.executable, "-c", text], goal)

    def run(goal: float, *words: str | Path) -> Start:
        command = [sys.executable, "-m", "fastmerge", *map(str, words)]
        return Start(f"fastmerge {words[0]}", command, goal)

    return [
        Start(UNIT, [sys.executable, "-c", "import numpy"]),
        code("pass"),
        code("import fastmerge", 0.4),
        code("import fastmerge.api", 2.0),
        run(1.2, "--version"),
        run(2.3, "plan", recipe),
        run(2.3, "merge", recipe, out, "--overwrite", "--quiet"),
    ]


def seconds(command: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one process; raises where it fails."""
    used = measure(command)
    return used.seconds, used.cpu_seconds


def bench(pairs: int, folder: Path) -> dict[str, dict[str, float | None]]:
    """For each start: median milliseconds, median ratios to the unit (wall and CPU), the goal."""
    models = write_set(folder, "tiny", 2)
    recipe = folder / "slerp.yml"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {models[0]}\nparameters: {{t: 0.3}}\n"
        f"models:\n  - model: {models[0]}\n  - model: {models[1]}\n"
    )
    timed = starts(recipe, folder / "out")
    for start in timed:  # bytecode is written and files are read
        seconds(start.command)
    rounds = [[seconds(start.command) for start in timed] for _ in range(pairs)]
    return {
        start.name: {
            "milliseconds": statistics.median(1e3 * row[i][0] for row in rounds),
            "ratio": statistics.median(row[i][0] / row[0][0] for row in rounds),
            "cpu_ratio": statistics.median(row[i][1] / row[0][1] for row in rounds),
            "goal": start.goal,
        }
        for i, start in enumerate(timed)
    }


def markdown(report: dict) -> str:
    """The report for people."""
    goals = {n: "" if f["goal"] is None else f"≤ {f['goal']}" for n, f in report["result"].items()}
    rows = [
        f"| `{name}` | {found['milliseconds']:.0f} | {found['ratio']:.2f} | "
        f"{found['cpu_ratio']:.2f} | {goals[name]} |"
        for name, found in report["result"].items()
    ]
    about = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    return "\n".join(
        [
            "# Start-up",
            "",
            f"| whole process | ms | x `{UNIT}` | the same in CPU time | goal |",
            "|---|---:|---:|---:|---:|",
            *rows,
            "",
            f"Medians of {report['pairs']} rounds; commit {report['commit']}.",
            f"{about}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        report = {
            "pairs": options.pairs,
            "machine": machine(Path(name)),
            "commit": commit(),
            "result": bench(options.pairs, Path(name)),
        }
    if not options.no_save:
        path = HERE / "results" / "startup.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

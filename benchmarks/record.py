"""Writes a run's figures to results/: NAME.json with everything, NAME.md with a table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmerge.bench.machine import machine
from fastmerge.bench.report import as_json

HERE = Path(__file__).resolve().parent


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


def tell(text: str) -> None:
    """What is going on."""
    print(text, file=sys.stderr, flush=True)


def save(path: Path, report: dict[str, Any], text: str) -> None:
    """A report of `fastmerge.bench` and its page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(report))
    path.with_suffix(".md").write_text(text)


def record(
    name: str, title: str, head: str, rows: Sequence[Sequence[object]], about: Mapping[str, Any]
) -> None:
    """``head`` is the table's first line; ``about`` are the facts of the run."""
    report = {**about, "machine": machine(HERE), "commit": commit(), "result": rows}
    lines = [f"# {title}", "", head, "|---" + "|---:" * (head.count("|") - 2) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    said = [", ".join(f"{key} {value}" for key, value in facts.items())
            for facts in (about | {"commit": report["commit"]}, report["machine"])]  # fmt: skip
    path = HERE / "results" / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join([*lines, "", *(f"{text}." for text in said), ""]))

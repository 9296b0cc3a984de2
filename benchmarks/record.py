"""Writes a run's figures to results/: NAME.json with everything, NAME.md with a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_model import HERE, commit
from process import machine


def record(
    name: str, title: str, head: str, rows: Sequence[Sequence[object]], about: Mapping[str, Any]
) -> None:
    """``head`` is the table's first line; ``about`` are the facts of the run."""
    report = {**about, "machine": machine(Path(HERE)), "commit": commit(), "result": rows}
    lines = [f"# {title}", "", head, "|---" + "|---:" * (head.count("|") - 2) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    said = [", ".join(f"{key} {value}" for key, value in facts.items())
            for facts in (about | {"commit": report["commit"]}, report["machine"])]  # fmt: skip
    path = HERE / "results" / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join([*lines, "", *(f"{text}." for text in said), ""]))

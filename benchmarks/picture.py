"""Draws docs/speed.svg, the README's picture, from the committed results of merge_model.py.

    python benchmarks/picture.py        # after a new results/merge_model-1.1b.json

Seconds on one linear scale; text and bars are readable on light and on dark pages.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "merge_model-1.1b.json"
PICTURE = HERE.parent / "docs" / "speed.svg"

WIDTH, LEFT, RIGHT, BAR, GAP, TOP = 760, 150, 130, 14, 16, 44  # pixels
WHOSE = (("fastmerge", "#2f7ed8"), ("floor", "#9aa4ae"), ("mergekit", "#e08a2e"))
NAMES = {"slerp": "SLERP", "ties": "TIES", "dare_ties": "DARE-TIES"}


def seconds(job: dict[str, Any], whose: str) -> float:
    """The median of a job's runs."""
    return statistics.median(run["seconds"] for run in job["runs"][whose])


def drawn(results: dict[str, Any]) -> str:
    """The picture as SVG."""
    jobs = results["jobs"]
    most = max(seconds(job, whose) for job in jobs for whose, _ in WHOSE)
    scale = (WIDTH - LEFT - RIGHT) / most
    versions = results["machine"]
    labels = {
        "fastmerge": "fastmerge",
        "floor": "one read and one write of the bytes",
        "mergekit": f"mergekit {versions['mergekit']}",
    }
    height = TOP + len(jobs) * (3 * BAR + GAP) + 22
    lines = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="system-ui, sans-serif" font-size="12" fill="#7a828a" role="img">'
        ),
        f"<title>Seconds for a merge of {results['size'].upper()} models</title>",
    ]
    x = LEFT
    for whose, colour in WHOSE:
        lines.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="20">{escape(labels[whose])}</text>')
        x += 45 + 7 * len(labels[whose])
    y = TOP
    for job in jobs:
        name, _, models = job["job"].partition(",")
        models = models.split(",")[0].strip()
        lines.append(
            f'<text x="{LEFT - 10}" y="{y + 18}" text-anchor="end" font-weight="600" '
            f'font-size="13">{escape(NAMES.get(name, name))}</text>'
            f'<text x="{LEFT - 10}" y="{y + 34}" text-anchor="end">{escape(models)}</text>'
        )
        own = seconds(job, "fastmerge")
        for row, (whose, colour) in enumerate(WHOSE):
            took = seconds(job, whose)
            bar, top = max(took * scale, 1.0), y + row * BAR
            text = f"{took:.3g} s"
            if whose == "mergekit":
                text += f", {took / own:.0f} times fastmerge"
            at, anchor = LEFT + bar + 6, "start"
            if at + 6.5 * len(text) > WIDTH:
                at, anchor = LEFT + bar - 6, "end"
            fill = ' fill="#ffffff"' if anchor == "end" else ""
            lines.append(
                f'<rect x="{LEFT}" y="{top}" width="{bar:.1f}" height="{BAR - 2}" '
                f'fill="{colour}"/><text x="{at:.1f}" y="{top + 10}" '
                f'text-anchor="{anchor}"{fill}>{text}</text>'
            )
        y += 3 * BAR + GAP
    said = (
        f"{results['size'].upper()} parameters, bf16, warm files, {versions['cores']} cores, "
        f"whole processes, medians of {results['repeat']} (mergekit: {results['mergekit_repeat']})"
    )
    lines.append(f'<text x="{LEFT}" y="{y + 8}">{escape(said)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(drawn(json.loads(RESULTS.read_text())))

"""A run's reports show names as text: no markup, no image of another host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.test_retrograde_run import invoke

NAME = "![x](http://evil.example/x.png) **b** [y](http://evil.example)"


def test_names_in_a_report_are_text(zoo: Any, tmp_path: Path) -> None:
    zoo.tune(zoo.base("m0"), "m1", seed=1, size=0.05)
    (tmp_path / "walk.yml").write_text(
        f"baseline: ./m0\npool: [{{model: ./m1, name: '{NAME}'}}]\nschedule:\n  cycles: 2\n"
        "  degrade: {partner: next, method: slerp, t: 0.35}\n"
        "  retrace: {toward: baseline, method: slerp, t: 0.6}\n"
        "# ```\n# ![z](http://evil.example/z.png)\n"
    )
    out = tmp_path / "out"
    done = invoke("retrograde", str(tmp_path / "walk.yml"), str(out), "--no-evaluate")
    assert done.exit_code == 0, done.output
    page = (out / "report.html").read_text()
    assert "default-src 'none'" in page
    assert '<img src="http' not in page and "<a href" not in page and "<strong>b" not in page
    assert NAME in page  # as it is written, in the tables
    for report in (out / "report.md", out / "model" / "README.md"):
        tables = [
            line for line in report.read_text().splitlines() if "evil" in line and "|" in line
        ]
        assert tables
        assert not [line for line in tables if "![" in line or "**b**" in line]

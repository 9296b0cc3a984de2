"""`benchmarks/kills.py`, some kills of each kind: nothing is lost, nothing half-written is seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "kills.py"
KILLS = os.environ.get("FASTMERGE_KILLS", "2")


@pytest.mark.parametrize("kind", ["merge", "part", "finish", "walk"])
def test_nothing_is_lost_or_half_written(kind: str) -> None:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", kind, "--kills", KILLS],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1].startswith(f"{KILLS} kills, nothing lost")

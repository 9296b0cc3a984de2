"""docs/callers.md: every example of it runs, one after another as a reader would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "callers.md"


def test_every_example_runs():
    torch, _ = pytest.importorskip("torch"), pytest.importorskip("peft")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    zeros = torch.zeros_like(names["base"])
    plain = names["ops"].ties(zeros, names["deltas"], [0.6, 0.4], density=0.5)
    assert torch.equal(names["delta"], plain)
    assert torch.equal(names["state"]["w"], names["merged"])
    assert (names["pruned"] != 0).sum() == int(0.1 * 64 * 64)

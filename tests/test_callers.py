"""docs/callers.md: every example of it runs, one after another as a reader would."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from fastmerge.integrations import mergekit

PAGE = Path(__file__).parent.parent / "docs" / "callers.md"


def test_every_example_runs():
    torch = pytest.importorskip("torch")
    for package in ("peft", "mergekit"):
        pytest.importorskip(package)
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
    assert "c" in names["model"].peft_config
    assert torch.allclose(names["mean"], (names["a"] + names["b"]) / 2)


class Trainer:
    """What the example for TRL asks of one."""

    def add_callback(self, callback: object) -> None:
        self.callback = callback

    def train(self) -> None:
        module = sys.modules[type(self.callback).__module__]
        assert module.run_merge is mergekit.run_merge


@pytest.mark.parametrize(
    "title, package",
    [
        ("with_trl.py", "trl.experimental.merge_model_callback"),
        ("with_fusion_bench.py", "fusion_bench"),
        ("with_sd_mecha.py", "sd_mecha"),
    ],
)
def test_the_example_for_a_package_runs_with_it(title: str, package: str) -> None:
    found = re.search(rf'(?ms)^```python title="{title}"\n(.*?)^```', PAGE.read_text())
    assert found is not None
    code = compile(found[1], title, "exec")
    pytest.importorskip(package)
    names: dict[str, object] = {"trainer": Trainer()}
    exec(code, names)
    made = names.get("mean", names.get("merged"))
    assert made is None or all(t.shape == (64, 64) and t.any() for t in made.values())

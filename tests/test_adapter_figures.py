"""`benchmarks/adapters.py`: a figure has a result that was checked, or there is none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "adapters.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("safetensors")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("figures_of_adapters", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_rows_have_figures(script) -> None:
    for figure in (script.sum_of_factors(64, 4, 2, 1), script.range_finder(64, 8, 2, 2)):
        row = figure.cells()
        assert len(row) == script.HEAD.count("|") - 1
        assert float(row[1]) > 0 and float(row[3]) > 0
        assert row[4].endswith(" (≥ 100)") == ("adapters" in row[0])


def test_a_wrong_result_has_none(script, monkeypatch: pytest.MonkeyPatch) -> None:
    right, nearest = script.spectrum_of_sum, script.nearest_of_rank
    monkeypatch.setattr(script, "spectrum_of_sum", lambda *a: right(*a)._replace(s=right(*a).s * 2))
    with pytest.raises(script._WrongError, match="singular values to"):
        script.sum_of_factors(64, 4, 1, 1)
    monkeypatch.setattr(script, "nearest_of_rank", lambda d, rank, *a, **k: nearest(d, 1, *a, **k))
    with pytest.raises(script._WrongError, match="above the least"):
        script.range_finder(64, 8, 2, 1)

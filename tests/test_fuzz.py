"""`benchmarks/fuzz.py`, for a second: mutations of valid files are taken or refused in one line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import safetensors

from fastmerge.models import header


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("fuzz", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Older ones refuse types that came later, complex64 (0.7) the last.
KNOWS_EVERY_TYPE = tuple(map(int, safetensors.__version__.split(".")[:2])) >= (0, 7)


@pytest.mark.skipif(not KNOWS_EVERY_TYPE, reason="an older safetensors has other verdicts")
def test_nothing_breaks(fuzz: ModuleType, tmp_path: Path) -> None:
    verdicts = fuzz.fuzz(1.5, 1, headers=150, keep=tmp_path / "kept")
    for kind in ("header", "index", "config", "recipe", "schedule"):
        assert verdicts[f"{kind}: taken"] >= 1  # the valid one
    assert verdicts["header: refused"] > 50
    assert not (tmp_path / "kept").exists()


def test_nothing_breaks_of_the_newer_kinds(fuzz: ModuleType, tmp_path: Path) -> None:
    kinds = set(fuzz.Target(tmp_path).seeds) - {"header", "index", "config", "recipe", "schedule"}
    verdicts = fuzz.fuzz(1.5, 2, keep=tmp_path / "broken", only=sorted(kinds))
    assert len(kinds) == 11
    for kind in kinds:
        assert verdicts[f"{kind}: taken"] >= 1  # the valid one
    assert not (tmp_path / "broken").exists()


def test_what_is_broken_is_found(
    fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positive control: with one check of headers left out, and with an error of another class."""
    target = fuzz.Target(tmp_path)
    gap = target.seeds["header"].replace(b"[32, 40]", b"[33, 41]")
    with monkeypatch.context() as patch:
        patch.setattr(header, "_check_coverage", lambda *_: None)
        with pytest.raises(fuzz.BrokenError, match="taken, which the library refuses"):
            target.try_one("header", gap)
    with monkeypatch.context() as patch:
        patch.setattr(header, "_check_metadata", lambda found: found["format"].real)
        with pytest.raises(fuzz.BrokenError, match="AttributeError"):
            target.try_one("header", target.seeds["header"])
    with monkeypatch.context() as patch:
        patch.setattr(header, "MAX_DIMENSIONS", 0)
        patch.setattr(fuzz, "OURS", {})
        with pytest.raises(fuzz.BrokenError, match="refused, which the library takes"):
            target.try_one("header", target.seeds["header"])
    target.try_one("header", gap)

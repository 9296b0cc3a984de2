"""What the tests of a cluster merge, walk and measure; importable where Ray is not installed.

PYTEST_DONT_REWRITE: its tests import it before it is registered for its fixtures.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

IDS = np.random.default_rng(0).integers(1, 39, (40, 8))
MARKS = "FASTMERGE_TEST_MARKS"  # a folder: evaluators leave a word in it


def score(model: Any, split: str = "steer", limit: int | None = None) -> Mapping[str, Any]:
    """Per-item likelihood of random token rows: cheap, and it moves with every weight."""
    import torch

    marks = Path(os.environ[MARKS])
    (marks / f"evaluator-{os.getpid()}").touch()
    if (marks / "kill").exists():
        (marks / "kill").unlink()
        (marks / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    rows = torch.tensor(IDS[:20] if split == "steer" else IDS[20:])[:limit]
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)
    chosen = logits[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].mean(1)
    return {"likelihood": (1000 * chosen.exp()).tolist()}


@contextmanager
def within_its_limits() -> Iterator[None]:
    """Skips where Ray's own processes did not start within Ray's time."""
    try:
        yield
    except Exception as error:  # Ray's is a bare one
        if "timed out" not in str(error):
            raise
        pytest.skip(f"Ray's own processes did not start within its limits: {str(error)[:80]}")


def recipe(zoo: Any) -> dict[str, Any]:
    base = zoo.base("base", shards=3)
    models = [{"model": str(m)} for m in (base, zoo.tune(base, "tune"))]
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import torch

    torch.set_num_threads(1)
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv(MARKS, str(folder))
    return folder


@pytest.fixture
def schedule(zoo: Any) -> dict[str, Any]:
    base = zoo.base("m0")
    pool = [zoo.tune(base, f"m{i}", seed=i, size=0.05) for i in (1, 2)]
    return {
        "baseline": {"model": str(base), "accuracy": 50.0},
        "pool": [str(path) for path in pool],
        "seed": 11,
        "schedule": {
            "cycles": 2,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.3},
            "retrace": {"toward": "baseline", "method": "dare_ties", "t": 0.4, "density": 0.7},
        },
        "evaluate": {"callable": "stand:in"},
    }


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }

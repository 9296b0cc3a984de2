"""Scorers that users write: what runs is what their scores are kept under."""

from __future__ import annotations

import os
import py_compile
import sys
from pathlib import Path

import pytest

from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.settings import load_evaluate


@pytest.mark.parametrize("edited", ["keyed/scoring.py", "keyed/parts.py", "beside.py", "lazy.py"])
def test_what_runs_is_the_text_that_was_hashed(
    tmp_path: Path, edited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit that leaves a file's time and length as they were, with bytecode of the old text."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    scoring = (
        "from beside import B\nfrom keyed import parts\nA = 1\n"
        "def score(model):\n    from lazy import L\n    return {'a': A + B + parts.P + L}\n"
    )
    files = {
        "keyed/__init__.py": "", "keyed/scoring.py": scoring, "keyed/parts.py": "P = 1\n",
        "beside.py": "B = 1\n", "lazy.py": "L = 1\n",
    }  # fmt: skip
    (tmp_path / "keyed").mkdir()

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (1e9, 1e9))

    def forget() -> None:
        for name in ("keyed", "keyed.scoring", "keyed.parts", "beside", "lazy"):
            sys.modules.pop(name, None)

    for name, text in files.items():
        write(name, text)
        py_compile.compile(str(tmp_path / name), doraise=True)
    settings = load_evaluate({"callable": "keyed.scoring:score"})
    keys = set()
    for value, is_known in ((1, True), (2, True), (3, False)):
        if not is_known:
            forget()  # as in another process
        write(edited, files[edited].replace(" = 1", f" = {value}"))
        scorer = make_scorer(settings, tmp_path, tmp_path)
        keys.add(scorer.key)
        assert scorer.score(None, "steer").value == 3 + value
    assert len(keys) == (1 if edited == "lazy.py" else 3)  # what runs later is not in the key
    forget()

"""`fastmerge search` as a new user meets it: the documentation's example, words, refusals."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmerge.cli import main

DOCS = Path(__file__).parent.parent / "docs" / "search.md"


def block(language: str, number: int = 0) -> str:
    return re.findall(
        rf"```{language}(?: title=\"[\w.]+\")?\n(.*?)```", DOCS.read_text(), re.DOTALL
    )[number]


SPACE = block("yaml").replace("likely:", "likely_own:")


@pytest.fixture
def example(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The documentation's files, in the working directory."""
    import torch

    torch.set_num_threads(1)
    base = zoo.base("blur", dtype="F32")
    for seed, name in enumerate(["dolphin", "math"], start=1):
        zoo.tune(base, name, seed=seed, dtype="F32", size=0.05)
    # By another name than where the pages' own tests have run it in this process.
    (zoo.root / "space.yml").write_text(SPACE)
    (zoo.root / "likely_own.py").write_text(block("python"))
    monkeypatch.chdir(zoo.root)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return zoo.root


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(words)
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_the_documentation_s_example_runs(example: Path, capsys: Any) -> None:
    code, out, err = command(capsys, "search", "space.yml", "out", "--threads", "1")
    assert code == 0, err
    assert "the best so far" in err and "of 400 items" in err
    assert "against the uniform average" in out and "report: out/report.html" in out
    written = json.loads((example / "out" / "search.json").read_text())
    assert written["dimensions"] == [
        "dolphin.weight",
        *(f"math.weight({part})[{i}]" for part in ("self_attn", "others") for i in range(2)),
    ]
    assert 390 <= written["spent"] <= 400 == written["budget"]["items"]
    assert (example / "out" / "model" / "model.safetensors").is_file()
    code, _, err = command(capsys, "search", "space.yml", "out")
    assert code == 2 and err == "error: out: holds a run already; use --resume, or another folder\n"
    code, out, _ = command(capsys, "search", "space.yml", "out", "--resume", "--json")
    assert code == 0 and json.loads(out)["best"] == written["best"]


def test_a_search_says_how_far_it_is(capsys: Any, monkeypatch: Any) -> None:
    from types import SimpleNamespace

    from fastmerge.cli import search
    from fastmerge.search.lab import Measurement

    now = iter([0.0, 10.0, 10.5, 40.0, 100.0])
    monkeypatch.setattr(search.time, "monotonic", lambda: next(now))
    running = search._Running(quiet=False, begin=lambda: None)
    budget = SimpleNamespace(most=40, unit="items")
    study = SimpleNamespace(spent=4, best=None, file=SimpleNamespace(budget=budget))
    running.measuring(Measurement("candidate 0", "steer", 1, None))
    running.tried(study)
    running.measuring(Measurement("candidate 1", "steer", 2, None))
    running.measuring(Measurement("candidate 2", "steer", 3, None))  # within a second: no line
    study.spent = 14
    running.measuring(Measurement("candidate 3", "steer", 4, None))
    running.measuring(Measurement("the uniform average", "holdout", 5, None))
    assert capsys.readouterr().err.splitlines() == [
        "measuring candidate 0",
        "measuring candidate 1: 4 of 40 items",
        "measuring candidate 3: 14 of 40 items, at most 1:18 left",
        "measuring the uniform average on the hold-out",
    ]


def test_the_documentation_s_python_runs(example: Path) -> None:
    text = block("python", 1)
    (example / "space.yml").write_text(SPACE.replace("400", "12"))
    exec(compile(text, "search.md", "exec"), {})
    assert (example / "asked" / "recipe.yml").is_file()


def test_a_dry_run_says_what_is_searched_and_writes_nothing(example: Path, capsys: Any) -> None:
    code, out, _ = command(capsys, "search", "space.yml", "out", "--dry-run")
    assert code == 0 and not (example / "out").exists()
    words = " ".join(out.split())
    assert "dolphin.weight 0 1 0.5" in words and "math.weight(self_attn)[0] 0 1 0.3" in words
    assert "budget 400 items" in words and "shows after the first" in words
    code, out, _ = command(capsys, "search", "space.yml", "out", "--dry-run", "--json")
    assert json.loads(out)["optimiser"] == "cma"


def test_every_optimiser_is_documented() -> None:
    from fastmerge.search.optimisers import OPTIMISERS

    rows = re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE)
    assert [row for row in rows if row in OPTIMISERS] == list(OPTIMISERS)


MISTAKES = {
    "no file": ("nowhere.yml", "", "nowhere.yml: no such search file"),
    "no model": ("space.yml", "./dolphin", "./elsewhere: no such folder"),
    "no module": ("space.yml", "likely_own:score", "'elsewhere'"),
    "no line": ("space.yml", "0..1", "space.yml:5"),
}


@pytest.mark.parametrize("name, old, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    example: Path, capsys: Any, name: str, old: str, message: str
) -> None:
    new = {"./dolphin": "./elsewhere", "likely_own:score": "elsewhere:score", "0..1": "1..0"}
    text = (example / "space.yml").read_text()
    (example / "space.yml").write_text(text.replace(old, new[old]) if old else text)
    code, _, err = command(capsys, "search", name, "out")
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (example / "out").exists()

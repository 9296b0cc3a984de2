"""A dry run of a stranger's schedule or search runs nothing that came with it; what its task files
raise in a run is one line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastmerge import search
from fastmerge.errors import FastmergeError
from fastmerge.evaluation import harness, task_files
from fastmerge.evaluation.settings import load_evaluate
from fastmerge.retrograde.runner import describe

WALK = {
    "cycles": 1,
    "degrade": {"partner": "next", "method": "slerp", "t": 0.4},
    "retrace": {"toward": "baseline", "method": "linear", "t": 0.3},
}
TASK = """task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: !function planted.text
doc_to_target: 0
doc_to_choice: ["{{ cycler.__init__.__globals__.os.mkdir(ran) }}", b]
"""


def kinds(folder: Path, zoo: Any, evaluate: dict[str, Any]) -> dict[str, Any]:
    """A schedule and a search in ``folder``, which ask for the same scores."""
    zoo.tune(zoo.base("m0"), "m1", seed=1, size=0.05)
    models = [str(zoo.root / "m0"), str(zoo.root / "m1")]
    schedule = {"baseline": models[0], "pool": models[1:], "schedule": WALK, "evaluate": evaluate}
    space = {
        "space": {
            "merge_method": "linear",
            "models": [
                {"model": models[0], "parameters": {"weight": 1}},
                {"model": models[1], "parameters": {"weight": {"low": 0, "high": 1}}},
            ],
        },
        "optimiser": "random",
        "budget": {"candidates": 4},
        "evaluate": evaluate,
    }
    found: dict[str, Any] = {}
    for name, text, call in (("walk", schedule, describe), ("space", space, search.describe)):
        (folder / f"{name}.yml").write_text(json.dumps(text))
        found[name] = lambda call=call, name=name: call(folder / f"{name}.yml")
    return found


@pytest.mark.parametrize("kind", ["walk", "space"])
def test_a_dry_run_imports_no_callable(zoo: Any, tmp_path: Path, kind: str) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n\ndef score(model, split):\n    return 1.0\n"
    (tmp_path / "planted.py").write_text(code)
    found = kinds(tmp_path, zoo, {"callable": "planted:score"})[kind]()
    assert not ran.exists()
    if kind == "walk":  # the split shows in the text
        assert found["measurements"]["of"]["rows on the hold-out"] > 0
        assert found["measurements"]["tasks"] == [] and found["measurements"]["seconds"] is None
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text(code)
    (tmp_path / "planted" / "inner.py").write_text(code)
    kinds(tmp_path, zoo, {"callable": "planted.inner:score"})[kind]()
    assert not ran.exists()


@pytest.mark.parametrize(
    ("text", "asked", "words"),
    [
        ("def score(model:\n", {}, "planted.py:1: SyntaxError"),
        ("(" * 5000, {}, "planted.py"),
        ("x = 1\0", {}, "planted:score"),
        ("def score(model): ...\n", {"limit": 3}, "takes no 'limit'"),
        (None, {}, "no planted.py lies beside"),
    ],
)
def test_a_dry_run_says_what_shows_in_the_text(
    zoo: Any, tmp_path: Path, text: str | None, asked: dict[str, Any], words: str
) -> None:
    if text is not None:
        (tmp_path / "planted.py").write_text(text)
    for call in kinds(tmp_path, zoo, {"callable": "planted:score", **asked}).values():
        with pytest.raises(FastmergeError) as caught:
            call()
        assert words in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("how", ["include_path", "file"])
def test_a_dry_run_loads_no_task_file(zoo: Any, tmp_path: Path, how: str) -> None:
    ran, tasks = tmp_path / "ran", tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "rows.json").write_text('{"a": 1}\n')
    text = TASK.replace("DATA", str(tmp_path / "rows.json")).replace("ran)", f"'{ran}')")
    (tasks / "mine.yaml").write_text(text)
    (tasks / "planted.py").write_text(f"open({str(ran)!r}, 'w')\n")
    asked = {"include_path": [str(tasks)], "tasks": ["mine"]}
    if how == "file":
        asked = {"tasks": [str(tasks / "mine.yaml")]}
    for call in kinds(tmp_path, zoo, asked).values():
        call()
    assert not ran.exists()


OWN = "doc_to_text: !function planted.text"
RAISES = {
    "an import": ("1/0\n", OWN, "planted.py:1: ZeroDivisionError"),
    "no text": ("def text(:\n", OWN, "planted.py:1: SyntaxError"),
    "a function": ("def text(row): raise AttributeError('no')\n", OWN, "AttributeError: no"),
    "a template": ("", "doc_to_text: '{{ 1 / 0 }}'", "ZeroDivisionError"),
    "no template": ("", "doc_to_text: '{{ % }'", "TemplateSyntaxError"),
    "another's key": ("", "doc_to_text: a\ntarget_delimiter: 7", "AttributeError"),
}


@pytest.mark.parametrize("case", RAISES)
def test_what_a_task_file_raises_is_one_line(tmp_path: Path, monkeypatch: Any, case: str) -> None:
    pytest.importorskip("lm_eval")
    code, text, words = RAISES[case]
    monkeypatch.setattr(harness, "load_tokenizer", lambda _: None)
    (tmp_path / "rows.json").write_text('{"a": 1}\n')
    task = TASK.replace("DATA", str(tmp_path / "rows.json")).replace(OWN, text)
    task = task.replace('"{{ cycler.__init__.__globals__.os.mkdir(ran) }}"', "a")
    (tmp_path / "mine.yaml").write_text(task)
    (tmp_path / "planted.py").write_text(code)
    settings = load_evaluate({"include_path": [str(tmp_path)], "tasks": ["mine"]})
    with pytest.raises(FastmergeError) as caught:
        harness.Harness(settings, tmp_path, tmp_path)
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_a_group_of_itself_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "mine.yaml").write_text("group: mine\ntask: [mine]\n")
    settings = load_evaluate({"include_path": [str(tmp_path)], "tasks": ["mine"]})
    with pytest.raises(FastmergeError, match="RecursionError"):
        harness.Harness(settings, tmp_path, tmp_path)


def test_a_folder_of_everything_holds_no_tasks(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a").mkdir()
    for number in range(6):
        (tmp_path / "a" / f"{number}.yaml").write_text(f"task: t{number}\n")
    settings = load_evaluate({"include_path": [str(tmp_path)], "tasks": ["t1"]})
    assert harness.unread(settings, tmp_path) is not None
    monkeypatch.setattr(task_files, "MAX_TASKS_BYTES", 50)
    with pytest.raises(FastmergeError, match=r"include_path: .*5.yaml: over 5 bytes"):
        harness.unread(settings, tmp_path)
    monkeypatch.setattr(task_files, "MAX_TASK_ENTRIES", 6)
    with pytest.raises(FastmergeError, match=r"include_path: .* over 6 files; name the folder"):
        harness.unread(settings, tmp_path)
    with pytest.raises(FastmergeError, match="over 6 files"):
        harness.unread(load_evaluate({"include_path": ["/"], "tasks": ["t1"]}), tmp_path)


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in "abc":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.yaml").write_text(f"task: {folder}\n")
    found = task_files.task_texts(tmp_path, "here")
    assert found == {"x.yaml": "task: a\n", "b/x.yaml": "task: b\n", "c/x.yaml": "task: c\n"}

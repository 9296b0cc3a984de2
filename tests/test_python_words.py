"""What a Python caller reads and sees: arguments by their Python names, a bar, one line."""

import ast
import io
import re
from pathlib import Path

import pytest

import fastmerge
from fastmerge import FastmergeError, OutputError, adapters, retrograde, search
from fastmerge.cli import main
from fastmerge.errors import argument, command_line
from fastmerge.progress import Bar
from fastmerge.search.sweep import sweep

PACKAGE = Path(fastmerge.__file__).parent


def docstrings(tree):
    homes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, homes) and node.body and isinstance(node.body[0], ast.Expr):
            yield node.body[0].value


def found_in(paths, folder):
    return [said for path in paths for said in options_said(path, folder)]


def options_said(path, folder):
    tree = ast.parse(path.read_text())
    known = set(map(id, docstrings(tree)))
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in known)
    for node in texts:
        if isinstance(node.value, str) and re.search(r"(^|[\s('\"])--[a-z]", node.value):
            yield f"{path.relative_to(folder)}: {node.value}"


def test_only_the_command_line_speaks_of_options(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("raise ValueError('give --rank 3')")
    assert [text.split(": ", 1)[1] for text in found_in([planted], tmp_path)] == ["give --rank 3"]
    # `bench` is a command's own room (a test of the house: only cli imports it), and runs commands.
    commands = {PACKAGE / "cli", PACKAGE / "bench"}
    modules = [p for p in PACKAGE.rglob("*.py") if commands.isdisjoint(p.parents)]
    assert len(modules) > 100
    assert found_in(modules, PACKAGE) == []


def test_an_argument_is_said_as_its_caller_writes_it():
    ways = [("memory_limit",), ("overwrite", True), ("device", "cpu")]
    assert [argument(*way) for way in ways] == ["memory_limit", "overwrite=True", "device='cpu'"]
    with command_line():
        assert [argument(*way) for way in ways] == ["--memory-limit", "--overwrite", "--device cpu"]
    assert argument("t") == "t"


@pytest.fixture
def recipe(zoo):
    a, b = zoo.base("a"), zoo.base("b")
    return {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in (a, b)],
    }


def test_an_output_that_exists(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    fastmerge.merge(recipe, out)
    with pytest.raises(OutputError, match=r"exists; .* or add overwrite=True$"):
        fastmerge.merge(recipe, out)
    text = tmp_path / "r.yml"
    text.write_text(str(recipe))
    with pytest.raises(SystemExit, match="2"):
        main(["merge", str(text), str(out)])
    assert "or add --overwrite\n" in capsys.readouterr().err


def test_progress_true_is_shown_on_stderr(recipe, tmp_path, capsys):
    fastmerge.merge(recipe, tmp_path / "out", progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.search(r"merging to out: 100 %  (.*) of \1", shown.err)
    fastmerge.verify(tmp_path / "out", progress=True)
    assert "verifying out: 100 %" in capsys.readouterr().err


def test_progress_false_and_none_show_nothing(recipe, tmp_path, capsys):
    fastmerge.merge(recipe, tmp_path / "shown", progress=False)
    fastmerge.merge(recipe, tmp_path / "none", progress=None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("progress", [1, "yes", 0.5])
def test_progress_must_be_true_or_a_function(recipe, tmp_path, progress):
    with pytest.raises(FastmergeError, match=r"^progress: must be True or a function"):
        fastmerge.merge(recipe, tmp_path / "out", progress=progress)
    assert list(tmp_path.glob("*out*")) == []


def _walked(pair, out, progress):
    steps = [{"degrade": {"partner": pair[1], "method": "slerp", "t": 0.4}}]
    schedule = {
        "baseline": {"model": pair[0], "accuracy": 70.0},
        "pool": [{"model": pair[1], "accuracy": 50.0}],
        "schedule": {"steps": steps},
    }
    retrograde.run(schedule, out, evaluate=False, threads=1, progress=progress)


def _swept(pair, out, progress):
    recipe = {
        "merge_method": "slerp",
        "base_model": pair[0],
        "models": [{"model": path} for path in pair],
        "parameters": {"t": 0.5},
    }
    sweep(recipe, out, [0.25, 0.75], threads=1, progress=progress)


def _half(_model, _split="steer", _limit=None):
    return {"x": [1.0, 0.0] * 5}


def _searched(pair, out, progress):
    weights = ["0..1", 0.5]
    models = [
        {"model": path, "parameters": {"weight": weight}}
        for path, weight in zip(pair, weights, strict=True)
    ]
    file = {
        "space": {"merge_method": "linear", "models": models},
        "optimiser": "random",
        "budget": {"items": 60},
        "evaluate": {"callable": "stand:in"},
    }
    search.run(file, out, score=_half, threads=1, progress=progress)


RUNS = {"running": _walked, "sweeping": _swept, "searching": _searched}


@pytest.mark.parametrize("title", RUNS)
def test_long_runs_show_progress_too(zoo, tmp_path, capsys, title):
    pair = [str(zoo.base(name)) for name in "ab"]
    RUNS[title](pair, tmp_path / "out", True)
    shown = capsys.readouterr()
    assert f"{title} to out: 100 %" in shown.err and f"{title} to out" not in shown.out
    with pytest.raises(FastmergeError, match=r"^progress: must be True or a function"):
        RUNS[title](pair, tmp_path / "no", 1)
    assert not (tmp_path / "no").exists()


def test_a_bar_shows_each_pass_from_its_start():
    stream = io.StringIO()
    with Bar("running", stream=stream) as bar:
        for total in (100, 30):
            for done in range(0, total + 1, total // 5):
                bar(done, total, "x")
    shown = re.findall(r"running: +(\d+) %", stream.getvalue())
    assert shown == ["20", "40", "60", "80", "100"] * 2


def test_adapters_say_python_names_too(tmp_path):
    with pytest.raises(FastmergeError) as caught:
        adapters.extract_lora(tmp_path / "no", tmp_path / "no", tmp_path / "out", rank=0)
    assert "--" not in str(caught.value)


def test_a_notebook_shows_the_one_line():
    error = FastmergeError("t: must be a number\nnot text")
    assert error._render_traceback_() == [f"FastmergeError: {error}"]
    assert "\n" not in error._render_traceback_()[0]

"""What a new user stumbles over: hints to follow, tables that fit, faults in plain words."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import fastmerge
from fastmerge import extras, ops
from fastmerge.cli import main
from fastmerge.cli.change_map import change_map
from fastmerge.errors import FastmergeError, nearest
from fastmerge.methods import METHODS, find
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.diff import compare
from fastmerge.planning.by_layer import by_layer
from fastmerge.recipe.yaml_text import parse
from tests.conftest import write_checkpoint


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


def terminal(*words: object, columns: int, **env: str) -> str:
    """What a command shows on a terminal of that width."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 1 << 16)
            except OSError:  # Linux says so that nobody has the other end
                return
            if not data:
                return
            shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    subprocess.run(
        [sys.executable, "-m", "fastmerge", *map(str, words)],
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, timeout=120, check=True,
        env={"PATH": os.environ["PATH"], "TERM": "xterm-256color", "COLUMNS": str(columns), **env},
    )  # fmt: skip
    os.close(theirs)
    reader.join(30)
    os.close(ours)
    return shown.decode()


# ---------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ({}, "'fastmerge[gpu]'"),
        ({"url": "file:///a/b%20c", "dir_info": {}}, "'/a/b c[gpu]'"),
        ({"url": "file:///a/b", "dir_info": {"editable": True}}, "-e '/a/b[gpu]'"),
        (
            {"url": "file:///a/fastmerge-1.whl", "archive_info": {}},
            "'fastmerge[gpu] @ file:///a/fastmerge-1.whl'",
        ),
        (
            {
                "url": "https://host.example/r.git",
                "vcs_info": {"vcs": "git", "commit_id": "abc", "requested_revision": "v1"},
            },
            "'fastmerge[gpu] @ git+https://host.example/r.git@v1'",
        ),
    ],
)
def test_an_extra_is_installed_as_fastmerge_was(monkeypatch, origin, words) -> None:
    monkeypatch.setattr(extras, "_origin", lambda: origin)
    assert extras.install("gpu") == f"pip install {words}"
    assert extras.install("gpu", "accelerate").endswith(" accelerate")


def test_an_extra_of_a_package_that_is_only_on_the_path(monkeypatch) -> None:
    monkeypatch.setattr(extras, "_origin", lambda: None)
    root = Path(extras.__file__).resolve().parents[1]
    assert extras.install("plot") == f"pip install '{root}[plot]'"


def test_every_extra_that_a_hint_names_is_one() -> None:
    from importlib import metadata

    files = Path(fastmerge.__file__).parent.rglob("*.py")
    sources = [path.read_text() for path in files if path.name != "extras.py"]
    named = {name for text in sources for name in re.findall(r"install\('(\w+)'", text)}
    assert len(named) >= 4
    assert named <= set(metadata.metadata("fastmerge").get_all("Provides-Extra"))
    assert not any("'fastmerge[" in text for text in sources)


@pytest.mark.parametrize("name", ["SLERP", "Dare-Ties", "DARE TIES", "tie", "task-arithmetic"])
def test_a_method_of_almost_that_name_in_any_case(name: str) -> None:
    meant = {"tie": "ties", "SLERP": "slerp"}.get(name, name.lower().translate({32: 95, 45: 95}))
    with pytest.raises(FastmergeError, match=rf"did you mean '{meant}'\?"):
        find(name)


def test_the_nearest_is_said_as_it_is_spelt() -> None:
    assert nearest("SELF_ATTN", ["Self-Attn", "mlp"]) == "did you mean 'Self-Attn'?"
    assert nearest("xyz", ["Self-Attn", "mlp"]) == "known: Self-Attn, mlp"


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            "models:\n  - model: a\n    weight: 1\n   density: 2\n",
            4,
            "of line 2; keys of one section",
        ),
        ("models:\n  - model: a\n - model: b\n", 3, "those above it; items begin in one column"),
        ("merge_method: linear\n  dtype: float32\n", 2, "indented more than its section"),
        ("models:\n\t- model: a\n", 2, "indent with spaces"),
        ("parameters: {t: 0.5\ndtype: float32\n", 2, "'{' of line 1 is not closed"),
        ("t: [0, 0.5\ndtype: float32\n", 2, "'[' of line 1 is not closed"),
        ("name: 'a\nb: 1\n", 3, "a quote of line 1 is not closed"),
        ("a: b: c\n", 1, "quote a text with one"),
        ("model: @x\n", 1, "a text that begins so must be quoted"),
        ("- a\nb: 1\n", 2, "keys beside a list"),
        ("a: 1\nmodels:\n\u00a0\u00a0model: a\n", 3, "with U+00A0, which is no space"),
        ("a: 1\nmodels: *m\n", 2, "no '&' of that name is above it"),
    ],
)
def test_a_fault_of_yaml_in_plain_words(text: str, line: int, said: str) -> None:
    with pytest.raises(FastmergeError) as caught:
        parse(text, "r.yml", "recipe")
    message = str(caught.value)
    assert message.startswith(f"r.yml:{line}: not valid YAML")
    assert said in message
    assert not any(word in message for word in ("<block", "mapping values", "token", "stream"))


def test_a_decimal_comma_between_braces_is_told_as_that() -> None:
    for text, said in (("t: {value: 0,5}", "with a point, as in 0.5"), ("{5: a}", "quote it")):
        with pytest.raises(FastmergeError, match=f"the key '5' is not text; .*{said}"):
            parse(text, "r.yml", "recipe")


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_the_list_of_methods_breaks_no_word(columns: int) -> None:
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal("methods", columns=columns))
    assert max(len(line.rstrip("\r")) for line in shown.split("\n")) <= columns
    known = {word for row in METHODS.values() for word in f"{row.name} {row.summary}".split()}
    if columns > 60:  # where the parameters are left out
        known |= {parameter.name for row in METHODS.values() for parameter in row.parameters}
    assert known <= set(shown.replace(",", " ").split()) | set(shown.split())
    assert "fastmerge methods NAME has each one's" in shown
    assert "arXiv" not in shown


def test_a_wide_terminal_and_a_pipe_have_every_column(capsys) -> None:
    assert "arXiv:2306.01708" in terminal("methods", columns=400)
    assert run("methods") == 0
    out = capsys.readouterr().out
    assert "arXiv:2306.01708" in out and "methods NAME" not in out


def test_no_color_is_followed(zoo, tmp_path) -> None:
    recipe = tmp_path / "r.yml"
    models = [{"model": str(zoo.base("base")), "parameters": {"weight": 1}}]
    recipe.write_text(json.dumps({"merge_method": "linear", "models": models}))
    for colours, env in enumerate(({"NO_COLOR": "1"}, {})):
        shown = terminal("merge", recipe, tmp_path / f"out{colours}", columns=100, **env)
        assert bool(re.search(r"\x1b\[3\d", shown)) == bool(colours)
    assert "\x1b[1m" in terminal("methods", columns=100, NO_COLOR="1")
    assert "\x1b[" not in terminal("methods", columns=100, TERM="dumb")


# ---------------------------------------------------------------- diff


@pytest.fixture
def pair(zoo):
    base = zoo.base("base", layers=11)
    return base, zoo.tune(base, "chat")


def test_layers_are_compared_in_their_order(pair) -> None:
    found = compare(*map(Checkpoint.open, pair), threads=2)
    layers = [t.name.split(".")[2] for t in found.tensors if ".layers." in t.name]
    assert list(dict.fromkeys(layers)) == [str(number) for number in range(11)]


def test_the_relative_change_is_the_norms(zoo) -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 300, 70)).astype(np.float32)
    b = a + np.float32(1e-3) * b
    zero = np.zeros(5, np.float32)
    left = zoo.write("a", {"w": a, "z": zero}, dtype="F32")
    right = zoo.write("b", {"w": b, "z": zero + 1}, dtype="F32")
    found = {
        t.name: t for t in compare(Checkpoint.open(left), Checkpoint.open(right), threads=2).tensors
    }
    exact = np.linalg.norm(a.astype(float) - b) / np.linalg.norm(a.astype(float))
    assert found["w"].relative == pytest.approx(exact, rel=1e-6)
    assert found["z"].relative is None
    same = compare(Checkpoint.open(left), Checkpoint.open(left), threads=1).tensors
    assert same[0].relative == 0.0


def test_the_table_of_a_diff(pair, capsys) -> None:
    assert run("diff", *pair) == 0
    out = capsys.readouterr().out
    assert "relative" in out and "cosine" in out and "changed" in out and "ulps" not in out
    assert "elements (" in out.splitlines()[-1]


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_narrow_terminal_breaks_names_and_no_number(pair, columns: int) -> None:
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal("diff", *pair, columns=columns))
    found = compare(*map(Checkpoint.open, pair), threads=2).tensors
    rows = re.findall(r"(\S+%) +(\d\.\d{6}) +(\S+%)", shown)
    assert len(rows) == len(found)
    assert [row[1] for row in rows] == [f"{tensor.cosine:.6f}" for tensor in found]


def test_a_map_of_layers_and_kinds(pair, tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    tensors = compare(*map(Checkpoint.open, pair), threads=2).tensors
    kinds, layers, percent = change_map(tensors)
    assert layers == ["-", *map(str, range(11))] and "mlp.up_proj" in kinds and "lm_head" in kinds
    assert percent.shape == (len(kinds), 12)
    one = next(t for t in tensors if t.name == "model.layers.10.mlp.up_proj.weight")
    assert percent[kinds.index("mlp.up_proj"), 11] == pytest.approx(100 * one.relative)
    assert np.isnan(percent[kinds.index("lm_head"), 1])
    assert run("diff", *pair, "--plot", tmp_path / "map.png", "--limit", 1) == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "relative change" in capsys.readouterr().err
    assert run("diff", *pair, "--plot", tmp_path / "gone" / "map.png") == 2
    capsys.readouterr()
    other = write_checkpoint(tmp_path / "other", {"bert.w": np.ones(2)})
    assert run("diff", pair[0], other, "--plot", tmp_path / "none.png") == 2
    out, err = capsys.readouterr()  # a traceback of matplotlib's, and no answer
    assert "bert.w: only in B" in out and err.startswith("error: plot: the models share no tensor")


TOWERS = ("model.vision_tower.layers", "model.language_model.layers")


@pytest.fixture
def towers(zoo):
    """Two models, each with two stacks of layers whose tensors have the same names."""
    tensors = {f"{tower}.{n}.fc.weight": np.ones((2, 3)) for tower in TOWERS for n in range(2)}
    tensors["model.embed_tokens.weight"] = np.ones((4, 3))
    return [
        zoo.write(name, {own: scale * value for own, value in tensors.items()}, {})
        for name, scale in (("base", 1), ("chat", 2))
    ]


def test_a_map_has_a_line_for_each_stack_s_own(towers) -> None:
    tensors = compare(*map(Checkpoint.open, towers), threads=1).tensors
    (found,) = [t for t in tensors if t.name == f"{TOWERS[0]}.1.fc.weight"]
    moved = [replace(t, relative=3.0) if t is found else t for t in tensors]
    kinds, layers, percent = change_map(moved)
    assert set(kinds) == {"model.embed_tokens", *(f"{tower}.fc" for tower in TOWERS)}
    assert percent[kinds.index(f"{TOWERS[0]}.fc"), layers.index("1")] == 300
    assert percent[kinds.index(f"{TOWERS[1]}.fc"), layers.index("1")] == 100


def test_a_plan_has_a_line_for_each_stack_s_own(towers) -> None:
    models = ", ".join(f"{{model: {path}}}" for path in towers)
    text = (
        f"merge_method: slerp\nbase_model: {towers[0]}\nmodels: [{models}]\n"
        "parameters: {t: [{filter: vision_tower, value: 0.2}, {value: [0.4, 0.6]}]}\n"
    )
    plan = fastmerge.plan(text)
    rows = by_layer(plan.tensors, plan.references)
    assert [(row.layers, row.kinds, row.values["t"]) for row in rows] == [
        ("0-1", (f"{TOWERS[0]}.fc",), 0.2),
        ("0", (f"{TOWERS[1]}.fc",), 0.4),
        ("1", (f"{TOWERS[1]}.fc",), 0.6),
        ("-", ("model.embed_tokens",), 0.4),
    ]


# ---------------------------------------------------------------- plan


def test_a_plan_says_in_a_line_what_is_the_same_everywhere(pair, tmp_path, capsys) -> None:
    recipe = tmp_path / "r.yml"
    models = ", ".join(f"{{model: {path}, parameters: {{weight: 0.5}}}}" for path in pair)
    recipe.write_text(f"merge_method: linear\nmodels: [{models}]\n")
    assert run("plan", recipe) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = ", ".join(f"weight of {path.name} 0.5" for path in pair)
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("values ")] == [shown]
    assert not any(line.strip().startswith("layers") for line in lines)


def test_a_plan_shows_t_by_layer(pair, tmp_path, capsys) -> None:
    base, chat = pair
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {base}\nmodels: [{{model: {base}}}, {{model: {chat}}}]\n"
        "parameters:\n  t: [{filter: mlp, value: [0.1, 0.6]}, {value: 0.5}]\ndtype: bfloat16\n"
    )
    assert run("plan", recipe) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:1] == ["0-10"] and line.endswith(" 0.5") for line in lines)
    assert any(line.split()[0] == "10" and line.endswith(" 0.6") for line in lines if line.strip())
    assert run("plan", recipe, "--json") == 0
    values = json.loads(capsys.readouterr().out)["values"]
    mlp = [row for row in values if "mlp.up_proj" in row["tensors"]]
    assert [row["layers"][0] for row in mlp] == list(range(11))
    assert mlp[5]["values"]["t"] == pytest.approx(0.35)


def test_a_plan_shows_each_models_weight(pair, tmp_path, capsys) -> None:
    base, chat = pair
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: ties\nbase_model: {base}\nmodels:\n"
        f"- {{model: {chat}, parameters: {{weight: 0.7, density: [0.25, 1]}}}}\ndtype: bfloat16\n"
    )
    assert run("plan", recipe, "--json") == 0
    values = json.loads(capsys.readouterr().out)["values"]
    inside = [row for row in values if row["layers"][0] is not None]
    assert {row["values"][f"weight of {chat}"] for row in values} == {0.7}
    assert inside[0]["values"][f"density of {chat}"] == pytest.approx(0.25)
    assert inside[-1]["values"][f"density of {chat}"] == pytest.approx(1)
    assert "normalize" not in inside[0]["values"]  # the same everywhere


def test_a_plan_shows_the_ends_of_a_gradient(pair, tmp_path, capsys) -> None:
    """t of 0 and 1 leave a copy: its layers are shown beside the others."""
    base, chat = pair
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {base}\nmodels: [{{model: {base}}}, {{model: {chat}}}]\n"
        "parameters:\n  t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]\ndtype: bfloat16\n"
    )
    assert run("plan", recipe, "--json") == 0
    values = json.loads(capsys.readouterr().out)["values"]
    mlp = [row for row in values if "mlp.up_proj" in row["tensors"]]
    assert [row["layers"] for row in mlp] == [[n, n] for n in range(11)]
    assert mlp[0]["values"] == {"copy": str(base)} and mlp[-1]["values"] == {"copy": str(chat)}


def test_an_entry_that_is_never_reached_is_a_note(pair, tmp_path, capsys) -> None:
    base, chat = pair
    recipe = tmp_path / "r.yml"
    head = (
        f"merge_method: slerp\nbase_model: {base}\nmodels: [{{model: {base}}}, {{model: {chat}}}]\n"
    )
    for rules, unreached in (
        ("[{value: 0.5}, {filter: mlp, value: 1}]", 1),
        ("[{filter: mlp, value: 1}, {filter: mlp.up_proj, value: 0.2}, {value: 0.5}]", 1),
        ("[{filter: mlp.up_proj, value: 1}, {filter: mlp, value: 0.2}, {value: 0.5}]", 0),
    ):
        recipe.write_text(f"{head}parameters:\n  t: {rules}\ndtype: bfloat16\n")
        assert run("plan", recipe, "--json") == 0
        notes = json.loads(capsys.readouterr().out)["notes"]
        assert sum("is never reached" in note for note in notes) == unreached


def test_a_plan_shows_a_stack(pair, tmp_path, capsys) -> None:
    base, _ = pair
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        "merge_method: passthrough\nslices:\n"
        f"- sources: [{{model: {base}, layer_range: [0, 4]}}]\n"
        f"- sources: [{{model: {base}, layer_range: [2, 6]}}]\n"
    )
    assert run("plan", recipe, "--json") == 0
    rows = {tuple(r["layers"]): r["values"] for r in json.loads(capsys.readouterr().out)["values"]}
    assert rows[0, 3] == {"copy": str(base)} and rows[4, 7] == {"copy": f"{base}, layer -2"}
    out = tmp_path / "out"
    assert run("merge", recipe, out) == 0
    said = json.loads((out / "fastmerge.json").read_text())["tensors"]
    moved = said["model.layers.5.mlp.up_proj.weight"]
    assert moved["copy"] == base.name
    assert moved["tensors"] == {base.name: ["model.layers.3.mlp.up_proj.weight"]}
    assert "tensors" not in said["model.layers.1.mlp.up_proj.weight"]


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("merge", "--thread=3", "a", "b"), "did you mean --threads?"),
        (("--verison",), "no option '--verison'; did you mean '--version'?"),
        (("merge", "a"), "'fastmerge merge --help' says what it takes"),
        (("methods", "svd"), "fastmerge methods --adapters svd"),
        (("extract-lora", "a", "b", "c"), "--rank: give it or --max-rank, and not both"),
    ],
)
def test_a_mistake_in_a_command_is_one_line(words, said, capsys) -> None:
    assert run(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_help_is_a_command(capsys) -> None:
    assert run("help") == 0
    assert "COMMAND ..." in capsys.readouterr().out
    assert run("help", "merge") == 0
    assert "usage: fastmerge merge" in capsys.readouterr().out


def test_errors_are_in_the_words_of_the_call(pair, tmp_path, monkeypatch, capsys) -> None:
    base, chat = pair
    monkeypatch.chdir(base.parent)
    assert run("average", base.name, f"{chat.name}s", "-o", tmp_path / "x") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {chat.name}s: not a local folder")
    assert error.rstrip().endswith(f"did you mean ./{chat.name}?")
    weights = {"a": {"w": np.ones((2, 2), np.float32)}, "b": {"w": np.ones((2, 2), np.float32)}}
    with pytest.raises(FastmergeError, match=r"^linear needs 'weight' .* give it in parameters=$"):
        fastmerge.merge_state_dicts(weights, "linear")
    with pytest.raises(FastmergeError, match=r"^slerp needs base="):
        fastmerge.merge_state_dicts(weights, "slerp")
    with pytest.raises(FastmergeError, match=r"dare_linear: 'seed' must be .* it draws at random"):
        ops.merge(
            "dare_linear",
            [weights["a"]["w"]] * 2,
            base=weights["b"]["w"],
            parameters={"weight": 1, "density": 1},
        )


@pytest.mark.parametrize("first", ["gram", "models", "entries", "tensors"])
def test_what_a_method_of_ones_own_raises_is_one_line(first) -> None:
    from fastmerge.methods import unregister

    exec(f"def faulty({first}):\n    return gone", scope := {})
    fastmerge.method(version="1")(scope["faulty"])
    x = np.ones(8, np.float32)
    try:
        with pytest.raises(FastmergeError, match=r"^method faulty failed: NameError: name 'gone'"):
            ops.merge("faulty", [x, 2 * x], base=x if first == "models" else None)
    finally:
        unregister("faulty")


# ---------------------------------------------------------------- shells


def completed(*words: str) -> list[str]:
    """What bash offers for the last of these words."""
    script = (
        f'eval "$({sys.executable} -m fastmerge completion bash)"; COMP_WORDS=("$@"); '
        'COMP_CWORD=$(($#-1)); _fastmerge; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    answer = subprocess.run(
        ["bash", "-c", script, "x", *words], capture_output=True, text=True, check=True
    )
    return answer.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes() -> None:
    assert {"merge", "methods"} <= set(completed("fastmerge", "me"))
    assert completed("fastmerge", "merge", "--over") == ["--overwrite"]
    assert completed("fastmerge", "merge", "--device", "c") == ["cpu", "cuda"]
    assert "dare_ties" in completed("fastmerge", "methods", "dare")
    assert completed("fastmerge", "merge", "rec") == []  # files, by bash itself
    assert completed("fastmerge", "bench", "k") == ["kernels"]
    assert completed("fastmerge", "completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_is_completed(shell: str, capsys) -> None:
    from fastmerge.cli.app import COMMANDS

    assert run("completion", shell) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert ("bashcompinit" in out) == (shell == "zsh")
    assert ("complete -c fastmerge" in out) == (shell == "fish")


def test_another_shell_is_told_which_there_are(capsys) -> None:
    assert run("completion", "tcsh") == 2
    assert "'tcsh' is not one of bash, zsh, fish" in capsys.readouterr().err


# ---------------------------------------------------------------- logging


def test_a_merge_is_logged_to_who_asks(zoo, tmp_path, caplog) -> None:
    base = zoo.base("base")
    bad = {
        name: np.full_like(x, np.nan) if "norm" in name else x for name, x in zoo.read(base).items()
    }
    broken = zoo.write("broken", bad, json.loads((base / "config.json").read_text()))
    models = [{"model": str(m), "parameters": {"weight": 1}} for m in (base, broken)]
    recipe = {"merge_method": "linear", "models": models, "unknown_key": 1}
    with caplog.at_level(logging.INFO, logger="fastmerge"):
        report = fastmerge.merge(recipe, tmp_path / "out")
    assert report.notes and report.nonfinite
    records = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert records[0] == ("INFO", f"merging {report.tensors} tensors to {tmp_path / 'out'}")
    assert [m for level, m in records[1:] if level == "INFO"] == list(report.notes)
    assert len([m for level, m in records if level == "WARNING"]) == len(report.nonfinite)


def test_nothing_is_printed_where_nobody_asks(zoo, tmp_path) -> None:
    base = zoo.base("base")
    code = (
        "import fastmerge\n"
        f"entry = {{'model': {str(base)!r}, 'parameters': {{'weight': 1}}}}\n"
        "recipe = {'merge_method': 'linear', 'models': [entry]}\n"
        f"fastmerge.merge(recipe, {str(tmp_path / 'o')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_a_plan_calls_a_change_of_type_a_copy(pair, tmp_path, capsys) -> None:
    base, chat = pair
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        "merge_method: passthrough\ndtype: float16\nslices:\n"
        f"- sources: [{{model: {base}, layer_range: [0, 1]}}]\n"
        f"- sources: [{{model: {chat}, layer_range: [1, 2]}}]\n"
    )
    assert run("plan", recipe, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["values"]
    inside = {row["layers"][0]: row["values"] for row in rows if row["layers"][0] is not None}
    assert inside == {0: {"copy": str(base)}, 1: {"copy": str(chat)}}


def an_adapter(folder: Path, *modules: str) -> Path:
    """Factors of rank 1, of zeros, for matrices of a zoo's llama that are 32 x 32."""
    folder.mkdir()
    names = [f"base_model.model.model.layers.0.self_attn.{module}" for module in modules]
    factors = {f"{name}.lora_A.weight": np.zeros((1, 32), np.float32) for name in names}
    factors |= {f"{name}.lora_B.weight": np.zeros((32, 1), np.float32) for name in names}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "layers_to_transform": [0]}
    config["target_modules"] = list(modules)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_plan_tells_models_on_one_base_apart(zoo, capsys) -> None:
    """Three models that share a base's tensors, and a slice of one model's layers over others of
    its own: each has a column.
    """
    base = zoo.base()
    one, two = (an_adapter(zoo.root / name, "q_proj") for name in ("one", "two"))
    adapted = {
        "merge_method": "linear",
        "models": [
            {"model": f"{base}+{adapter}", "parameters": {"weight": weight}}
            for adapter, weight in ((one, 0.6), (two, 0.3))
        ],
    }
    sources = [
        {"model": str(base), "layer_range": layers, "parameters": {"weight": weight}}
        for layers, weight in (([0, 1], 0.75), ([1, 2], 0.25))
    ]
    stacked = {"merge_method": "linear", "slices": [{"sources": sources}]}
    shown = []
    for number, recipe in enumerate((adapted, stacked)):
        path = zoo.root / f"{number}.yml"
        path.write_text(json.dumps(recipe))
        assert run("plan", path, "--json") == 0
        shown += json.loads(capsys.readouterr().out)["values"]
    assert {json.dumps(row["values"]) for row in shown} == {
        json.dumps({f"weight of {base}+{one}": 0.6, f"weight of {base}+{two}": 0.3}),
        json.dumps(
            {f"weight of {base} from layer 0": 0.75, f"weight of {base} from layer 1": 0.25}
        ),
    }

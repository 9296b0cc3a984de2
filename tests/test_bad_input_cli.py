"""Bad input at the command line: one line, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastmerge.cli import main

LINEAR = "merge_method: linear\n"


def recipe(folder: Path, text: str = LINEAR, models=("base", "tune"), **parameters: object) -> Path:
    """A recipe over ``models`` in ``folder``; ``parameters`` are each model's, weight 1 if none."""
    entries = [
        {"model": str(folder / name), "parameters": parameters or {"weight": 1.0}}
        for name in models
    ]
    path = folder / "recipe.yml"
    path.write_text(text + yaml.safe_dump({"models": entries}))
    return path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(capsys: pytest.CaptureFixture[str], arguments: list[object], message: str) -> None:
    """Runs the command; it must end with 2, a quiet stdout and one line that matches."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == 2, err
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert re.search(message, err), err


@pytest.fixture
def pair(zoo) -> Path:
    """The folder of a base and a fine-tune."""
    zoo.tune(zoo.base(), "tune")
    return zoo.root


def check(capsys, folder: Path, made: Path, message: str, *options: str) -> None:
    """``merge`` and ``plan`` both refuse ``made``, and neither leaves a trace."""
    before = listing(folder)
    refused(capsys, ["merge", made, folder / "out", *options], message)
    refused(capsys, ["plan", made, folder / "out"], message)
    assert listing(folder) == before


# ---------------------------------------------------------------- weights


def header(entries: object, data: bytes = b"\0" * 16) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int = 0, end: int = 16, dtype: str = "F32", shape: tuple[int, ...] = (4,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


TWICE = b'{"w": %s, "w": %s}' % ((json.dumps(entry()).encode(),) * 2)

HEADERS = {
    "empty": (b"", "truncated"),
    "no-header": (b"\x10\0\0\0\0\0\0\0", "truncated"),
    "huge-length": (b"\xff" * 8 + b"{}", "header length"),
    "truncated-data": (header({"w": entry(0, 32, shape=(8,))}), "truncated"),
    "trailing-data": (header({"w": entry()}, b"\0" * 20), "belong to no tensor"),
    "overlap": (header({"a": entry(), "b": entry(8, 24)}, b"\0" * 24), "overlaps"),
    "gap": (header({"a": entry(4, 20)}, b"\0" * 20), "belong to no tensor"),
    "duplicate-key": (header(TWICE), "'w'"),
    "not-json": (header(b"{not json"), "not JSON"),
    "not-an-object": (header(b"[1, 2]"), "does not start with '{'"),
    "unknown-dtype": (header({"w": entry(dtype="F31")}), "unknown dtype 'F31'"),
    "wrong-size": (header({"w": entry(shape=(5,))}), "needs 20 bytes"),
    "negative-offset": (header({"w": entry(-4, 12)}), "data_offsets"),
    "overflow": (header({"w": entry(shape=(1 << 62, 4))}), "overflows"),
}


@pytest.mark.parametrize("case", HEADERS, ids=str)
def test_malformed_header(capsys, pair, case):
    content, message = HEADERS[case]
    (pair / "tune" / "model.safetensors").write_bytes(content)
    check(capsys, pair, recipe(pair), rf"tune/model\.safetensors: .*{message}")


def test_missing_shard(capsys, zoo):
    zoo.tune(zoo.base(shards=2), "tune", shards=3)
    (zoo.root / "tune" / "model-00002-of-00003.safetensors").unlink()
    check(capsys, zoo.root, recipe(zoo.root), "'model-00002-of-00003.safetensors' is missing")


def test_pickled_weights(capsys, pair):
    (pair / "tune" / "model.safetensors").unlink()
    (pair / "tune" / "pytorch_model.bin").write_bytes(b"PK")
    check(capsys, pair, recipe(pair), r"pickled .*save_pretrained")


def test_weights_are_a_folder(capsys, pair):
    (pair / "tune" / "model.safetensors").unlink()
    (pair / "tune" / "model.safetensors").mkdir()
    check(capsys, pair, recipe(pair), r"model\.safetensors: not a regular file")


def test_unreadable_file(capsys, pair, monkeypatch):
    """As for a file of another user; root, who may run the tests, could read it all the same."""
    opened = os.open

    def refuse(path, *args, dir_fd=None, **kwargs):
        folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        if os.path.join(folder, path).endswith("tune/model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, dir_fd=dir_fd, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    check(capsys, pair, recipe(pair), r"tune/model\.safetensors: cannot be read \(Permission")


def test_no_such_model(capsys, pair):
    made = recipe(pair, models=("base", "../nowhere/at all"))
    check(capsys, pair, made, "no such folder")


def altered(pair: Path, zoo, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Rewrites the fine-tune with its tensors changed."""
    config = json.loads((pair / "tune" / "config.json").read_text())
    tensors = zoo.read(pair / "tune")
    change(tensors)
    zoo.write("tune", tensors, config)


def test_missing_tensor(capsys, pair, zoo):
    altered(pair, zoo, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    check(capsys, pair, recipe(pair), r"tune' lacks tensor 'model\.layers\.1\.mlp\.up_proj")


def test_extra_tensor(capsys, pair, zoo):
    altered(pair, zoo, lambda tensors: tensors.update(extra=np.zeros((2, 2), np.float32)))
    check(capsys, pair, recipe(pair), "has tensor 'extra'")


def test_shape_mismatch(capsys, pair, zoo):
    name = "model.layers.0.mlp.down_proj.weight"
    altered(pair, zoo, lambda tensors: tensors.update({name: tensors[name][:, :-1]}))
    check(capsys, pair, recipe(pair), rf"tensor '{name}' is \[32, 48\] .* but \[32, 47\]")


def test_vocabulary_mismatch(capsys, zoo):
    zoo.base()
    zoo.base("tune", vocab=42)
    check(capsys, zoo.root, recipe(zoo.root), "vocabulary mismatch .* 40 rows .* 42")


# ---------------------------------------------------------------- recipes

RECIPES = {
    "unknown-method": ("merge_method: slrp\n", {}, r"recipe\.yml:1: .*'slrp'.*'slerp'"),
    "no-method": ("dtype: bfloat16\n", {}, "merge_method"),
    "unknown-key": (LINEAR + "paramters: {}\n", {}, r"recipe\.yml:2: .*'parameters'"),
    "unknown-parameter": (LINEAR, {"wieght": 1}, r"'wieght'.*'weight'"),
    "unknown-dtype": (LINEAR + "dtype: bfloat17\n", {}, r"recipe\.yml:2: .*'bfloat17'"),
    "unmergeable-dtype": (LINEAR + "dtype: int64\n", {}, "cannot merge in 'int64'"),
    "missing-weight": (LINEAR, {"scale": 1}, "'weight'"),
    "nan-weight": (LINEAR, {"weight": float("nan")}, "'weight' must be finite"),
    "word-weight": (LINEAR, {"weight": "much"}, "'weight' must be a number"),
    "not-yaml": ("merge_method: [linear\n", {}, r"recipe\.yml"),
    "not-a-mapping": ("- a\n- b\n# ", {}, r"recipe\.yml"),
}


@pytest.mark.parametrize("case", RECIPES, ids=str)
def test_recipe(capsys, pair, case):
    text, parameters, message = RECIPES[case]
    check(capsys, pair, recipe(pair, text, **parameters), message)


MIXTURES = {
    "gate": ({"gate_mode": "randm"}, "did you mean 'random'"),
    "few": ({"experts_per_token": 3}, "3 experts per token of the 2 that there are"),
    "prompts": ({"gate_mode": "cheap_embed"}, "needs 'positive_prompts:' for expert"),
    "layout": ({"architecture": "qwen3"}, "no layout for a mixture of 'llama' models"),
    "tokenizer": (
        {"gate_mode": "hidden", "experts": [["a"], ["b"]]},
        "needs the base model's tokenizer, and '.*base' has none",
    ),
}


@pytest.mark.parametrize("case", MIXTURES)
@pytest.mark.parametrize("command", ["moe", "merge", "plan", "mergekit-moe"])
def test_mixture(capsys, pair, command, case):
    keys, message = MIXTURES[case]
    prompts = keys.get("experts", [[], []])
    experts = [
        {"source_model": str(pair / name), "positive_prompts": own}
        for name, own in zip(("base", "tune"), prompts, strict=True)
    ]
    mixture = {"base_model": str(pair / "base"), "gate_mode": "random", "experts_per_token": 1}
    made = pair / "recipe.yml"
    made.write_text(yaml.safe_dump({**mixture, **keys, "experts": experts}))
    before = listing(pair)
    refused(capsys, [command, made, pair / "out"], message)
    assert listing(pair) == before


@pytest.mark.parametrize("density", [-0.5, 1.01, "half"])
def test_density(capsys, pair, density):
    text = f"merge_method: ties\nbase_model: {pair / 'base'}\n"
    made = recipe(pair, text, ("tune",), weight=1.0, density=density)
    check(capsys, pair, made, "'density' must be")


def test_slerp_of_three(capsys, pair, zoo):
    zoo.tune(pair / "base", "other", seed=5)
    text = f"merge_method: slerp\nbase_model: {pair / 'base'}\nparameters: {{t: 0.5}}\n"
    entries = [{"model": str(pair / name)} for name in ("base", "tune", "other")]
    made = pair / "recipe.yml"
    made.write_text(text + yaml.safe_dump({"models": entries}))
    check(capsys, pair, made, "slerp takes exactly 2 models, not 3")


def test_no_such_recipe(capsys, pair):
    check(capsys, pair, pair / "nothing.yml", r"nothing\.yml")


def test_recipe_is_a_folder(capsys, pair):
    check(capsys, pair, pair / "base", "base: ")


# ---------------------------------------------------------------- output and options


def test_output_exists(capsys, pair):
    (pair / "out").mkdir()
    (pair / "out" / "mine.txt").write_text("precious")
    check(capsys, pair, recipe(pair), "out: exists; .*--overwrite")


def test_overwrite_spares_what_is_no_model(capsys, pair):
    (pair / "out").mkdir()
    (pair / "out" / "mine.txt").write_text("precious")
    before = [*listing(pair), "recipe.yml"]
    refused(capsys, ["merge", recipe(pair), pair / "out", "--overwrite"], "not a model folder")
    assert listing(pair) == sorted(before)


@pytest.mark.parametrize("place", ["base", "tune"])
def test_output_is_input(capsys, pair, place):
    made = recipe(pair)
    before = listing(pair)
    refused(capsys, ["merge", made, pair / place, "--overwrite"], "the output .* the input")
    assert listing(pair) == before


def test_output_folder_has_no_parent(capsys, pair):
    made = recipe(pair)
    refused(capsys, ["merge", made, pair / "no" / "where" / "out"], "does not exist")
    assert not (pair / "no").exists()


def test_no_space(capsys, pair, monkeypatch):
    Free = namedtuple("Free", "f_bavail f_frsize")
    monkeypatch.setattr(os, "statvfs", lambda _: Free(3, 4096))
    check(capsys, pair, recipe(pair), "no space left: needs")


OPTIONS = {
    "memory": (["--memory-limit", "lots"], "--memory-limit: 'lots' is not a size"),
    "too little": (["--memory-limit", "1MiB"], "--memory-limit: 1MiB is less than"),
    "unit": (["--memory-limit", "5XB"], "--memory-limit: '5XB' is not a size"),
    "zero": (["--max-shard-size", "0"], "--max-shard-size: '0' must be more"),
    "threads": (["--threads", "0"], "--threads: 0 threads"),
    "seed": (["--seed", str(1 << 64)], "seed"),
}


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_option(capsys, pair, case):
    options, message = OPTIONS[case]
    made = recipe(pair)
    before = listing(pair)
    refused(capsys, ["merge", made, pair / "out", *options], message)
    assert listing(pair) == before


def test_other_commands(capsys, pair):
    refused(capsys, ["info", pair / "nothing"], "nothing: no such folder")
    refused(capsys, ["diff", pair / "base", pair / "nothing"], "nothing: no such folder")
    refused(capsys, ["methods", "karchr"], "unknown method 'karchr'; did you mean 'karcher'")


# ---------------------------------------------------------------- as a process


def process(arguments: list[object], **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    return subprocess.run(
        [*command, "-m", "fastmerge", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **kwargs,
    )


def ends_in_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert re.search(message, lines[0]), done.stderr


VARIABLES = {
    "FASTMERGE_NUM_THREADS": ("many", "FASTMERGE_NUM_THREADS: 'many'"),
    "FASTMERGE_ISA": ("sse9", "sse9.*scalar"),
}


@pytest.mark.parametrize("variable", VARIABLES)
def test_environment(pair, variable):
    value, message = VARIABLES[variable]
    made = recipe(pair)
    before = listing(pair)
    done = process(["merge", made, pair / "out", "-q"], env={**os.environ, variable: value})
    ends_in_one_line(done, message)
    assert listing(pair) == before


def test_process_refuses(pair):
    (pair / "tune" / "model.safetensors").write_bytes(b"\xff" * 20)
    made = recipe(pair)
    before = listing(pair)
    ends_in_one_line(process(["merge", made, pair / "out"]), "header length")
    assert listing(pair) == before


def test_disk_fills_up(pair):
    """A file-size limit stops the writes, as a full disk would."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    made = recipe(pair)
    done = process(["merge", made, pair / "out", "-q"], preexec_fn=limit)
    ends_in_one_line(done, "larger than this file system or the process may write")
    assert not (pair / "out").exists()

"""A stranger's adapter: its names, expressions and values take bounded time and are one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import fastmerge
from fastmerge import api
from fastmerge.errors import FastmergeError, UnsupportedError
from fastmerge.models.adapter import CONFIG, WEIGHTS, Adapter
from fastmerge.models.architecture import layer_of
from fastmerge.models.names import renamed
from fastmerge.models.patterns import Patterns, Targets

MODULE = "model.layers.0.self_attn.q_proj"


def adapter(
    folder: Path, *, module: str = MODULE, size: int = 8, more: Any = (), **config: Any
) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(3)
    tensors = {
        f"base_model.model.{module}.lora_A.weight": rng.normal(size=(2, size)).astype(np.float32),
        f"base_model.model.{module}.lora_B.weight": rng.normal(size=(size, 2)).astype(np.float32),
    }
    safetensors.numpy.save_file(tensors | dict(more), folder / WEIGHTS)
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [module]}
    (folder / CONFIG).write_text(json.dumps(said | config))
    return folder


def refusal(work: Any) -> str:
    begun = time.process_time()
    with pytest.raises(FastmergeError) as caught:
        work()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1700
    assert time.process_time() - begun < 20  # of CPU time; what is refused took hours
    return str(caught.value)


@pytest.mark.parametrize("value", [[], {}, 7, True, ["x"]])
@pytest.mark.parametrize("key", ["revision", "base_model_name_or_path", "task_type"])
def test_what_is_no_text_where_text_is_due(tmp_path: Path, key: str, value: Any) -> None:
    odd = adapter(tmp_path / "odd", **{key: value})
    good = adapter(tmp_path / "good")
    for work in (
        lambda: Adapter.open(odd),
        lambda: fastmerge.merge_adapters([good, odd], tmp_path / "out", weights=[1, 1]),
    ):
        assert f"'{key}' must be text" in refusal(work)


@pytest.mark.parametrize("shape", [(), (0,), (3, 8)])
def test_rows_without_their_numbers(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = {name: np.ones(shape, np.float32)}
    odd = adapter(tmp_path / "odd", more=rows, trainable_token_indices=[1])
    said = refusal(lambda: Adapter.open(odd))
    assert "trainable_token_indices" in said and str(list(shape)) in said


@pytest.mark.parametrize(
    "name", ["." * 100_000 + "q_proj", "layers.1." * 10_000 + "q_proj", "m" * 513]
)
def test_long_names_are_no_module_s(zoo, tmp_path: Path, name: str) -> None:
    odd = adapter(tmp_path / "odd", module=name)
    assert "letters" in refusal(lambda: Adapter.open(odd))
    base = zoo.base("base")
    tensors = zoo.read(base) | {f"{name}.weight": np.ones((4, 4), np.float32)}
    config = json.loads((base / "config.json").read_text())
    pair = [zoo.write(each, tensors, config, dtype="F32") for each in ("one", "two")]
    out = tmp_path / "extracted"
    assert "letters" in refusal(lambda: fastmerge.extract_lora(*pair, out, rank=2))


@pytest.mark.parametrize(
    "text", ["a?" * 64 + "a" * 64, "(a|aa)" * 40 + "x", "a?" * 30 + ".*x", "(a|b|(c|d)|[)]?)" * 15]
)
def test_choices_after_choices_are_not_tried(text: str) -> None:
    """No repetition, and yet as many ways as there are subsets."""
    with pytest.raises(UnsupportedError, match="could take for ever"):
        Targets({"target_modules": text}, "x").tell("a" * 64)
    with pytest.raises(UnsupportedError, match="could take for ever"):
        Patterns({text: 2}, "x").of("a" * 64, 1)


def test_many_expressions_and_many_names_are_one_effort() -> None:
    patterns = Patterns({f"{i}.*.*x": 2 for i in range(300)}, "'rank_pattern'")
    names = ["a." * 250 for _ in range(1000)]
    assert "could take for ever" in refusal(lambda: [patterns.of(name, 1) for name in names])
    many = {f"{'a' * 4000}{i}.*": 2 for i in range(100)}
    assert "could take for ever" in refusal(lambda: Patterns(many, "'rank_pattern'"))
    real = r".*\.(self_attn|mlp)\..*(q|k|v|o|gate|up|down)_proj"
    targets = Targets({"target_modules": real}, "x")
    module = "language_model.model.layers.{}.mlp.experts.{}.up_proj"
    assert all(targets.tell(module.format(i, j)) for i in range(60) for j in range(40))


def test_the_first_of_many_stacks_counts() -> None:
    begun = time.process_time()
    said = {"target_modules": ["up_proj"], "layers_to_transform": [3]}
    stacks = [f"s{i}" for i in range(100_000)]
    targets = Targets(said | {"layers_pattern": [*stacks, "mlp.experts", "layers", "s1"]}, "x")
    assert all(targets.tell(f"model.layers.{i}.mlp.experts.3.up_proj") for i in range(2000))
    assert not targets.tell("model.layers.3.mlp.experts.4.up_proj")
    assert targets.tell("layers.3.up_proj") and not targets.tell("xlayers.3.up_proj")
    assert targets.tell("layers.3.layers.4.up_proj")
    assert time.process_time() - begun < 10  # each module tried each name


@pytest.mark.parametrize("number", ["9" * 5000, "\u0661\u0662", "\u00b2", "01", "1" * 10])
def test_a_layer_s_number_is_as_it_is_written_again(zoo, number: str) -> None:
    """int() refuses 5000 digits and takes Arabic ones; "01" became layer 1's second tensor."""
    name = f"model.layers.{number}.mlp.extra.weight"
    assert layer_of(name) is None
    base = zoo.base("base")
    tensors = zoo.read(base) | {name: np.ones(4, np.float32)}
    config = json.loads((base / "config.json").read_text())
    pair = [zoo.write(each, tensors, config, dtype="F32") for each in ("one", "two")]
    recipe = {
        "merge_method": "slerp",
        "base_model": str(pair[0]),
        "models": [{"model": str(each)} for each in pair],
        "parameters": {"t": [0.1, 0.9]},
    }
    assert name in {item.name for item in api.plan(recipe).tensors}


def test_names_of_many_parts_are_compared_at_their_beginnings() -> None:
    deep = "layers." * 20_000
    begun = time.process_time()
    assert renamed([f"a.{deep}x"], [f"b.{deep}x"]) == ("a.", "b.")
    assert renamed([f"a.{deep}x"], [f"b.{deep}y"]) is None
    assert time.process_time() - begun < 10


@pytest.mark.parametrize("value", [3e38, -3e38, np.inf, np.nan])
def test_differences_that_float32_cannot_multiply(zoo, tmp_path: Path, value: float) -> None:
    """LAPACK said that its eigenvalues did not converge."""
    base = zoo.base("base", dtype="F32")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = zoo.read(base)
    tensors[name] = np.full_like(tensors[name], value)
    tuned = zoo.write("tuned", tensors, json.loads((base / "config.json").read_text()), dtype="F32")
    said = refusal(lambda: fastmerge.extract_lora(tuned, base, tmp_path / "out", rank=2))
    assert name in said and "NaN or infinite" in said
    assert not (tmp_path / "out").exists()


def test_factors_that_leave_their_type_are_told(tmp_path: Path) -> None:
    pair = [adapter(tmp_path / name, lora_alpha=1e7) for name in ("one", "two")]
    report = fastmerge.merge_adapters(
        pair, tmp_path / "out", weights=[1, 1], method="cat", dtype="float16"
    )
    written = safetensors.numpy.load_file(tmp_path / "out" / WEIGHTS)
    wanted = {n: int((~np.isfinite(array)).sum()) for n, array in written.items()}
    assert report.nonfinite == {name: count for name, count in wanted.items() if count}
    assert report.nonfinite
    assert fastmerge.verify(tmp_path / "out").whole
    fine = fastmerge.merge_adapters(pair, tmp_path / "fine", weights=[1, 1], method="cat")
    assert not fine.nonfinite


def test_many_names_of_rows_are_not_tried_for_each_module(tmp_path: Path) -> None:
    rows = {
        f"base_model.model.m{i}.token_adapter.trainable_tokens_delta": np.ones((1, 4), np.float32)
        for i in range(3000)
    }
    said = (
        {f"k{i}": [0] for i in range(200_000)} | {"m7": [7]} | {f"m{i}": [0] for i in range(3000)}
    )
    folder = adapter(tmp_path / "odd", more=rows, trainable_token_indices=said)
    begun = time.process_time()
    found = Adapter.open(folder).tokens
    assert time.process_time() - begun < 20
    assert len(found) == 3000 and found["m7"].indices == (0,) and found["m8"].indices == (0,)


def test_the_first_name_of_rows_that_fits_counts(tmp_path: Path) -> None:
    rows = {
        "base_model.model.a.b.token_adapter.trainable_tokens_delta": np.ones((1, 4), np.float32)
    }
    for first, second in (("b", "a.b"), ("a.b", "b")):
        said = {"c": [1], first: [2], second: [3]}
        folder = adapter(tmp_path / first, more=rows, trainable_token_indices=said)
        assert Adapter.open(folder).tokens["a.b"].indices == (2,)

"""mergekit's run_merge, taken over: the same call with mergekit's own objects gives the same
folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import fastmerge
from fastmerge import FastmergeError
from fastmerge.integrations.mergekit import run_merge

RECIPE = """\
# as its author wrote it
models:
  - model: {base}
    parameters: {{weight: 0.3}}
  - model: {tune}
    parameters: {{weight: 0.7}}
merge_method: linear
dtype: float32
out_dtype: bfloat16
"""


@pytest.fixture
def recipe(zoo) -> str:
    base = zoo.base()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (base / "generation_config.json").write_text('{"max_length": 9}')
    return RECIPE.format(base=base, tune=zoo.tune(base, "tune"))


def pathless(recipe: str, folder: Path) -> str:
    """As it is written beside the weights: without the way to the models."""
    return recipe.replace(str(folder), ".")


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_the_same_call_gives_what_mergekit_gives(recipe: str, zoo, tmp_path: Path) -> None:
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
    options = MergeOptions(num_threads=2, copy_tokenizer=False, quiet=True, lazy_unpickle=True)
    report = run_merge(config, str(tmp_path / "ours"), options=options, config_source=recipe)
    mergekit.merge.run_merge(
        config, str(tmp_path / "theirs"), options=options, config_source=recipe
    )
    ours, theirs = zoo.read(tmp_path / "ours"), zoo.read(tmp_path / "theirs")
    assert report.tensors == len(theirs) == len(ours) > 20
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert (tmp_path / "ours" / "mergekit_config.yml").read_text() == pathless(recipe, tmp_path)
    assert names(tmp_path / "theirs") - names(tmp_path / "ours") <= {
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }


def test_options_are_followed(recipe: str, tmp_path: Path) -> None:
    def merged(out: str, **options: object) -> Path:
        run_merge(recipe, tmp_path / out, options)
        return tmp_path / out

    whole = merged("whole")
    assert {"README.md", "mergekit_config.yml", "tokenizer_config.json"} <= names(whole)
    assert (whole / "mergekit_config.yml").read_text() == pathless(recipe, tmp_path)
    run_merge(recipe, tmp_path / "kept", keep_paths=True)
    assert (tmp_path / "kept" / "mergekit_config.yml").read_text() == recipe
    bare = merged("deep/bare", copy_tokenizer=False, write_model_card=False)
    assert names(whole) - names(bare) == {
        "README.md",
        "mergekit_config.yml",
        "tokenizer_config.json",
    }
    assert "generation_config.json" in names(bare)
    shards = merged("shards", out_shard_size=20_000)
    weight_map = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1


def test_the_seed_is_followed(recipe: str, zoo, tmp_path: Path) -> None:
    data = yaml.safe_load(recipe)
    data |= {"merge_method": "dare_linear", "base_model": data["models"][0]["model"]}
    for model in data["models"]:
        model["parameters"]["density"] = 0.5
    for out, seed in (("one", 1), ("again", 1), ("two", 2)):
        assert run_merge(data, tmp_path / out, {"random_seed": seed}).seed == seed
    one, again, two = (zoo.read(tmp_path / out) for out in ("one", "again", "two"))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not all(np.array_equal(one[name], two[name]) for name in one)


def test_a_model_is_replaced_on_request_only(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder, as tempfile makes them, is no model
    run_merge(recipe, out)
    with pytest.raises(FastmergeError, match="exists"):
        run_merge(recipe, out)
    seen = []
    run_merge(recipe, out, overwrite=True, progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"safe_serialization": False}, "safe_serialization: .* safetensors only"),
        ({"transformers_cache": "/somewhere"}, "transformers_cache: .* HF_HUB_CACHE"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES=1"),
        ({"device": "xpu"}, "device: unknown 'xpu'; use cpu, cuda, auto"),
        ({"num_thread": 2}, "unknown 'num_thread'; did you mean 'num_threads'"),
        (3, "options: int is neither"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    recipe: str, tmp_path: Path, options: object, message: str
) -> None:
    with pytest.raises(FastmergeError, match=message):
        run_merge(recipe, tmp_path / "deep" / "out", options)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("options", [{"cuda": True}, {"gpu_rich": True}, {"device": "cuda"}])
def test_a_gpu_is_asked_for(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    asked = []

    def merge_plan(*_: object, device: str, **__: object) -> None:
        asked.append(device)

    monkeypatch.setattr(fastmerge.integrations.mergekit, "merge_plan", merge_plan)
    run_merge(recipe, tmp_path / "out", options)
    assert asked == ["cuda"]


def test_a_tokenizer_that_the_recipe_asks_for_is_written(recipe: str, tmp_path: Path) -> None:
    data = yaml.safe_load(recipe)
    data["tokenizer_source"] = "base"
    data["base_model"] = data["models"][0]["model"]
    run_merge(data, tmp_path / "out", {"copy_tokenizer": False})
    assert "tokenizer_config.json" in names(tmp_path / "out")

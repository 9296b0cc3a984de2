"""mergekit's run_merge, taken over: the same call with mergekit's own objects gives the same
folder."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import yaml

import fastmerge
from fastmerge import FastmergeError
from fastmerge.compute import devices
from fastmerge.errors import RecipeError
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


def test_a_model_is_replaced(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder, as tempfile makes them, is no model
    run_merge(recipe, out)
    with pytest.raises(FastmergeError, match="exists"):
        run_merge(recipe, out, overwrite=False)
    seen = []
    run_merge(recipe, out, progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1]
    (out / "thesis.tex").write_text("x")
    with pytest.raises(FastmergeError, match=r"holds thesis\.tex, which no merge wrote"):
        run_merge(recipe, out)
    assert (out / "thesis.tex").exists()


def test_an_output_may_lie_in_an_inputs_folder(recipe: str, zoo, tmp_path: Path) -> None:
    """As TRL's callback writes checkpoint-N/merged; a second time over what is there."""
    run_merge(recipe, tmp_path / "beside")
    inside = tmp_path / "base" / "merged"
    inside.mkdir()
    (inside / "README.md").write_text("of a merge that was interrupted")
    (inside / "config.json").write_text("{}")
    for _ in range(2):
        run_merge(recipe, inside)
        assert names(inside) == names(tmp_path / "beside")
    one, two = zoo.read(inside), zoo.read(tmp_path / "beside")
    assert all(np.array_equal(value, two[name]) for name, value in one.items())
    with pytest.raises(FastmergeError, match="would replace the input"):
        run_merge(recipe, tmp_path / "base")


def test_transformers_cache_is_huggingface_hubs(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot_download(name: str, *, cache_dir: Path | None, **_: object) -> str:
        asked.append((name, cache_dir))
        return str(tmp_path / "tune")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    text = recipe.replace(str(tmp_path / "tune"), "somebody/tune")
    run_merge(text, tmp_path / "out", {"transformers_cache": str(tmp_path / "cache")})
    assert set(asked) == {("somebody/tune", tmp_path / "cache")}


def test_a_namespace_holds_other_arguments_too(recipe: str, tmp_path: Path) -> None:
    options = Namespace(config="x.yml", out="y", write_model_card=False, random_seed=None)
    run_merge(recipe, tmp_path / "out", options)
    assert "README.md" not in names(tmp_path / "out")
    with pytest.raises(FastmergeError, match="did you mean 'num_threads'"):
        run_merge(recipe, tmp_path / "out", Namespace(num_thread=2))


def test_errors_about_recipe_and_models_are_value_errors(recipe: str, zoo, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown method 'lniear'") as caught:
        run_merge(recipe.replace("linear", "lniear"), tmp_path / "out")
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), RecipeError)
    zoo.base("other", vocab=44)
    with pytest.raises(ValueError, match="Tensor size mismatch: recipe"):
        run_merge(recipe.replace(str(tmp_path / "tune"), str(tmp_path / "other")), tmp_path / "out")


def test_one_gpu_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_devices", lambda: ["cuda:0", "cuda:1"])
    assert devices.choose_devices("cuda:1", [], lambda _: None)[0] == ["cuda:1"]
    assert devices.choose_devices("cuda", [], lambda _: None)[0] == ["cuda:0", "cuda:1"]
    with pytest.raises(FastmergeError, match="device cuda:2: this machine has cuda:0, cuda:1"):
        devices.choose_devices("cuda:2", [], lambda _: None)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"safe_serialization": False}, "safe_serialization=False: .* safetensors only"),
        ({"transformers_cache": 3}, "transformers_cache: must be a path, not 3"),
        ({"device": "cuda:x"}, "device: unknown 'cuda:x'; use cpu, cuda, auto"),
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


@pytest.mark.parametrize(
    "options", [{"cuda": True}, {"gpu_rich": True}, {"multi_gpu": True}, {"device": "cuda"}]
)
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

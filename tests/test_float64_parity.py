"""Merges of float64 models in float64: mergekit 0.1.5's to 1e-12 of a tensor's mean size, where
nothing is drawn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fastmerge
from tests.conftest import llama_config, llama_shapes

NEAR = 1e-12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("float64")
    random = torch.Generator().manual_seed(1)
    config = llama_config(layers=3) | {"torch_dtype": "float64"}

    def normal(size: float) -> dict[str, torch.Tensor]:
        shapes = llama_shapes(config).items()
        return {n: size * torch.randn(s, generator=random, dtype=torch.float64) for n, s in shapes}

    base = normal(0.02)
    models = {"base": base}
    models |= {n: {k: base[k] + d for k, d in normal(0.001).items()} for n in "abc"}
    for name, state in models.items():
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps(config))
        kind = torch.bfloat16 if name == "c" else torch.float64
        state = {k: x.to(kind) for k, x in state.items()}
        save_file(state, made / name / "model.safetensors", metadata={"format": "pt"})
    return made


def listed(names: str, **parameters: float) -> list[dict[str, Any]]:
    return [{"model": f"./{name}", "parameters": dict(parameters)} for name in names]


_SPARSE = {"density": 0.6, "weight": 0.6}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"models": listed("abc", weight=0.3)},
    "slerp": {"models": listed("ab"), "base_model": "./a", "parameters": {"t": 0.25}},
    "nuslerp": {"models": listed("ab", weight=0.75)},
    "nuslerp by row": {
        "models": listed("ab", weight=0.75),
        "base_model": "./base",
        "parameters": {"nuslerp_flatten": False},
    },
    "multislerp": {"models": listed("abc", weight=0.4)},
    "karcher": {"models": listed("abc")},
    "model_stock": {"models": listed("abc"), "base_model": "./base"},
    "task_arithmetic": {
        "models": listed("abc", weight=0.6),
        "base_model": "./base",
        "parameters": {"lambda": 0.7},
    },
    "ties": {"models": listed("abc", **_SPARSE), "base_model": "./base"},
    "breadcrumbs": {"models": listed("abc", gamma=0.1, **_SPARSE), "base_model": "./base"},
    "breadcrumbs_ties": {"models": listed("abc", gamma=0.1, **_SPARSE), "base_model": "./base"},
    "sce": {"models": listed("abc"), "base_model": "./base", "parameters": {"select_topk": 0.3}},
    "ram": {"models": listed("abc"), "base_model": "./base", "parameters": {"epsilon": 5e-4}},
    "nearswap": {"models": listed("a"), "base_model": "./base", "parameters": {"t": 3e-4}},
    # Without out_dtype mergekit writes float32.
    "arcee_fusion": {"models": listed("a"), "base_model": "./base", "out_dtype": "float64"},
    "passthrough": {"models": listed("a", scale=0.3)},
}


@pytest.mark.parametrize("case", CASES)
def test_float64_is_mergekits(case: str, folder: Path, tmp_path: Path, monkeypatch) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    monkeypatch.chdir(folder)
    recipe = {"merge_method": case.partition(" ")[0], "dtype": "float64", **CASES[case]}
    fastmerge.merge(recipe, tmp_path / "ours", threads=2)
    run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe))),
        out_path=str(tmp_path / "theirs"),
        options=MergeOptions(quiet=True, copy_tokenizer=False),
    )
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.float64
        off = (tensor - theirs[name]).abs().max() / theirs[name].abs().mean()
        assert off <= NEAR, name
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("ours", "theirs")]
    assert configs[0]["torch_dtype"] == configs[1].get("dtype", "float64") == "float64"

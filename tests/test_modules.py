"""``modules:`` of multimodal and encoder-decoder models: each part by its own recipe, or copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge.errors import FastmergeError
from fastmerge.models.module_names import part_of
from fastmerge.planning.planner import make_plan

LLAVA = {
    "model.language_model.embed_tokens.weight": "text",
    "model.language_model.layers.0.mlp.up_proj.weight": "text",
    "model.language_model.layers.1.mlp.up_proj.weight": "text",
    "model.language_model.norm.weight": "text",
    "lm_head.weight": "text",
    "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": "vision",
    "model.multi_modal_projector.linear_1.weight": "projector",
    "model.multi_modal_projector.linear_1.bias": "projector",
}
WHISPER = {
    "model.encoder.conv1.weight": "encoder",
    "model.encoder.layers.0.fc1.weight": "encoder",
    "model.decoder.embed_tokens.weight": "decoder",
    "model.decoder.layers.0.fc1.weight": "decoder",
    "proj_out.weight": "text",
}


@pytest.fixture
def models(zoo, monkeypatch: pytest.MonkeyPatch) -> Any:
    for seed, name in enumerate(("a", "b", "c")):
        rng = np.random.default_rng(seed)
        zoo.write(
            name,
            {tensor: rng.normal(size=8 if "bias" in tensor else (4, 8)) for tensor in LLAVA},
            {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
            dtype="F32",
        )
    monkeypatch.chdir(zoo.root)
    return zoo


def recipe(**modules: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "base_model": "a", "modules": modules}


def both(a: float, b: float, of: str = "b") -> dict[str, Any]:
    listed = [
        {"model": model, "parameters": {"weight": weight}} for model, weight in (("a", a), (of, b))
    ]
    return {"models": listed}


@pytest.mark.parametrize("name, part", [*LLAVA.items(), *WHISPER.items()])
def test_a_tensors_name_says_its_part(name: str, part: str) -> None:
    assert part_of(name) == part


@pytest.mark.parametrize(
    "name, part",
    [
        ("visual.blocks.0.attn.qkv.weight", "vision"),
        ("visual.merger.mlp.0.weight", "projector"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "text"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", "vision"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder"),
        ("decoder.final_layer_norm.weight", "decoder"),
        ("shared.weight", "text"),
    ],
)
def test_old_layouts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_each_module_by_its_recipe(models) -> None:
    modules = {"text_decoder": both(1, 3), "vision_tower": both(1, 1, of="c")}
    fastmerge.merge(recipe(**modules), "out")
    a, b, c, out = (models.read(Path(name)) for name in ("a", "b", "c", "out"))
    assert list(out) == list(a)
    for name, part in LLAVA.items():
        expected = {
            "text": (a[name] + 3 * b[name]) / 4,
            "vision": (a[name] + c[name]) / 2,
            "projector": a[name],
        }[part]
        np.testing.assert_allclose(out[name], expected, rtol=1e-6, err_msg=name)
    notes = make_plan(recipe(**modules)).notes
    assert "no module makes the projector part: copied from 'a'" in notes


@pytest.mark.usefixtures("models")
def test_all_modules_alike_are_the_whole_model() -> None:
    alike = make_plan(recipe(text=both(1, 3), vision=both(1, 3), projector=both(1, 3)))
    whole = make_plan({"merge_method": "linear", "base_model": "a", **both(1, 3)})
    assert alike.key == whole.key


@pytest.mark.usefixtures("models")
def test_a_modules_parameters_come_between() -> None:
    plain = {"models": [{"model": "a"}, {"model": "b"}]}
    data = recipe(text={**plain, "parameters": {"weight": 2}}, vision=plain)
    data["parameters"] = {"weight": 1}
    weights = {
        part_of(t.name): t.root.operand_values[0]["weight"]
        for t in make_plan(data).tensors
        if part_of(t.name) != "projector"
    }
    assert weights == {"text": 2, "vision": 1}


@pytest.mark.usefixtures("models")
def test_a_copied_part_is_cast_as_the_others() -> None:
    plan = make_plan({**recipe(text=both(1, 1)), "dtype": "bfloat16"})
    assert {tensor.dtype.name for tensor in plan.tensors} == {"bfloat16"}


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    "modules, expected",
    [
        ({"audio": both(1, 1)}, "'a' has no module 'audio'; it has text, vision, projector"),
        ({"txt": both(1, 1)}, "'a' has no module 'txt'; it has text, vision, projector"),
        (
            {"model.language_model.layers": both(1, 1)},
            "it has text, vision, projector; the layers so named are of text",
        ),
        ({"text": both(1, 1), "text_decoder": both(1, 1)}, "means the text part a second time"),
        ({"default": both(1, 1), "text": both(1, 1)}, "'default' is the whole model"),
        ({"text": {"models": [{"model": "a"}]}}, "needs 'weight' for model 'a'"),
    ],
)
def test_what_is_refused(modules: dict[str, Any], expected: str) -> None:
    with pytest.raises(FastmergeError) as caught:
        make_plan(recipe(**modules))
    assert expected in str(caught.value)

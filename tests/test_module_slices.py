"""``slices:`` inside a module of ``modules:``: layers of one part stacked, the others whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge.errors import FastmergeError
from fastmerge.models.architecture import layer_of
from fastmerge.models.config import PartLayers, part_layers
from fastmerge.models.module_names import part_of, row_of
from fastmerge.planning.planner import make_plan

TEXT, VISION = "model.language_model.layers", "model.vision_tower.vision_model.encoder.layers"
BEFORE = "model.vision_tower.vision_model.embeddings.class_embedding"
BEHIND = "model.vision_tower.vision_model.post_layernorm.weight"
LLAVA = [
    "model.language_model.embed_tokens.weight",
    *(f"{TEXT}.{i}.mlp.up_proj.weight" for i in range(4)),
    "model.language_model.norm.weight",
    "lm_head.weight",
    BEFORE,
    *(f"{VISION}.{i}.mlp.fc1.weight" for i in range(3)),
    BEHIND,
    "model.multi_modal_projector.linear_1.weight",
]
CONFIG = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"num_hidden_layers": 4, "window_layers": [0, 2]},
    "vision_config": {"num_hidden_layers": 3, "fullatt_block_indexes": [0, 2]},
}

# ---------------------------------------------------------------- made by hand


@pytest.fixture
def models(zoo, monkeypatch: pytest.MonkeyPatch) -> Any:
    for seed, name in enumerate(("a", "b", "c")):
        rng = np.random.default_rng(seed)
        tensors = {tensor: rng.normal(size=(4, 8)) for tensor in LLAVA}
        zoo.write(name, tensors, CONFIG, dtype="F32")
    monkeypatch.chdir(zoo.root)
    return zoo


def run(*sources: tuple[str, int, int], **own: Any) -> dict[str, Any]:
    """A slice of ``sources``: model, first layer, end."""
    return {"sources": [{"model": m, "layer_range": [a, b]} for m, a, b in sources], **own}


def recipe(modules: Mapping[str, Any], method: str = "passthrough", **more: Any) -> dict[str, Any]:
    return {"merge_method": method, "modules": dict(modules), **more}


def test_layers_of_one_module_alone_are_renumbered(models) -> None:
    stacked = {"slices": [run(("a", 0, 2)), run(("b", 0, 3))]}
    whole = {"models": [{"model": "c"}]}
    plan = fastmerge.plan(recipe({"vision_tower": stacked, "text_decoder": whole}))
    fastmerge.merge(recipe({"vision_tower": stacked, "text_decoder": whole}), "out")
    a, b, c, out = (models.read(Path(name)) for name in ("a", "b", "c", "out"))
    came_from = {
        **{name: (c, name) for name in LLAVA if part_of(name) == "text"},
        "model.multi_modal_projector.linear_1.weight": (a, LLAVA[-1]),  # copied: no module's
        BEFORE: (a, BEFORE),  # the first slice's
        BEHIND: (b, BEHIND),  # the last one's
        **{
            f"{VISION}.{i}.mlp.fc1.weight": (of, f"{VISION}.{number}.mlp.fc1.weight")
            for i, (of, number) in enumerate([(a, 0), (a, 1), (b, 0), (b, 1), (b, 2)])
        },
    }
    assert out.keys() == came_from.keys()
    for name, (of, origin) in came_from.items():
        np.testing.assert_array_equal(out[name], of[origin], err_msg=name)
    config = json.loads(Path("out/config.json").read_text())
    assert config["vision_config"] == {
        "num_hidden_layers": 5,
        "fullatt_block_indexes": [0, 2, 4],
    }
    assert config["text_config"] == CONFIG["text_config"]
    assert "no module makes the projector part: copied from 'a'" in plan.notes


@pytest.mark.usefixtures("models")
def test_the_language_model_of_a_multimodal_one_is_stacked() -> None:
    plan = make_plan(recipe({"text": {"slices": [run(("a", 0, 4)), run(("b", 2, 4))]}}))
    layers = [layer_of(tensor.name) for tensor in plan.tensors]
    assert [place.number for place in layers if place and place.stack == TEXT] == list(range(6))
    assert plan.config["text_config"] == {"num_hidden_layers": 6, "window_layers": [0, 2, 4]}
    assert plan.config["vision_config"] == CONFIG["vision_config"]


@pytest.mark.usefixtures("models")
def test_parameters_of_a_slice_before_its_modules_and_the_recipes() -> None:
    pair = (("a", 0, 2), ("b", 0, 2))
    slices = [run(*pair, parameters={"t": 0.1}), run(*pair)]
    given = recipe(
        {"vision": {"slices": slices, "parameters": {"t": [0.2, 0.4]}}, "text": both("a", "b")},
        "slerp",
        base_model="a",
        parameters={"t": 0.7},
    )
    found = {tensor.name: tensor.root for tensor in make_plan(given).tensors}
    t = [found[f"{VISION}.{i}.mlp.fc1.weight"].values["t"] for i in range(4)]
    assert t == [0.1, 0.1, 0.2, 0.4]
    assert found[BEFORE].values["t"] == 0.1
    assert found[BEHIND].values["t"] == 0.2
    assert found["lm_head.weight"].values["t"] == 0.7


def both(*names: str) -> dict[str, Any]:
    return {"models": [{"model": name} for name in names]}


@pytest.mark.usefixtures("models")
def test_slices_of_all_layers_are_the_whole_model() -> None:
    text, vision = run(("a", 0, 4), ("b", 0, 4)), run(("a", 0, 3), ("b", 0, 3))
    sliced = {"text": {"slices": [text]}, "vision": {"slices": [vision]}}
    whole = dict.fromkeys((*sliced, "projector"), both("a", "b"))
    given = {"method": "linear", "parameters": {"weight": 1}}
    assert (
        make_plan(recipe({**sliced, "projector": both("a", "b")}, **given)).key
        == make_plan(recipe(whole, **given)).key
    )


@pytest.mark.usefixtures("models")
def test_a_seed_follows_from_the_slices() -> None:
    def seed(end: int) -> int | None:
        slices = [run(("a", 0, end), ("b", 0, end))]
        return make_plan(
            recipe({"vision": {"slices": slices}}, "dare_linear", base_model="a",
                   parameters={"weight": 1, "density": 0.5})
        ).seed  # fmt: skip

    assert seed(2) == seed(2)
    assert seed(2) != seed(3)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    "modules, expected",
    [
        (
            {"vision": {"slices": [run(("a", 0, 4))]}},
            "layer_range [0, 4] is out of range: 'a' has 3 layers",
        ),
        (
            {"projector": {"slices": [run(("a", 0, 1))]}},
            "part of 'a' has no layers, so 'slices:' cannot choose among them; list whole models",
        ),
        (
            {"vision": {"slices": [run(("a", 0, 1))], **both("b")}},
            "give either 'models:' or 'slices:'",
        ),
        ({"text": {"slices": [run(("d", 0, 1))]}}, "no layer 3: no tensor is named"),
        ({"vision": {"slices": [run(("e", 0, 3))] * 2}}, "does not count the 3 layers"),
        (
            {"vision": {"slices": [run(("f", 0, 1))]}},
            "has several stacks of layers (vision_model.layers.0., vision_model.blocks.0.)",
        ),
    ],
)
def test_what_is_refused(modules: dict[str, Any], expected: str, zoo) -> None:
    rng = np.random.default_rng(9)
    broken = {name: rng.normal(size=(4, 8)) for name in LLAVA if f"{TEXT}.3" not in name}
    zoo.write("d", broken, CONFIG)
    zoo.write("e", {name: rng.normal(size=(4, 8)) for name in LLAVA}, {"model_type": "llava"})
    two = {f"vision_model.{stack}.0.w.weight": rng.normal(size=4) for stack in ("layers", "blocks")}
    zoo.write("f", {**two, "lm_head.weight": rng.normal(size=(4, 8))}, CONFIG)
    with pytest.raises(FastmergeError) as caught:
        make_plan(recipe(modules))
    assert expected in str(caught.value)


@pytest.mark.usefixtures("models")
def test_slices_of_a_whole_multimodal_model_name_the_module() -> None:
    with pytest.raises(FastmergeError, match="give the slices under 'modules: text:'"):
        make_plan({"merge_method": "passthrough", "slices": [run(("a", 0, 2))]})


@pytest.mark.usefixtures("models")
def test_a_layer_with_a_merger_of_its_own_is_given_once(zoo) -> None:
    config = {**CONFIG, "vision_config": {"depth": 3, "deepstack_visual_indexes": [1]}}
    rng = np.random.default_rng(9)
    zoo.write("g", {name: rng.normal(size=(4, 8)) for name in LLAVA}, config)

    def plan(*ranges: tuple[int, int]) -> Any:
        slices = [run(("g", *layers)) for layers in ranges]
        return make_plan(recipe({"vision": {"slices": slices}}))

    found = plan((0, 1), (0, 3)).config["vision_config"]
    assert found == {"depth": 4, "deepstack_visual_indexes": [2]}
    with pytest.raises(FastmergeError, match="takes 1 layers by deepstack_visual_indexes"):
        plan((0, 2), (1, 3))


# ---------------------------------------------------------------- what configs and names say


@pytest.mark.parametrize(
    "config, part, expected",
    [
        ({"vision_config": {"depth": 7}}, "vision", PartLayers(("vision_config",), ("depth",), 7)),
        (
            {"thinker_config": {"audio_config": {"encoder_layers": 7, "num_hidden_layers": 7}}},
            "audio",
            PartLayers(
                ("thinker_config", "audio_config"), ("encoder_layers", "num_hidden_layers"), 7
            ),
        ),
        ({"num_hidden_layers": 7}, "vision", PartLayers(None)),
        (  # whisper and bart: the usual name counts the encoder's
            {"encoder_layers": 3, "decoder_layers": 4, "num_hidden_layers": 3},
            "encoder",
            PartLayers((), ("encoder_layers", "num_hidden_layers"), 3),
        ),
        (
            {"encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3},
            "decoder",
            PartLayers((), ("decoder_layers",), 3),
        ),
        (  # t5 without num_decoder_layers
            {"num_layers": 3, "is_encoder_decoder": True},
            "decoder",
            PartLayers((), (), 3),
        ),
        ({"num_hidden_layers": 3}, "decoder", PartLayers((), ("num_hidden_layers",), 3)),  # opt
        ({"num_layers": 3}, "encoder", PartLayers((), ("num_layers",), 3)),
        (
            {"decoder": {"num_hidden_layers": 4}},
            "decoder",
            PartLayers(("decoder",), ("num_hidden_layers",), 4),
        ),
    ],
)
def test_where_a_config_counts_a_parts_layers(
    config: dict[str, Any], part: str, expected: PartLayers
) -> None:
    assert part_layers(config, part) == expected


@pytest.mark.parametrize(
    "names, before, behind",
    [
        (["v.patch_conv.weight", "v.ln_pre.weight"], 2, 0),
        (["v.embeddings.LayerNorm.weight", "v.embeddings.cls_token"], 2, 0),
        (["v.post_layernorm.weight", "v.head.probe", "v.vision_adapter.mlp.fc1.weight"], 0, 3),
        (["e.embed_positions.weight", "e.conv1.bias", "e.layer_norm.weight"], 2, 1),
        (["d.cls.predictions.bias", "v.something.weight"], 0, 1),
    ],
)
def test_what_stands_before_and_behind(names: list[str], before: int, behind: int) -> None:
    row = row_of("v.layers", names)
    assert row.before == tuple(names[:before])
    assert row.after == tuple(names[before : before + behind])


# ---------------------------------------------------------------- transformers' own classes


def tiny(transformers: Any, kind: str) -> Any:
    """The smallest model of a class."""
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64,
        "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4, "model_type": "mistral",
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 8,
        "num_hidden_layers": 3, "image_size": 28, "patch_size": 14, "model_type": "pixtral",
    }  # fmt: skip
    halves = {
        "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "vocab_size": 64, "num_mel_bins": 8, "max_source_positions": 20, "pad_token_id": 0,
        "max_target_positions": 20, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    t5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
    config = {
        "Mistral3": {"text_config": text, "vision_config": vision, "image_token_index": 60},
        "Whisper": halves,
        "T5": {**t5, "decoder_start_token_id": 0},
    }[kind]
    made = getattr(transformers, f"{kind}Config")(**config)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(made)


@pytest.fixture
def real(zoo, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(zoo.root)

    def make(kind: str) -> None:
        for seed, name in enumerate(("a", "b", "c")):
            torch.manual_seed(seed)
            model = tiny(transformers, kind)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            model.save_pretrained(name)

    return make


LISTED = {"linear": {"weight": 1}, "passthrough": {}, "ties": {"weight": 0.5, "density": 0.5}}


def stack(method: str, part: str, layers: int, *others: str) -> dict[str, Any]:
    """One layer more in ``part``, and the others merged whole."""
    names = {"passthrough": "a", "linear": "ab", "ties": "abc"}[method]
    slices = [
        run(*((name, start, end) for name in names))
        for start, end in ((0, layers - 1), (1, layers))
    ]
    slices[-1]["sources"] = slices[-1]["sources"][::-1]
    modules = {part: {"slices": slices}, **{other: both(*names) for other in others}}
    base = {"base_model": "a"} if method == "ties" else {}
    return recipe(modules, method, parameters=LISTED[method], dtype="float32", **base)


@pytest.mark.parametrize(
    "kind, part, layers, others",
    [
        ("Mistral3", "text_decoder", 4, ("multi_modal_projector", "vision_tower")),
        ("Mistral3", "vision_tower", 3, ("multi_modal_projector",)),
        ("Whisper", "encoder", 3, ("decoder",)),
        ("Whisper", "decoder", 3, ()),
        ("T5", "encoder", 3, ("decoder", "shared")),
        ("T5", "decoder", 3, ("encoder",)),
    ],
)
def test_transformers_loads_it(
    kind: str, part: str, layers: int, others: tuple[str, ...], real
) -> None:
    real(kind)
    given = stack("linear", part, layers, *others)
    if kind == "T5":  # whose first block alone has a bias of positions
        given["modules"][part]["slices"] = [
            run(("a", 0, 3), ("b", 0, 3)),
            run(("a", 1, 3), ("b", 1, 3)),
        ]
    fastmerge.merge(given, "out")
    transformers = pytest.importorskip("transformers")
    loaded, info = getattr(transformers, f"{kind}ForConditionalGeneration").from_pretrained(
        "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = {name.removeprefix("model.") for name in _layers(Path("out"), part)}
    assert len(stored) > layers
    held = {
        "T5": lambda m: len(getattr(m, part, m.encoder).block),
        "Whisper": lambda m: len(getattr(m.model, part, m.model.encoder).layers),
        "Mistral3": lambda m: len(
            m.model.language_model.layers
            if "text" in part
            else m.model.vision_tower.transformer.layers
        ),
    }[kind](loaded)
    assert held == len(stored)


def _layers(folder: Path, part: str) -> set[str]:
    from safetensors import safe_open

    kind = {"text_decoder": "text", "vision_tower": "vision"}.get(part, part)
    with safe_open(folder / "model.safetensors", "np") as file:
        names = file.keys()
        places = [layer_of(name) for name in names if part_of(name) == kind]
    return {f"{place.stack}.{place.number}" for place in places if place}


@pytest.mark.parametrize("method", LISTED)
@pytest.mark.parametrize("part, layers", [("text_decoder", 4), ("vision_tower", 3)])
def test_mergekits_bytes(method: str, part: str, layers: int, real) -> None:
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    real("Mistral3")
    modules = ("text_decoder", "multi_modal_projector", "vision_tower")
    given = stack(method, part, layers, *(name for name in modules if name != part))
    fastmerge.merge(given, "out")
    config = MergeConfiguration.model_validate(given)
    run_merge(config, "peer", MergeOptions(quiet=True, write_model_card=False))
    ours, theirs = (_tensors(Path(folder)) for folder in ("out", "peer"))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    counts = [json.loads(Path(folder, "config.json").read_text()) for folder in ("out", "peer")]
    for key in ("text_config", "vision_config"):
        assert counts[0][key]["num_hidden_layers"] == counts[1][key]["num_hidden_layers"]
    shutil.rmtree("peer")


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return {
        name: array
        for file in folder.glob("*.safetensors")
        for name, array in load_file(file).items()
    }

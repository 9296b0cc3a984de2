"""Adapters on parameters (PEFT's target_parameters): experts that are stacked in one tensor, in the
files or in transformers' modules alone; and adapters that are saved under other names."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

import fastmerge
from fastmerge import _C, api
from fastmerge.compute.cpu import cpu
from fastmerge.errors import FastmergeError
from fastmerge.models.parameters import _ORDER
from fastmerge.planning.experts import IN_OUT

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

HIDDEN = 16
_COMMON = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
    "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip


def gpt_oss(inner=12):
    config = transformers.GptOssConfig(
        **_COMMON, intermediate_size=inner, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.GptOssForCausalLM(config)


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **_COMMON, intermediate_size=20, moe_intermediate_size=12, num_experts=3,
        num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral():
    config = transformers.MixtralConfig(
        **_COMMON, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.MixtralForCausalLM(config)


def llama4():
    config = transformers.Llama4TextConfig(
        **_COMMON, intermediate_size=12, intermediate_size_mlp=20, num_local_experts=3,
        num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=8,
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


def granite():
    config = transformers.GraniteMoeConfig(
        **_COMMON, intermediate_size=12, num_local_experts=3, num_experts_per_tok=2
    )
    return transformers.GraniteMoeForCausalLM(config)


def llama():
    config = transformers.LlamaConfig(**_COMMON, intermediate_size=20)
    return transformers.LlamaForCausalLM(config)


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# name: model, settings
ROWS = {
    "gpt_oss": (gpt_oss, {"target_parameters": BOTH}),
    "gpt_oss, square": (lambda: gpt_oss(HIDDEN), {"target_parameters": ["experts.down_proj"]}),
    "gpt_oss, biases": (
        gpt_oss,
        {"target_parameters": [*BOTH, "experts.gate_up_proj_bias", "experts.down_proj_bias"]},
    ),
    "gpt_oss, one layer": (
        gpt_oss,
        {"target_parameters": ["layers.1.mlp.experts.down_proj"], "target_modules": ["q_proj"]},
    ),
    "qwen3_moe": (qwen3_moe, {"target_parameters": BOTH, "target_modules": ["q_proj"]}),
    "qwen3_moe, rslora": (qwen3_moe, {"target_parameters": BOTH[:1], "use_rslora": True}),
    "qwen3_moe, patterns": (
        qwen3_moe,
        {
            "target_parameters": [*BOTH, "mlp.gate.weight"],
            "rank_pattern": {r".*\.down_proj": 3},
            "alpha_pattern": {"experts.gate_up_proj": 11},
        },
    ),
    "mixtral": (mixtral, {"target_parameters": [*BOTH, "mlp.gate.weight"]}),
    "mixtral, as transformers 4": (mixtral, {"target_modules": ["w1", "w2", "w3", "q_proj"]}),
    "llama4": (llama4, {"target_parameters": ["feed_forward." + name for name in BOTH]}),
    "granitemoe": (granite, {"target_parameters": BOTH}),
    "matrices": (llama, {"target_parameters": ["q_proj.weight", "embed_tokens.weight"]}),
}


def make(folder: Path, model, dtype=torch.bfloat16, **settings) -> tuple[Path, Path]:
    """Folders of a base in ``dtype`` and of a trained adapter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder / "base")
    settings = {"target_modules": [], **settings}
    lora = peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    trained = peft.get_peft_model(base, lora)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    trained.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def merged_by_peft(base: Path, adapter: Path, dtype, out: Path) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's merge, as transformers writes them to files."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("row", ROWS)
def test_equal_to_merge_and_unload(tmp_path: Path, row: str) -> None:
    build, settings = ROWS[row]
    base, adapter = make(tmp_path, build(), **settings)
    fastmerge.fold(base, adapter, tmp_path / "out", threads=2)
    mine = load_file(tmp_path / "out/model.safetensors")
    theirs = merged_by_peft(base, adapter, torch.bfloat16, tmp_path / "theirs")
    exact = merged_by_peft(base, adapter, torch.float64, tmp_path / "exact")
    before = load_file(base / "model.safetensors")
    assert mine.keys() == theirs.keys()
    changed = 0
    for name, was in before.items():
        x, y, z = mine[name].double(), theirs[name].double(), exact[name].double()
        # PEFT rounds the product to bf16 before it adds it, the sum over the rank too.
        step = torch.maximum(z.abs(), (z - was).abs()) * 2**-7 + 2**-12
        assert float(((x - z).abs() / step).max()) <= 0.51, name
        assert float(((x - y).abs() / step).max()) <= 1.6, name
        moved = not torch.equal(theirs[name], was)
        assert moved == (not torch.equal(mine[name], was)), name
        changed += moved
    assert changed


# --- the leaf ---


def test_several_matrices_are_each_one_s_bits(memory) -> None:
    rng = np.random.default_rng(0)
    for count, rows, cols, rank in ((3, 5, 7, 2), (4, 3, 2049, 3), (2, 70, 130, 5)):
        w, left, right = (
            rng.standard_normal((count, *shape)).astype(np.float32)
            for shape in ((rows, cols), (rows, rank), (rank, cols))
        )
        base = memory.put(w, "BF16", offset=2)
        views = base, memory.put(left, "F32"), memory.put(right, "F32")
        results = set()
        for isa in _C.isas():
            before = _C.isa()
            _C.set_isa(isa)
            try:
                for threads in (1, 3):
                    out = memory.blank(w.size, "F32")
                    view = _C.low_rank(*views, rank, 0.75, matrices=count)
                    _C.combine(cpu(threads).pool, [view], np.ones(1), _C.MemorySink(out))
                    results.add(memory.read(out).tobytes())
            finally:
                _C.set_isa(before)
        size = rows * cols
        one = b"".join(
            cpu(1)
            .array(
                _C.low_rank(
                    base.slice(i * size, (i + 1) * size), memory.put(left[i], "F32"),
                    memory.put(right[i], "F32"), rank, 0.75,
                )
            )
            .tobytes()
            for i in range(count)
        )  # fmt: skip
        assert results == {one}
    with pytest.raises(ValueError, match="rows times cols"):
        _C.low_rank(*views, rank, 1.0, matrices=1)
    with pytest.raises(ValueError, match="one factor"):
        _C.low_rank(*views, rank, 1.0, matrices=count, factors=np.ones(rows, np.float32))


# --- without PEFT: files by hand ---

EXPERTS, ROWS_OF, COLS_OF, RANK = 3, 10, 6, 2
NAME = "model.layers.{}.mlp.experts"


def base_by_hand(folder: Path, layers=2, kind="qwen3_moe", **shapes: tuple[int, ...]) -> Path:
    """A model of stacked experts and nothing else that an adapter changes."""
    rng = np.random.default_rng(1)
    shapes = shapes or {"gate_up_proj": (EXPERTS, ROWS_OF, COLS_OF)}
    tensors = {"model.embed_tokens.weight": (8, 4)} | {
        f"{NAME.format(layer)}.{name}": shape
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in tensors.items()},
        folder / "model.safetensors",
    )
    config = {"model_type": kind, "num_hidden_layers": layers, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter_by_hand(folder: Path, factors: dict[str, tuple], **config) -> Path:
    """factors: the modules, as the names have them, to the shapes of A and B."""
    rng = np.random.default_rng(2)
    tensors = {}
    for module, (a, b) in factors.items():
        head = f"base_model.model.{module}.lora_"
        tensors[f"{head}A.weight"] = rng.normal(size=a).astype(np.float32)
        tensors[f"{head}B.weight"] = rng.normal(size=b).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def sized(out: int, into: int, experts=EXPERTS, rank=RANK) -> tuple:
    return (experts * rank, into), (out, experts * rank)


def folded(base: Path, adapter: Path) -> dict[str, np.ndarray]:
    return dict(api.materialise(api.fold_recipe(str(base), str(adapter))))


GATED = {"target_parameters": ["experts.gate_up_proj"]}


@pytest.mark.parametrize(
    ("kind", "shape", "sizes", "turned"),
    [
        ("llama4_text", (EXPERTS, 10, 6), (10, 6), False),
        ("gpt_oss", (EXPERTS, 6, 10), (10, 6), True),
        ("gpt_oss", (EXPERTS, 6, 6), (6, 6), True),
        ("qwen3_moe", (EXPERTS, 6, 6), (6, 6), False),
        ("qwen3_vl_moe", (EXPERTS, 6, 10), (10, 6), True),
        ("qwen3_moe", (1, 10, 6), (10, 6), False),
    ],
)
def test_which_way_round_stacks_lie(tmp_path: Path, kind, shape, sizes, turned) -> None:
    base = base_by_hand(tmp_path / "base", kind=kind, gate_up_proj=shape)
    each = sized(*sizes, experts=shape[0])
    adapter = adapter_by_hand(
        tmp_path / "adapter", {NAME.format(layer): each for layer in range(2)}, **GATED
    )
    made = folded(base, adapter)
    factors = load_numpy(adapter / "adapter_model.safetensors")
    before = load_numpy(base / "model.safetensors")
    for layer in range(2):
        head = f"base_model.model.{NAME.format(layer)}.lora_"
        a = factors[f"{head}A.weight"].reshape(shape[0], RANK, -1)
        b = factors[f"{head}B.weight"].reshape(-1, RANK, shape[0])
        delta = np.einsum("ore,eri->eio" if turned else "ore,eri->eoi", b, a) * 2
        name = f"{NAME.format(layer)}.gate_up_proj"
        np.testing.assert_allclose(made[name], before[name] + delta, rtol=1e-5, atol=1e-5)


def test_a_square_stack_lies_as_the_others_of_its_model(tmp_path: Path) -> None:
    shapes = {"gate_up_proj": (EXPERTS, 6, 12), "down_proj": (EXPERTS, 6, 6)}
    base = base_by_hand(tmp_path / "base", layers=1, kind="unheard_of", **shapes)
    module = NAME.format(0)
    adapter = adapter_by_hand(
        tmp_path / "adapter",
        {f"{module}.base_layer": sized(12, 6), module: sized(6, 6)},
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    made = folded(base, adapter)[f"{module}.down_proj"]
    factors = load_numpy(adapter / "adapter_model.safetensors")
    a = factors[f"base_model.model.{module}.lora_A.weight"].reshape(EXPERTS, RANK, -1)
    b = factors[f"base_model.model.{module}.lora_B.weight"].reshape(-1, RANK, EXPERTS)
    before = load_numpy(base / "model.safetensors")[f"{module}.down_proj"]
    wanted = before + 2 * np.einsum("ore,eri->eio", b, a)
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-5)


BAD = {
    "other experts": ({0: sized(10, 6, 4), 1: sized(10, 6, 4)}, GATED, "makes 4 of 10 x 6"),
    "other sizes": ({0: sized(10, 7), 1: sized(10, 7)}, GATED, "makes 3 of 10 x 7"),
    "no whole rank": ({0: ((5, 6), (10, 5)), 1: sized(10, 6)}, GATED, "(experts x 2, in)"),
    "a layer without": ({0: sized(10, 6)}, GATED, "has no factors for 'model.layers.1.mlp.ex"),
    "two for one": (
        {0: sized(10, 6), 1: sized(10, 6)},
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "target_parameters names gate_up_proj, down_proj of 'model.layers.0.mlp.experts'",
    ),
    "misspelt": (
        {0: sized(10, 6), 1: sized(10, 6)},
        {"target_parameters": ["experts.gate_up"]},
        "changes 'model.layers.0.mlp.experts.gate_up' (and 1 more), which",
    ),
    "no list": ({0: sized(10, 6)}, {"target_parameters": "experts.x"}, "must be a list of names"),
    "dora": ({0: sized(10, 6), 1: sized(10, 6)}, {**GATED, "use_dora": True}, "use_dora"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_one_line(tmp_path: Path, case: str) -> None:
    layers, config, said = BAD[case]
    base = base_by_hand(tmp_path / "base")
    adapter = adapter_by_hand(
        tmp_path / "adapter", {NAME.format(layer): own for layer, own in layers.items()}, **config
    )
    with pytest.raises(FastmergeError) as refused:
        folded(base, adapter)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_parameters_whose_order_is_not_known(tmp_path: Path) -> None:
    module = NAME.format(0)
    adapter = adapter_by_hand(
        tmp_path / "adapter",
        {module: sized(6, 6), f"{module}.base_layer": sized(6, 6)},
        target_parameters=["experts.first", "experts.second"],
    )
    with pytest.raises(FastmergeError, match=r"the order of .*experts.first.* is not known"):
        folded(base_by_hand(tmp_path / "base", layers=1), adapter)


def test_adapters_alone_are_refused_as_peft_does(tmp_path: Path) -> None:
    each = {NAME.format(layer): sized(10, 6) for layer in range(2)}
    both = [adapter_by_hand(tmp_path / name, each, **GATED) for name in ("a", "b")]
    with pytest.raises(FastmergeError, match=r"adapts a parameter .*fold it into its base"):
        fastmerge.merge_adapters(both, tmp_path / "out", weights=[1, 1])


def test_what_transformers_has_is_what_is_known_of_it() -> None:
    """The order in which experts' classes register parameters, and which are ``is_transposed``."""
    transposed = set()
    folder = Path(transformers.__file__).parent / "models"
    for file in folder.glob("*/modeling_*.py"):
        text = file.read_text()
        if "is_transposed=True" in text:
            transposed.add(file.parent.name)
        for found in re.finditer(
            r"^class \w*Experts?\w*\(nn\.Module\):\n(.*?)(?=^class |\Z)",
            text,
            re.DOTALL | re.MULTILINE,
        ):
            names = re.findall(r"self\.(\w+) = nn\.Parameter\(", found[1])
            if len(names) > 1:
                assert names == sorted(names, key=_ORDER.index), file
    assert transposed == IN_OUT - {"aria_text"}


# --- other bases, other names ---


def test_an_adapter_on_mxfp4_is_one_on_its_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    plain, coded = tmp_path / "plain", tmp_path / "coded"
    name = f"{NAME.format(0)}.gate_up_proj"
    blocks = rng.integers(0, 256, (EXPERTS, 10, 2, 16), np.uint8)
    scales = rng.integers(120, 130, (EXPERTS, 10, 2), np.uint8)
    coded.mkdir()
    save_file({f"{name}_blocks": blocks, f"{name}_scales": scales}, coded / "model.safetensors")
    config = {"model_type": "gpt_oss", "num_hidden_layers": 1}
    said = config | {"quantization_config": {"quant_method": "mxfp4"}}
    (coded / "config.json").write_text(json.dumps(said))
    copy = {"merge_method": "passthrough", "models": [{"model": str(coded)}], "dtype": "float32"}
    numbers = dict(api.materialise(copy))
    assert numbers[name].shape == (EXPERTS, 64, 10)
    plain.mkdir()
    save_file(numbers, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    adapter = adapter_by_hand(tmp_path / "adapter", {NAME.format(0): sized(10, 64)}, **GATED)
    one = dict(api.materialise(api.fold_recipe(str(coded), str(adapter), dtype="float32")))
    assert np.array_equal(one[name], folded(plain, adapter)[name])
    assert not np.array_equal(one[name], numbers[name])


def renamed(folder: Path, new: Path, change) -> Path:
    new.mkdir()
    tensors = load_numpy(folder / "adapter_model.safetensors")
    save_file({change(n): own for n, own in tensors.items()}, new / "adapter_model.safetensors")
    (new / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return new


def test_names_of_a_state_dict_are_those_of_save_pretrained(tmp_path: Path) -> None:
    base = base_by_hand(tmp_path / "base")
    adapter = adapter_by_hand(
        tmp_path / "adapter", {NAME.format(layer): sized(10, 6) for layer in range(2)}, **GATED
    )
    named = renamed(adapter, tmp_path / "named", lambda n: re.sub(r"(lora_[AB])", r"\1.mine", n))
    wanted = folded(base, adapter)
    for name, array in folded(base, named).items():
        assert np.array_equal(array, wanted[name]), name
    notes = api.plan(api.fold_recipe(str(base), str(named))).notes
    assert sum("names its tensors for the adapter 'mine'" in note for note in notes) == 1
    some = renamed(adapter, tmp_path / "some", lambda n: n.replace("lora_A", "lora_A.default"))
    with pytest.raises(FastmergeError, match="are of two adapters; save one of them"):
        folded(base, some)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
    ],
)
def test_a_state_dict_is_folded_as_what_save_pretrained_writes(tmp_path: Path, settings) -> None:
    base, adapter = make(tmp_path, llama(), **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    state = peft.PeftModel.from_pretrained(model, adapter).state_dict()
    mine = re.compile(r"lora_|modules_to_save|trainable_tokens_delta|original_module")
    named = tmp_path / "named"
    named.mkdir()
    save_torch(
        {n: own.contiguous().clone() for n, own in state.items() if mine.search(n)},
        named / "adapter_model.safetensors",
    )
    (named / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    one = dict(api.materialise(api.fold_recipe(str(base), str(adapter), dtype="float32")))
    two = dict(api.materialise(api.fold_recipe(str(base), str(named), dtype="float32")))
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert np.array_equal(array, two[name]), name


@pytest.mark.parametrize("rows", [44, 35])
def test_a_resized_vocabulary_that_is_saved_whole_too(tmp_path: Path, rows: int) -> None:
    """PEFT saves such embeddings under three names: its own parts', and plain."""
    model = llama()
    model.save_pretrained(tmp_path / "base")
    made = []
    for _ in range(2):
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(rows, mean_resizing=False)
        made.append(base)
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trained = peft.get_peft_model(made[0], lora)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    trained.save_pretrained(tmp_path / "adapter")
    names = load_numpy(tmp_path / "adapter/adapter_model.safetensors")
    assert "base_model.model.lm_head.modules_to_save.weight" in names
    merged = peft.PeftModel.from_pretrained(made[1], tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    fastmerge.fold(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    wanted = load_file(tmp_path / "theirs/model.safetensors")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-7)
    assert json.loads((tmp_path / "ours/config.json").read_text())["vocab_size"] == rows

"""Adapters folded into their base: PEFT's merge_and_unload, and what that rounds away."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge import _C, api
from fastmerge.cli import main
from fastmerge.compute.cpu import cpu
from fastmerge.errors import FastmergeError, ModelError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

PREFIX = "base_model.model."
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama(tied=False, bias=False, layers=2, hidden=24):
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50, tie_word_embeddings=tied, attention_bias=bias,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config)


# name: model, LoraConfig, whether PEFT's merge changes the tied tensor too
ROWS = {
    "plain": (llama, {"target_modules": EVERY}),
    "rslora": (llama, {"target_modules": EVERY, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {"down_proj": 11, r"layers\.1\..*q_proj": 5},
        },
    ),
    "dora": (llama, {"target_modules": EVERY, "use_dora": True}),
    "dora rslora": (llama, {"target_modules": ["v_proj"], "use_dora": True, "use_rslora": True}),
    "layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "saved": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "embedding dora": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 49, 7]}),
    "bias": (lambda: llama(bias=True), {"target_modules": ["q_proj"], "bias": "all"}),
    "bias only": (lambda: llama(bias=True), {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora bias": (lambda: llama(bias=True), {"target_modules": ["q_proj"], "lora_bias": True}),
    "tied": (lambda: llama(tied=True), {"target_modules": EVERY}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
    ),
}


def make(tmp_path, model, config, *, dtype=torch.bfloat16):
    """Folders of a base in ``dtype`` and of a trained adapter; PEFT's model of both."""
    model.to(dtype).save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM") if config is None else config
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    trained = peft.get_peft_model(base, lora)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter) * 0.1
                parameter.copy_(parameter + noise if "magnitude" in name else noise)
    trained.save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def from_peft(base, adapter, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, adapter)


def stored(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("row", ROWS)
def test_equal_to_merge_and_unload(tmp_path, row):
    build, settings = ROWS[row]
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    base, adapter = make(tmp_path, build(), config)
    fastmerge.fold(base, adapter, tmp_path / "out", threads=2)
    mine = stored(tmp_path / "out")
    theirs = from_peft(base, adapter, torch.bfloat16).merge_and_unload().state_dict()
    exact = from_peft(base, adapter, torch.float64).merge_and_unload().state_dict()
    changed = 0
    for name, before in stored(base).items():
        x, y, z = mine[name].double(), theirs[name].double(), exact[name].double()
        assert mine[name].dtype == before.dtype
        # One step of bf16's 8 bits; PEFT rounds the embeddings' delta before it adds it.
        step = torch.maximum(z.abs(), (z - before).abs()) * 2**-7 + 2**-20
        assert float(((x - y).abs() / step).max()) <= 1, name
        assert float((x - z).abs().sum()) <= float((y - z).abs().sum()) * 1.0001 + 1e-9, name
        changed += not torch.equal(mine[name], before)
    assert changed
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert out.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, min_new_tokens=3).shape == (
        1,
        6,
    )


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_head_is_what_base_and_adapter_compute(tmp_path, target):
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=[target])
    base, adapter = make(tmp_path, llama(tied=True), config, dtype=torch.float32)
    report = fastmerge.fold(base, adapter, tmp_path / "out")
    assert any("head of its own" in note for note in report.notes)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[1, 2, 3, 40]])
    with torch.no_grad():
        wanted = from_peft(base, adapter, torch.float32)(ids).logits
        torch.testing.assert_close(out(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_bits_are_the_same_for_every_instruction_set_thread_count_and_odd_size(memory):
    rng = np.random.default_rng(0)
    for rows, cols, rank in ((3, 7, 1), (5, 2049, 3), (70, 130, 5), (2, 70_001, 2)):
        w, left, right = (
            rng.standard_normal(shape).astype(np.float32)
            for shape in ((rows, cols), (rows, rank), (rank, cols))
        )
        w[0, -1] = np.inf
        for dtype in ("BF16", "F16", "F32"):
            base = memory.put(w, dtype, offset=2 if dtype != "F32" else 4)
            numbers = cpu(1).array(base).reshape(rows, cols).astype(np.float64)
            for factors, by_column in ((None, False), (rows, False), (cols, True)):
                each = None if factors is None else rng.random(factors).astype(np.float32) + 0.5
                results = set()
                for isa in _C.isas():
                    before = _C.isa()
                    _C.set_isa(isa)
                    try:
                        for threads in (1, 3):
                            view = _C.low_rank(
                                base, memory.put(left, "F32"), memory.put(right, "F32"), rank,
                                0.75, factors=each, by_column=by_column,
                            )  # fmt: skip
                            out = memory.blank(rows * cols, "F32")
                            _C.combine(cpu(threads).pool, [view], np.ones(1), _C.MemorySink(out))
                            results.add(memory.read(out).tobytes())
                    finally:
                        _C.set_isa(before)
                assert len(results) == 1
                made = np.frombuffer(results.pop(), np.float32).reshape(rows, cols)
                exact = numbers + 0.75 * (left.astype(np.float64) @ right)
                if each is not None:
                    exact *= each[None, :] if by_column else each[:, None]
                np.testing.assert_allclose(made, exact, rtol=2e-6, atol=2e-6)


def test_ties_of_three_adapters_reads_the_base_once(tmp_path):
    base, _ = make(tmp_path, llama(), peft.LoraConfig(target_modules=EVERY, r=4, lora_alpha=6))
    names = []
    for number in range(3):
        config = peft.LoraConfig(target_modules=EVERY, r=2 + number, lora_alpha=8)
        (tmp_path / str(number)).mkdir()
        make(tmp_path / str(number), llama(), config)
        names.append(tmp_path / str(number) / "adapter")
        folded = tmp_path / f"folded{number}"
        fastmerge.fold(base, names[-1], folded, dtype="float32")
    ties = {"merge_method": "ties", "parameters": {"density": 0.5}, "base_model": str(base)}
    models = [{"model": f"{base}+{name}", "parameters": {"weight": 0.5}} for name in names]
    plan = api.plan(ties | {"models": models})
    item = next(t for t in plan.tensors if t.name.endswith("layers.0.self_attn.q_proj.weight"))
    factors = sum(4 * (2 + number) * (24 + 24) for number in range(3))
    assert item.bytes_in == 24 * 24 * 2 + factors
    folded = [dict(m, model=str(tmp_path / f"folded{i}")) for i, m in enumerate(models)]
    one = dict(api.materialise(plan))
    other = dict(api.materialise(ties | {"models": folded, "dtype": "bfloat16"}))
    for name, array in one.items():
        assert np.array_equal(array, other[name]), name


BAD = {
    "has no factors for 'model.layers.2.self_attn.q_proj": lambda: llama(layers=3),
    "changes 'model.layers.1.self_attn.q_proj.weight', which": lambda: llama(layers=1),
    "makes a 24 x 24 matrix for 'model.layers.0.self_attn.q_proj', but": lambda: llama(hidden=32),
    "it is for another base; its config names": gpt2,
}


@pytest.mark.parametrize("case", BAD)
def test_an_adapter_for_another_base_is_refused_before_anything_is_written(tmp_path, case):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    _, adapter = make(tmp_path, llama(), config)
    BAD[case]().save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError) as caught:
        fastmerge.fold(tmp_path / "other", adapter, tmp_path / "out")
    assert case in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_names_in_a_wrapper_and_bases_of_two_names(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base, adapter = make(tmp_path, llama(), config)
    wrapped = {f"language_model.{k}": v for k, v in stored(base).items()}
    (tmp_path / "wrapped").mkdir()
    save_file(wrapped, tmp_path / "wrapped/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "wrapped/config.json").write_text((base / "config.json").read_text())
    plain = dict(api.materialise(api.fold_recipe(str(base), str(adapter))))
    plan = api.plan(api.fold_recipe(str(tmp_path / "wrapped"), str(adapter)))
    assert any("taken for the same tensors" in note for note in plan.notes)
    for name, array in api.materialise(plan):
        assert np.array_equal(array, plain[name.removeprefix("language_model.")]), name


def test_recipe_forms_and_a_plus_in_a_folder_s_name(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    (tmp_path / "a+b").mkdir()
    base, adapter = make(tmp_path / "a+b", llama(), config)
    wanted = api.plan(api.fold_recipe(str(base), str(adapter))).key
    for model in (
        {"model": str(base), "lora": str(adapter)},
        {"model": {"path": str(base), "revision": None}, "lora": {"path": str(adapter)}},
    ):
        recipe = {"merge_method": "passthrough", "models": [{"model": model}]}
        assert api.plan(recipe).key == wanted
    for name in ("x+y+z", f"{base}+", f"{base}+{tmp_path}/none", f"{tmp_path}/none+{adapter}"):
        with pytest.raises(FastmergeError, match=r"^recipe.models\[0\].model: "):
            api.plan({"merge_method": "passthrough", "models": [{"model": name}]})


def test_resized_vocabulary_and_the_adapter_s_own_tokenizer(tmp_path):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    base, adapter = make(tmp_path, llama(), config)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if "embed_tokens" in n or "lm_head" in n]:
        tensors[name] = torch.cat([tensors[name], torch.ones(2, 24)])
    save_file(tensors, file)
    words = {f"w{i}": i for i in range(52)}
    for folder, count in ((base, 50), (adapter, 52)):
        model = {"type": "WordLevel", "unk_token": "w0", "vocab": dict(list(words.items())[:count])}
        text = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
        (folder / "tokenizer.json").write_text(text)
    report = fastmerge.fold(base, adapter, tmp_path / "out")
    assert any("the tokenizer is that of" in note for note in report.notes)
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == (adapter / "tokenizer.json").read_text()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 52
    made = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert made.get_input_embeddings().weight.shape == made.lm_head.weight.shape == (52, 24)


def test_lineage_card_and_resume_key_name_both(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base, adapter = make(tmp_path, llama(), config)
    plan = api.plan(api.fold_recipe(str(base), str(adapter)))
    assert [model.label for model in plan.models] == [str(base), str(adapter)]
    key = plan.key
    text = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(text | {"lora_alpha": 9}))
    assert api.plan(api.fold_recipe(str(base), str(adapter))).key != key
    fastmerge.fold(base, adapter, tmp_path / "out")
    lineage = json.loads((tmp_path / "out/fastmerge.json").read_text())
    assert set(lineage["fastmerge_inputs"]) == {"base", "adapter"}
    assert "adapter" in (tmp_path / "out/README.md").read_text()


def test_tokenizer_union_reads_adapted_embeddings(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], lora_alpha=9)
    base, adapter = make(tmp_path, llama(), config)
    words = {f"w{i}": i for i in range(50)}
    model = {"type": "WordLevel", "unk_token": "w0", "vocab": words}
    document = {"version": "1.0", "added_tokens": [], "model": model}
    (base / "tokenizer.json").write_text(json.dumps(document))
    other = tmp_path / "other"
    llama().save_pretrained(other)
    turned = {word: 49 - number for word, number in words.items()}
    (other / "tokenizer.json").write_text(
        json.dumps(document | {"model": model | {"vocab": turned}})
    )
    fastmerge.fold(base, adapter, tmp_path / "folded", dtype="float32")

    def merged(first):
        models = [{"model": m, "parameters": {"weight": 0.5}} for m in (str(other), first)]
        recipe = {"merge_method": "linear", "models": models, "tokenizer_source": str(other)}
        return dict(api.materialise(recipe | {"dtype": "float32"}))

    one, two = merged(f"{base}+{adapter}"), merged(str(tmp_path / "folded"))
    for name, array in one.items():
        assert np.array_equal(array, two[name]), name


def test_the_commands_fold_and_info(tmp_path, capsys):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_alpha=6, use_rslora=True)
    base, adapter = make(tmp_path, llama(), config)

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        return ended.value.code or 0, capsys.readouterr()

    code, said = run("fold", base, adapter, tmp_path / "out", "--threads", 2, "--json")
    assert (code, json.loads(said.out)["tensors"]) == (0, 21)
    fastmerge.fold(base, adapter, tmp_path / "same")
    weights = "model.safetensors"
    one, other = (stored(tmp_path / name) for name in ("out", "same"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "out" / weights).stat().st_size == (
        tmp_path / "same" / weights
    ).stat().st_size
    code, said = run("fold", base, adapter, tmp_path / "half", "--dtype", "float16", "--quiet")
    assert code == 0 and stored(tmp_path / "half")["lm_head.weight"].dtype == torch.float16
    code, said = run("fold", base, base, tmp_path / "none")
    assert code == 2 and said.err.count("\n") == 1 and "no adapter of PEFT's" in said.err
    code, said = run("info", adapter, "--json")
    found = json.loads(said.out)
    assert (found["ranks"], found["scales"], found["kinds"]) == ([4], [3.0], ["rsLoRA"])
    assert found["modules"] == {"q_proj": 2} and found["parameters"] == 2 * 4 * (24 + 24)
    code, said = run("info", adapter)
    assert code == 0 and "2 q_proj" in said.out and "rsLoRA" in said.out


def test_live_models_take_adapters_as_sources(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=EVERY, lora_alpha=6)
    base, adapter = make(tmp_path, llama(), config)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    fastmerge.llama.merge_into(model, {str(base): 0.75, f"{base}+{adapter}": 0.25})
    linear = {"merge_method": "linear", "parameters": {"normalize": False}}
    models = [{"model": str(base), "parameters": {"weight": 0.75}}]
    models += [{"model": f"{base}+{adapter}", "parameters": {"weight": 0.25}}]
    fastmerge.merge(linear | {"models": models}, tmp_path / "out")
    wanted = stored(tmp_path / "out")
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, wanted[name]), name
    assert not torch.equal(wanted["model.layers.0.mlp.up_proj.weight"],
                           stored(base)["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


TYING = {
    "embeddings": (llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": (llama, {"target_modules": ["lm_head"]}),
    "lengths": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "scales": (
        llama,
        {
            "target_modules": ["embed_tokens"],
            "rank_pattern": {"embed_tokens": 2},
            "alpha_pattern": {"embed_tokens": 9},
        },
    ),
    # PEFT ties what is called embed_tokens, and nothing else.
    "gpt2": (lambda **_: gpt2(), {"target_modules": ["wte"]}),
    "gpt2 saved": (
        lambda **_: gpt2(),
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["wte"]},
    ),
}


@pytest.mark.parametrize("row", TYING)
def test_ensure_weight_tying_is_what_base_and_adapter_compute(tmp_path, row):
    """One tensor where PEFT's two are the same, else a head of its own."""
    build, settings = TYING[row]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", ensure_weight_tying=True, **settings
    )
    base, adapter = make(tmp_path, build(tied=True), config, dtype=torch.float32)
    fastmerge.fold(base, adapter, tmp_path / "out")
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert out.config.tie_word_embeddings is (row in ("embeddings", "head"))
    ids = torch.tensor([[1, 2, 3, 40]])
    with torch.no_grad():
        wanted = from_peft(base, adapter, torch.float32)(ids).logits
        torch.testing.assert_close(out(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_parts_of_a_multimodal_model_under_the_names_of_its_files(tmp_path):
    """transformers has other names for them than files have; each part's prefix is its own."""
    text = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=50,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    kind = transformers.LlavaForConditionalGeneration
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    kind(transformers.LlavaConfig(text_config=text, vision_config=vision)).save_pretrained(base)
    assert "language_model.model.norm.weight" in stored(base)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "linear_1"], init_lora_weights=False)
    peft.get_peft_model(kind.from_pretrained(base), lora).save_pretrained(adapter)
    fastmerge.fold(base, adapter, tmp_path / "out")
    merged = peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    mine, theirs, before = (stored(tmp_path / name) for name in ("out", "peft", "base"))
    assert mine.keys() == theirs.keys()
    assert sum(not torch.equal(mine[name], before[name]) for name in mine) == 5
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_bias_that_the_base_has_no_place_for(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")
    base, adapter = make(tmp_path, llama(), config)
    with pytest.raises(
        FastmergeError, match=r"adds a bias \(lora_bias\) to .*q_proj' \(and 1 more"
    ):
        fastmerge.fold(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_square_matrix_lies_as_its_module_has_it_whatever_the_config_says(tmp_path, kind, said):
    """PEFT writes down what the last module was: a head's is none of gpt2's layers'."""
    targets = ["c_attn", "c_proj", "lm_head"] if kind == "gpt2" else ["q_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=targets, use_dora=said
    )
    base, adapter = make(tmp_path, {"gpt2": gpt2, "llama": llama}[kind](), config,
                         dtype=torch.float32)  # fmt: skip
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": said}))
    fastmerge.fold(base, adapter, tmp_path / "out")
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[1, 2, 3, 40]])
    with torch.no_grad():
        wanted = from_peft(base, adapter, torch.float32)(ids).logits
        torch.testing.assert_close(out(ids).logits, wanted, rtol=1e-4, atol=1e-5)

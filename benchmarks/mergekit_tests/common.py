"""What mergekit's tests import from ``tests.common``, which its source distribution lacks: tiny
models, and a merge that is looked at afterwards. Written from how the tests call it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mergekit.merge
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.options import MergeOptions


def _saved(model: Any, path: Any) -> str:
    model.save_pretrained(path, safe_serialization=True)
    return str(path)


def make_picollama(path: Any, vocab_size: int = 64) -> str:
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=16,
        num_hidden_layers=2,
    )  # fmt: skip
    return _saved(transformers.LlamaForCausalLM(config), path)


def make_picogranite(path: Any, vocab_size: int = 64) -> str:
    config = transformers.GraniteConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=4, num_hidden_layers=2, tie_word_embeddings=True,
    )  # fmt: skip
    return _saved(transformers.GraniteForCausalLM(config), path)


def make_gpt2size(path: Any, vocab_size: int = 64) -> str:
    config = transformers.GPT2Config(n_ctx=128, n_embd=64, n_head=4, vocab_size=vocab_size)
    return _saved(transformers.GPT2LMHeadModel(config), path)


def make_picoLlaVa(path: Any) -> str:  # noqa: N802, its name there
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_hidden_layers=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return _saved(transformers.LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], None] | None = None,
    index_json_name: str | None = None,
    auto_arch: bool = False,  # noqa: ARG001, its loading is looked at whatever the architecture
) -> None:
    """Merges, and expects whole weights without NaN that transformers' own class loads."""
    with tempfile.TemporaryDirectory() as out:
        mergekit.merge.run_merge(config, out_path=out, options=MergeOptions(quiet=True))
        index = index_json_name or "model.safetensors.index.json"
        found = [name for name in (index, "model.safetensors") if os.path.exists(f"{out}/{name}")]
        assert found, "no weights were written"
        assert os.path.exists(f"{out}/config.json")
        loader = LazyTensorLoader.from_disk(out)
        names = loader.index.tensor_paths
        if check_nan:
            for name in names:
                assert not torch.isnan(loader.get_tensor(name)).any(), f"{name} has NaN"
        if check_tensors:
            kind = json.loads(Path(out, "config.json").read_text())["architectures"][0]
            _, info = getattr(transformers, kind).from_pretrained(out, output_loading_info=True)
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                assert not info[what], f"{what}: {sorted(info[what])[:3]} of {len(info[what])}"
        if validate is not None:
            validate(out)

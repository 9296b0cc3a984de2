"""Whether a model's weights are codes: by its config, by its tensors, by the files beside them.

Every quantiser has its own words. Codes that are merged as numbers, or copied while their scales
are merged, are wrong without a sign of it, so all three are looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastmerge.dtypes import DType
from fastmerge.models.architecture import layer_of

# Sections of config.json, at any depth: transformers', compressed-tensors' older one, MLX's, vLLM's
# and others'. Under any other key a section is known by what it holds.
_SECTIONS = (
    "quantization_config", "compression_config", "quantization", "quant_config", "quantize_config",
)  # fmt: skip
# Beside the weights: AutoGPTQ's, AWQ's, ModelOpt's, quanto's.
_SIDECARS = (
    "quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json",
    "quanto_qmap.json",
)  # fmt: skip
# Last parts of names that only quantisers write: GPTQ, AWQ and EETQ; compressed-tensors; HQQ;
# bitsandbytes; DeepSeek's fp8; QuIP# and SpQR, which pack into 64 bits; EXL3.
_CODES = re.compile(
    r"qweight|qzeros|(weight_)?g_idx|weight_packed|weight_zero_point|W_q|SCB"
    r"|(nested_)?(absmax|quant_map)"
    r"|quant_state\..+|bitsandbytes__.+|weight_scale_inv|Qidxs|dense_weights|trellis"
)
# Narrow integers of a layer that are none: gpt2's causal masks (attn.bias, as bytes), positions.
_BUFFERS = re.compile(
    r".*(bias|mask|ind(ex|ices)|idx|ids?|positions?|counts?|steps?|tracked|types?)"
)
# Beside integers or fp8 in one module they say that those are codes: fp8, int8, MLX (biases), MXFP4
# (..._blocks and ..._scales), quanto, AQLM.
_SCALES = re.compile(
    r"(?i:(.*_)?(scales?|scale_inv|scale_\d|zeros?|zero_points?|absmax|scb|codebooks?|centroids))"
    r"|biases"
)
_WIDE = ("int64", "uint64", "bool")  # positions, masks and counters


class Typed(Protocol):
    """A tensor's type and shape."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Quantised:
    """What speaks for it. ``packed``: a tensor of codes; without one, ``place`` is a leftover."""

    kind: str  # "gptq", or the section's or file's name
    place: str  # "config.json", "quantize_config.json", or "" where only tensors say so
    key: str  # of the section in config.json: "text_config.quantization_config"
    packed: str | None


def find_quantised(
    config: Mapping[str, Any], tensors: Mapping[str, Typed], folder: Path | None
) -> Quantised | None:
    """What says that a model with these tensors is quantised, or None."""
    for key, section in sections(config):
        kind = kind_of(section) or key
        return Quantised(kind, "config.json", key, packed_in(tensors, declared=True))
    found = packed_in(tensors, declared=False)
    for name in _SIDECARS if folder is not None else ():
        assert folder is not None
        if (folder / name).is_file():
            return Quantised(name, name, "", found)
    return None if found is None else Quantised("codes", "", "", found)


def sections(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What says it in a config: dotted keys and what is under them."""
    for key, value in config.items():
        named = key in _SECTIONS and isinstance(value, (Mapping, str))
        if value and (named or (isinstance(value, Mapping) and kind_of(value))):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from sections(value, f"{prefix}{key}.")


def kind_of(section: Any) -> str:
    """The quantiser that a section names, or ''."""
    if isinstance(section, str):
        return section
    named = section.get("quant_method") or section.get("quant_algo")
    if isinstance(named, str) and named:
        return named
    bits = section.get("bits") or section.get("w_bit")
    if isinstance(bits, int):
        return f"{bits} bits"
    return "bitsandbytes" if section.get("load_in_4bit") or section.get("load_in_8bit") else ""


def packed_in(tensors: Mapping[str, Typed], *, declared: bool) -> str | None:
    """A tensor that holds codes; where a config has ``declared`` them, any integers or fp8."""
    scaled: set[str] = set()
    narrow: list[str] = []
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if _CODES.fullmatch(last) or ".quant_state." in name:
            return name
        if _SCALES.fullmatch(last):
            scaled.add(module)
        kind = tensor.dtype.name
        if kind.startswith(("int", "uint", "float8", "float6", "float4")) and kind not in _WIDE:
            narrow.append(name)
    if declared and narrow:
        return narrow[0]
    beside = (name for name in narrow if name.rpartition(".")[0] in scaled or name in scaled)
    return next(beside, None) or next((n for n in narrow if _is_matrix(n, tensors[n])), None)


def _is_matrix(name: str, tensor: Typed) -> bool:
    """Whether integers are a weight's, whatever else its quantiser writes: BitNet packs four to a
    byte, Marlin calls them B, torchao weight:qdata.
    """
    last = name.rpartition(".")[2]
    if not tensor.dtype.name.startswith(("int", "uint")) or len(tensor.shape) < 2:
        return False
    return last == "weight" or (layer_of(name) is not None and not _BUFFERS.fullmatch(last))

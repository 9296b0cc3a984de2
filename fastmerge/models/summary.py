"""What one checkpoint is, from its headers and config: ``fastmerge info`` and `summarise`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmerge.models.architecture import find_head
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.config import model_type, text_config
from fastmerge.models.names import common_prefix, layer_stacks

# The config's names for what people ask first, llama's spelling; a config without one leaves it
# out.
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class StoredType:
    """All tensors of one stored type."""

    dtype: str  # safetensors' code: BF16
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """One checkpoint. ``parameters`` counts what is stored: a tied lm_head once."""

    path: str
    architecture: str | None
    model_type: str | None
    sizes: dict[str, int]
    tensors: int
    parameters: int
    bytes: int
    types: tuple[StoredType, ...]
    files: dict[str, int]  # weight file to bytes on disk
    side_files: tuple[str, ...]
    tie_word_embeddings: bool | None  # as the config says; None: transformers' default for the type
    has_lm_head: bool
    prefix: str  # what every tensor's name begins with: "bert.", or ""
    layers: str | None  # what stands before the numbers of its layers: "model.layers"
    metadata: dict[str, str]
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def summarise(path: Path) -> Summary:
    """Reads headers, config and the fingerprint's samples of the model at ``path`` (FastmergeError
    if malformed).
    """
    checkpoint = Checkpoint.open(path)
    config = checkpoint.config
    tied = config.get("tie_word_embeddings")
    text = text_config(config)  # multimodal models nest the language model's sizes
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    by_type: dict[str, StoredType] = {}
    for info in checkpoint.tensors.values():
        seen = by_type.get(info.dtype.code, StoredType(info.dtype.code, 0, 0, 0))
        by_type[info.dtype.code] = StoredType(
            seen.dtype, seen.tensors + 1, seen.parameters + info.count, seen.bytes + info.nbytes
        )
    return Summary(
        path=str(path),
        architecture=_architecture(config),
        model_type=model_type(config) or None,
        sizes={name: text[name] for name in _SIZES if isinstance(text.get(name), int)},
        tensors=len(checkpoint.tensors),
        parameters=sum(kind.parameters for kind in by_type.values()),
        bytes=checkpoint.total_bytes,
        types=tuple(by_type.values()),
        files={stamp.path.rpartition("/")[2]: stamp.size for stamp in checkpoint.stamp},
        side_files=tuple(checkpoint.side_files()),
        tie_word_embeddings=tied if isinstance(tied, bool) else None,
        has_lm_head=find_head(shapes) is not None,
        prefix=common_prefix(checkpoint.tensors),
        layers=next(iter(layer_stacks(checkpoint.tensors)), None),
        metadata=checkpoint.metadata,
        fingerprint=checkpoint.fingerprint,
    )


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The first class that the config names, however it names it."""
    named = config.get("architectures")
    for name in named if isinstance(named, list) else [named]:
        if isinstance(name, str):
            return name
    return None

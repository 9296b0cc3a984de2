"""What one checkpoint is, from its headers and config: ``fastmerge info`` and `summarise`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmerge.models.checkpoint import Checkpoint
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
    by_type: dict[str, StoredType] = {}
    for info in checkpoint.tensors.values():
        seen = by_type.get(info.dtype.code, StoredType(info.dtype.code, 0, 0, 0))
        by_type[info.dtype.code] = StoredType(
            seen.dtype, seen.tensors + 1, seen.parameters + info.count, seen.bytes + info.nbytes
        )
    return Summary(
        path=str(path),
        architecture=next(iter(config.get("architectures") or ()), None),
        model_type=config.get("model_type"),
        sizes={name: config[name] for name in _SIZES if isinstance(config.get(name), int)},
        tensors=len(checkpoint.tensors),
        parameters=sum(kind.parameters for kind in by_type.values()),
        bytes=checkpoint.total_bytes,
        types=tuple(by_type.values()),
        files={stamp.path.rpartition("/")[2]: stamp.size for stamp in checkpoint.stamp},
        side_files=tuple(checkpoint.side_files()),
        tie_word_embeddings=config.get("tie_word_embeddings"),
        has_lm_head="lm_head.weight" in checkpoint.tensors,
        prefix=common_prefix(checkpoint.tensors),
        layers=next(iter(layer_stacks(checkpoint.tensors)), None),
        metadata=checkpoint.metadata,
        fingerprint=checkpoint.fingerprint,
    )

"""What one checkpoint is, from its headers and config: ``fastmerge info`` and `summarise`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.errors import ModelError, UnsupportedError
from fastmerge.models.adapter import Adapter
from fastmerge.models.architecture import find_head
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.code_elsewhere import told_of_code
from fastmerge.models.config import model_type, text_config
from fastmerge.models.folder import find_distributed
from fastmerge.models.hub import is_remote, local, resolve
from fastmerge.models.low_precision import find_low_precision
from fastmerge.models.names import common_prefix, layer_stacks
from fastmerge.models.quantised import find_quantised

if TYPE_CHECKING:
    from fastmerge.models.remote import Remote

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
    """One checkpoint. ``parameters`` counts what is stored: a tied lm_head once; of codes that
    fastmerge reads, the numbers that they stand for. ``codes``: which these are, for people, or
    what kind of codes it has instead; None of a model without. ``code``: what its configs would
    have transformers fetch from the Hub and run, a sentence each.
    """

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
    codes: str | None = None
    code: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def place_of(reference: str, *, cache: str | Path | None = None) -> Path:
    """Where a model of the disk or the Hub lies; UnsupportedError for a base with an adapter."""
    base, plus, _ = reference.partition("+")
    if plus and local(reference) is None and local(base) is not None:
        raise UnsupportedError(
            f"{reference}: a base with an adapter, which recipes take; `fastmerge fold` writes it "
            "to a folder: give that"
        )
    place = resolve(reference, cache=cache)
    if find_distributed(place) is not None:
        raise UnsupportedError(
            f"{reference}: a distributed checkpoint of PyTorch's, which recipes take; `fastmerge "
            f"average {reference} -o OUT` writes it as safetensors: give that"
        )
    return place


def open_named(reference: str) -> Checkpoint | Remote:
    """The model that ``reference`` names: a folder, a file, a Hub id or a URL."""
    if not is_remote(reference):
        return Checkpoint.open(place_of(reference))
    from fastmerge.models.remote import Remote

    return Remote(reference)


def summarise(model: Path | Checkpoint | Remote) -> Summary:
    """Reads headers, config and, on the disk, the fingerprint's samples of a model, or of the one
    at a path (FastmergeError if malformed).
    """
    checkpoint = Checkpoint.open(model) if isinstance(model, Path) else model
    if isinstance(checkpoint, Checkpoint):
        files = {stamp.path.rpartition("/")[2]: stamp.size for stamp in checkpoint.stamp}
        side: Mapping[str, bytes | Path] = checkpoint.side_files()
        beside = tuple(side)
    else:
        files = {each.name: each.size for each in checkpoint.files}
        side, beside = {}, tuple(checkpoint.names_beside)  # which are not fetched to be looked at
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
    codes, parameters = _numbers(checkpoint)
    return Summary(
        path=checkpoint.label,
        architecture=_architecture(config),
        model_type=model_type(config) or None,
        sizes={name: text[name] for name in _SIZES if isinstance(text.get(name), int)},
        tensors=len(checkpoint.tensors),
        parameters=parameters,
        bytes=checkpoint.total_bytes,
        types=tuple(by_type.values()),
        files=files,
        side_files=beside,
        tie_word_embeddings=tied if isinstance(tied, bool) else None,
        has_lm_head=find_head(shapes) is not None,
        prefix=common_prefix(checkpoint.tensors),
        layers=next(iter(layer_stacks(checkpoint.tensors)), None),
        metadata=checkpoint.metadata,
        fingerprint=checkpoint.fingerprint,
        codes=codes,
        code=tuple(told_of_code(config, side)),
    )


def codes_of(model: Checkpoint | Remote) -> str | None:
    """What codes a model's weights are stored as, for people; None where they are numbers."""
    return _numbers(model)[0]


def _numbers(model: Checkpoint | Remote) -> tuple[str | None, int]:
    """`codes_of`, and how many numbers the model has."""
    every = sum(info.count for info in model.tensors.values())
    try:
        found = find_low_precision(model.config, model.tensors, model.label)
    except ModelError as error:
        return str(error), every
    if found is None:
        other = find_quantised(model.config, model.tensors, None)
        packed = other is not None and other.packed is not None
        return (f"{other.kind}, which is not merged" if other and packed else None), every
    rest = sum(info.count for name, info in model.tensors.items() if name not in found.consumed)
    coded = sum(math.prod(each.shape) for each in found.tensors.values())
    return f"{found}, {len(found.tensors)} tensors", rest + coded


def _architecture(config: Mapping[str, Any]) -> str | None:
    """The first class that the config names, however it names it."""
    named = config.get("architectures")
    for name in named if isinstance(named, list) else [named]:
        if isinstance(name, str):
            return name
    return None


@dataclass(frozen=True)
class AdapterSummary:
    """One LoRA adapter. ``modules`` counts those with factors by the last part of their names,
    ``parameters`` all that is stored.
    """

    path: str
    base: str | None  # as its config names it
    task: str | None
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    kinds: tuple[str, ...]  # "rsLoRA", "DoRA"
    modules: dict[str, int]
    saved: tuple[str, ...]  # tensors that replace the base's
    tokens: int  # rows of embeddings that are replaced
    tensors: int
    parameters: int
    bytes: int
    fingerprint: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def summarise_adapter(path: Path) -> AdapterSummary:
    """Reads header, config and the fingerprint's samples of the adapter in the folder ``path``
    (FastmergeError if malformed).
    """
    adapter = Adapter.open(path)
    kinds = {"use_rslora": "rsLoRA", "use_dora": "DoRA"}
    return AdapterSummary(
        path=str(path),
        base=adapter.base_name,
        task=adapter.config.get("task_type"),
        ranks=adapter.ranks,
        scales=tuple(sorted({each.scale for each in adapter.factors.values()})),
        kinds=tuple(name for key, name in kinds.items() if adapter.config.get(key)),
        modules=dict(Counter(module.rpartition(".")[2] for module in adapter.factors)),
        saved=tuple(adapter.saved),
        tokens=sum(len(each.indices) for each in adapter.tokens.values()),
        tensors=len(adapter.tensors),
        parameters=sum(info.count for info in adapter.tensors.values()),
        bytes=adapter.total_bytes,
        fingerprint=adapter.fingerprint,
    )

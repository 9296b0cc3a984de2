"""What a config.json says of the language model: its part of the file, its layers, its ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastmerge.models.families import TIED, UNTIED

# Multimodal configs nest the language model's under one of these.
_NESTS = ("text_config", "llm_config", "language_config", "thinker_config")

# How many layers there are; gpt2, dbrx, gpt_neo and openelm have names of their own for it.
LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers",
)  # fmt: skip

# What the second of two halves calls its own, which may be counted apart.
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")

# Layers for multi-token prediction, which are stored behind the counted ones.
EXTRA_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model (multimodal ones nest it)."""
    for key in _NESTS:
        nested = config.get(key)
        if isinstance(nested, Mapping):
            part = text_config(nested)
            if count_key(part) is not None:
                return part
    return config


def count_key(config: Mapping[str, Any]) -> str | None:
    """Under which key the part of a config counts its layers."""
    return next((key for key in LAYER_COUNTS if whole(config, key) > 0), None)


def layer_count(config: Mapping[str, Any], *, decoder: bool = False) -> int | None:
    """How many layers the language model has, or None where the config does not say.

    decoder: it is the second half of an encoder and a decoder, which may be counted apart.
    """
    part = text_config(config)
    key = "decoder_layers" if decoder and whole(part, "decoder_layers") else count_key(part)
    return None if key is None else int(part[key])


# Where multimodal configs and those of an encoder and a decoder nest what they say of a part, and
# what they call the count of its layers there beside the usual names.
_SECTIONS = {
    "vision": ("vision_config", "visual_config", "vit_config", "visual"),
    "audio": ("audio_config", "audio_encoder_config"),
    "encoder": ("encoder", "encoder_config"),
    "decoder": ("decoder", "decoder_config"),
}
_PART_COUNTS = {
    "vision": ("depth",),
    "audio": ("encoder_layers",),
    "encoder": ("encoder_layers", "num_encoder_layers"),
    "decoder": DECODER_COUNTS,
}
_HALVES = (*_PART_COUNTS["encoder"], *_PART_COUNTS["decoder"])


class PartLayers(NamedTuple):
    """What a config says of the layers of one part: where (a path of keys; None: nowhere), under
    which keys it counts them, and how many.
    """

    path: tuple[str, ...] | None
    keys: tuple[str, ...] = ()
    number: int | None = None


def part_layers(config: Mapping[str, Any], part: str) -> PartLayers:
    """What ``config`` says of the layers of one part (named as in models/module_names.py), but for
    the language model of a multimodal one, of which `layer_count` and `text_config` tell.
    """
    for outer in ((), ("thinker_config",)):
        found = section(config, outer)
        for key in _SECTIONS.get(part, ()):
            if isinstance(found.get(key), Mapping):
                inner, path = found[key], (*outer, key)
                own = [*_PART_COUNTS[part], *LAYER_COUNTS]
                keys = [name for name in own if whole(inner, name) > 0]
                same = tuple(name for name in keys if inner[name] == inner[keys[0]])
                return PartLayers(path, same, inner[keys[0]] if keys else None)
    if part not in ("encoder", "decoder"):
        return PartLayers(None)
    own = [name for name in _PART_COUNTS[part] if whole(config, name) > 0]
    shared = [name for name in LAYER_COUNTS if whole(config, name) > 0]
    found_in = (own + shared)[:1]
    count = whole(config, found_in[0]) if found_in else None
    halves = config.get("is_encoder_decoder") or any(whole(config, key) for key in _HALVES)
    # Of two halves the usual names count the encoder's; OPT's decoder is all there is.
    if part == "encoder" or not halves:
        own += [name for name in shared if config[name] == count]
    return PartLayers((), tuple(own), count)


def section(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """The mapping at ``path``; an empty one where there is none."""
    found: Any = config
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def extra_layers(config: Mapping[str, Any]) -> dict[str, int]:
    """The keys that count layers for multi-token prediction, where there are any."""
    part = text_config(config)
    return {key: whole(part, key) for key in EXTRA_COUNTS if whole(part, key) > 0}


def whole(config: Mapping[str, Any], key: str) -> int:
    """The whole number under ``key``, or 0 where there is none."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def model_type(config: Mapping[str, Any]) -> str:
    """The ``model_type``, or '' where it is absent or no text."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a language model of this type, so that its shapes follow from the
    config.
    """
    return model_type(config) in TIED or model_type(config) in UNTIED


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Whether transformers makes a head that is not stored from the embeddings; None where neither
    the config nor the type's default says so.
    """
    parts = (config, text_config(config))
    for part in parts:
        value = part.get("tie_word_embeddings")
        if value is not None:
            return bool(value)
    for part in parts:
        if model_type(part) in TIED:
            return True
        if model_type(part) in UNTIED:
            return False
    return None


CAUSAL = ("ForCausalLM", "LMHeadModel")  # how classes with a head end: GPT2LMHeadModel


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """The names of transformers' classes that it gives."""
    named = config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def is_tied(config: Mapping[str, Any]) -> bool:
    """`says_tied`, with False for what is not known: a model without a head then stays without."""
    return says_tied(config) is True


def written_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the type's default for a tie that it gives as null, which transformers 5
    refuses.
    """
    said = {"tie_word_embeddings": says_tied(config)}
    if None in said.values():
        return dict(config)

    def is_null(part: Any) -> bool:
        return isinstance(part, Mapping) and part.get("tie_word_embeddings", said) is None

    nests = {key: {**config[key], **said} for key in _NESTS if is_null(config.get(key))}
    return {**config, **nests, **(said if is_null(config) else {})}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with a head of its own."""
    result = {**config, "tie_word_embeddings": False}
    for key in _NESTS:
        nested = config.get(key)
        if isinstance(nested, Mapping) and (
            "tie_word_embeddings" in nested or model_type(nested) in TIED
        ):
            result[key] = {**nested, "tie_word_embeddings": False}
    return result

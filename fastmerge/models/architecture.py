"""What the planner knows of model architectures by tensor name: layers, embeddings, heads.

Merging by ``models:`` needs none of it: any set of tensors works. Slicing needs to know what comes
before and after the layers, and tied embeddings need two names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

# The last modules in the names of transformers' input embeddings and language-model heads: llama's
# first, then those of gpt2, gpt_neox, bloom and falcon, mamba, ctrl, openai-gpt, modernbert, ...
_EMBEDDINGS = (
    "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "tokens_embed",
    "word_embedding", "embeddings", "shared", "w",
)  # fmt: skip
_HEADS = (
    "lm_head", "embed_out", "output_projection", "lm_head.decoder", "predictions.decoder",
    "generator_lm_head", "proj_out", "head", "pred_layer.proj", "lm_loss", "lm_head.out_proj",
    "decoder", "output",
)  # fmt: skip
# The same again in layers for multi-token prediction.
_IN_LAYERS = ("embed_tokens", "shared_head.head", "lm_head")
# What else precedes a stack of layers, and what follows it besides a head.
_BEFORE = (
    "wpe", "rotary_emb", "embed_positions", "word_embeddings_layernorm", "positions_embed",
    "project_in", "embedding_norm", "pre_ln", "embed_norm", "layernorm_embedding",
)  # fmt: skip
_AFTER = (
    "norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "ln_out", "project_out",
    "final_norm", "layer_norm", "out_norm", "pos_emb",
)  # fmt: skip
# The heads of transformers' classifiers, taggers and reward models, beside the model.
_OTHER_HEADS = ("score", "classifier", "qa_outputs", "v_head")
# What stands beside an encoder under its own root, and beside the model: bert, roberta, electra,
# distilbert, vit.
_OF_ENCODERS = ("pooler", "layernorm")
_BESIDE_ENCODERS = (
    *_OTHER_HEADS, "cls", "lm_head", "pre_classifier", "vocab_transform", "vocab_layer_norm",
    "vocab_projector", "generator_predictions", "generator_lm_head", "discriminator_predictions",
)  # fmt: skip
_OTHER_PARTS = ("vision", "visual", "audio", "image", "speech", "encoder.")

# Written by old versions of transformers; new ones compute it and ignore what a file holds.
COMPUTED = ".rotary_emb.inv_freq"

# Heads for multi-token prediction that are stored beside the layers (qwen3_next, mimo, ...).
EXTRA_PREFIXES = ("mtp.", "model.mtp.", "model.mtp_layers.")

# A number as Python writes it: the tensor's name is made of it again. Nine digits: int takes 4300.
LAYER_NUMBER = r"(0|[1-9][0-9]{0,8})"
_LAYER = re.compile(rf"(.*?\b(?:layers?|h|blocks?))\.{LAYER_NUMBER}\.(.+)")


class Stack(NamedTuple):
    """One way to name a language model's tensors: ``layers``.<index>.<rest>, what precedes, what
    follows (both as prefixes).
    """

    layers: str
    before: tuple[str, ...]
    after: tuple[str, ...]


def _stack(layers: str) -> Stack:
    root = layers.rpartition(".")[0] + "." if "." in layers else ""
    # lm_head stands beside the model, in multimodal ones beside language_model.model.
    heads = {"", root, root.removesuffix("model.")}
    return Stack(
        layers=layers,
        before=tuple(f"{root}{name}." for name in (*_EMBEDDINGS, *_BEFORE)),
        after=(
            *(f"{root}{name}." for name in _AFTER),
            *(f"{at}{name}." for at in sorted(heads) for name in _HEADS),
            *(f"{name}." for name in _OTHER_HEADS),
        ),
    )


def _encoder(root: str, layers: str) -> Stack:
    return Stack(
        layers=f"{root}{layers}",
        before=(f"{root}embeddings.",),
        after=(
            *(f"{root}{name}." for name in _OF_ENCODERS),
            *(f"{name}." for name in _BESIDE_ENCODERS),
        ),
    )


# Where the layers of transformers' decoders are: llama's, and most others'; the language models
# inside multimodal ones, old and new layout; gpt2, falcon and bloom; gpt_neox; mamba and
# nemotron_h; opt; mpt; rwkv; and the bare models without a head. Then those of encoders that are
# models of their own.
STACKS = (
    *(
        _stack(layers)
        for layers in (
            "model.layers", "language_model.model.layers", "model.language_model.layers",
            "model.text_model.layers", "transformer.h", "gpt_neox.layers", "backbone.layers",
            "model.decoder.layers", "transformer.blocks", "rwkv.blocks", "layers", "h",
        )
    ),
    *(
        _encoder(root, layers)
        for root, layers in (
            ("bert.", "encoder.layer"), ("roberta.", "encoder.layer"),
            ("electra.", "encoder.layer"), ("vit.", "encoder.layer"),
            ("distilbert.", "transformer.layer"), ("", "encoder.layer"), ("", "transformer.layer"),
        )
    ),
)  # fmt: skip


class LayerName(NamedTuple):
    """A tensor name taken apart: ``stack``.``number``.``rest``."""

    stack: str
    number: int
    rest: str


def layer_of(tensor: str) -> LayerName | None:
    """The outermost numbered layer in a tensor's name, or None (embeddings, final norm, head)."""
    found = _LAYER.fullmatch(tensor)
    return LayerName(found[1], int(found[2]), found[3]) if found else None


def kinds_of(names: Iterable[str]) -> list[tuple[str, int | None]]:
    """Of each name the kind of tensor, which one layer after the other has, and its layer's number,
    None outside of layers: what a table by layer has in its lines. What several stacks have (an
    encoder beside a decoder, a tower beside a language model) is called by its stack, too.
    """
    every = [*names]
    layers = [layer_of(name) for name in every]
    stacks: dict[str, set[str]] = {}
    for place in filter(None, layers):
        stacks.setdefault(place.rest, set()).add(place.stack)
    found: list[tuple[str, int | None]] = []
    for name, layer in zip(every, layers, strict=True):
        kind = name
        if layer is not None:
            shared = len(stacks[layer.rest]) > 1
            kind = f"{layer.stack}.{layer.rest}" if shared else layer.rest
        found.append((kind.removesuffix(".weight"), layer and layer.number))
    return found


def find_stack(layers: Collection[str]) -> Stack | None:
    """The table's row for a model whose `LayerName.stack`s are ``layers``, or None."""
    return next((stack for stack in STACKS if stack.layers in layers), None)


def find_embedding(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which of the tensors (names to shapes) are the input embeddings, or None."""
    return next(iter(_found(shapes, _EMBEDDINGS)), None)


def find_head(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Which of the tensors (names to shapes) is the language-model head, or None.

    By name; under a name that other parts have too, also by as many rows as the embeddings.
    """
    embedding = find_embedding(shapes)
    rows = None if embedding is None else shapes[embedding][0]
    for name in _found(shapes, _HEADS):
        if ends(name, "lm_head") or shapes[name][0] == rows:
            return name
    return None


def is_vocabulary(name: str) -> bool:
    """Whether a tensor of this name has a row for each token."""
    return layer_of(name) is None and any(ends(name, module) for module in (*_EMBEDDINGS, *_HEADS))


def vocabulary_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Which of the tensors have a row for each token: embeddings, heads and their biases."""
    embedding = find_embedding(shapes)
    if embedding is None:
        return []
    wanted = shapes[embedding]
    found = []
    for name, shape in shapes.items():
        matrix = name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name
        modules = (*_EMBEDDINGS, *_HEADS) if layer_of(name) is None else _IN_LAYERS
        if shape == (wanted if matrix == name else wanted[:1]) and any(
            ends(matrix, module) for module in modules
        ):
            found.append(name)
    return found


def ends(name: str, module: str) -> bool:
    """Whether ``name`` is the weight of a module so called, at any depth."""
    return f".{name}".endswith(f".{module}.weight")


def _found(shapes: Mapping[str, tuple[int, ...]], modules: Sequence[str]) -> list[str]:
    """The weights of ``modules`` among ``shapes``: in the modules' order, the shallowest first."""
    endings = tuple(f"{module}.weight" for module in modules)
    found = [
        name
        for name, shape in shapes.items()
        if name.endswith(endings)
        and len(shape) == 2
        and any(ends(name, module) for module in modules)
        and not _is_other(name)
    ]

    def rank(name: str) -> tuple[int, int, str]:
        order = next(i for i, module in enumerate(modules) if ends(name, module))
        return order, name.count("."), name

    return sorted(found, key=rank)


def _is_other(name: str) -> bool:
    """Whether a tensor belongs to a layer, or to another part than the language model."""
    return (
        layer_of(name) is not None
        or name.startswith(EXTRA_PREFIXES)
        or any(part in name for part in _OTHER_PARTS)
    )

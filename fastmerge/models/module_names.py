"""The parts of a multimodal or encoder-decoder model, by the words in its tensors' names: those of
transformers' own layouts, old and new.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from fastmerge.models.architecture import Stack

# By part: what recipes call it (mergekit's names among them), and the modules in tensors' names
# that say it. The first that fits counts: vision towers have encoders inside. What fits none is
# the text model: its layers, embeddings and head.
PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "projector": (
        ("projector", "multi_modal_projector", "connector"),
        ("multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list"),
    ),
    "vision": (
        ("vision", "vision_tower", "vision_model", "visual"),
        ("vision_tower", "vision_model", "visual"),
    ),
    "audio": (("audio", "audio_tower"), ("audio_tower",)),
    "encoder": (("encoder",), ("encoder",)),
    "decoder": (("decoder",), ("decoder",)),
    "text": (("text", "text_decoder", "text_model", "language_model", "shared"), ()),
}

# What stands before the layers of a part, and what behind them, by the words of its name.
_BEHIND_FIRST = {"post", "final"}  # post_layernorm, whatever else a name has
_BEFORE = {
    "embed", "embeds", "embedder", "embedding", "embeddings", "patch", "pos", "position",
    "positional", "pre", "class", "token", "rotary", "register", "wpe", "wte",
}  # fmt: skip
_BEHIND = {"norm", "layernorm", "ln", "head", "pooler", "adapter", "proj", "predictions"}


def part_of(tensor: str) -> str:
    """The part that the tensor so named belongs to."""
    modules = tensor.split(".")[:-1]
    for part, (_, words) in PARTS.items():
        if any(word in modules for word in words):
            # A decoder may be a model with an encoder's names inside: decoder.bert.encoder.
            halves = [module for module in modules if module in ("encoder", "decoder")]
            return halves[0] if part == "encoder" else part
    return "text"


def row_of(layers: str, names: Collection[str]) -> Stack:
    """The row of a part whose layers are ``layers``.<index>, from its other tensors' ``names``:
    those that are known to stand before them, and behind.
    """
    before, behind = [], []
    for name in names:
        words = set(re.split(r"[._]", name.lower()))
        starts = words & _BEFORE or any(word.startswith("conv") for word in words)
        if starts and not words & _BEHIND_FIRST:
            before.append(name)
        elif words & (_BEHIND | _BEHIND_FIRST):
            behind.append(name)
    return Stack(layers, tuple(before), tuple(behind))

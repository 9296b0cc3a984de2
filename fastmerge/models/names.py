"""Tensor names of whole models: what they all begin with, and how those of two models differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

from fastmerge.models.architecture import layer_of

# Who writes names with such a beginning, for the message.
WRITERS = {
    "_orig_mod.": "torch.compile's wrapper",
    "module.": "DataParallel's wrapper",
    "base_model.model.": "peft's wrapper",
}
# transformers' own renaming of the parts of multimodal models (4.52), there and back: llava's, and
# qwen2_vl's, which kept a language model's own names.
_PARTS = (
    ("model.language_model.", "language_model.model."), ("model.language_model.", "model."),
    ("model.", ""),
    ("language_model.model.", "model.language_model."), ("", "model."),
)  # fmt: skip
_NUMBERED = re.compile(r"(^|\.)\d+\.")
# What training loops and torch's optimizers call what they keep beside the weights.
_OPTIMIZER = re.compile(r"optim(izer)?s?(_states?)?(_\d+)?")
_MOMENTS = (".exp_avg", ".exp_avg_sq", ".max_exp_avg_sq", ".momentum_buffer")
_MOST_PARTS = 16  # of a name, before which the two may differ
_MOST_TRIED = 8  # pairs of names that could be the same tensor, for each way to cut one


def common_prefix(names: Collection[str]) -> str:
    """The whole dotted parts that all names begin with: "bert.", or ""."""
    if not names:
        return ""
    first, last = min(names), max(names)
    same = 0
    for i, letter in enumerate(first):
        if i >= len(last) or last[i] != letter:
            break
        same = i + 1 if letter == "." else same
    return first[:same]


def is_of_optimizer(name: str) -> bool:
    """Whether a tensor so named, or a folder, is an optimizer's state and no model's."""
    if name.startswith("optim"):
        return _OPTIMIZER.fullmatch(name.partition(".")[0]) is not None
    return name.endswith(_MOMENTS) or (name.startswith("state.") and name.endswith(".step"))


def layer_stacks(names: Collection[str]) -> list[str]:
    """What stands before the numbers of layers ("model.layers"), that of most tensors first."""
    found = Counter(place.stack for place in map(layer_of, names) if place is not None)
    return [stack for stack, _ in found.most_common()]


def renamed(mine: Collection[str], theirs: Collection[str]) -> tuple[str, str] | None:
    """(a, b) where the names that only one of two models has are the same but for their beginning:
    ``a`` in mine is ``b`` in theirs. None where they differ otherwise.
    """
    own, other = set(mine), set(theirs)
    lost = [name for name in mine if name not in other]
    extra = [name for name in theirs if name not in own]
    if not lost or not extra:
        return None
    strangers = set(extra)
    for a, b in _beginnings(lost, extra):
        moved = {b + name[len(a) :] for name in lost if name.startswith(a)}
        # A head or a buffer may be missing besides.
        if 10 * len(moved & strangers) >= 8 * min(len(lost), len(extra)):
            return a, b
    return None


def moved_part(mine: Collection[str], theirs: Collection[str]) -> tuple[str, str] | None:
    """(a, b) as in `renamed`, of a multimodal model's part: all of mine that begin with ``a``."""
    other = set(theirs)
    for a, b in _PARTS:
        part = [name for name in mine if name.startswith(a)]
        if part and all(b + name[len(a) :] in other for name in part):
            return a, b
    return None


def _beginnings(lost: list[str], extra: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of beginnings that make one lost name an extra one, the shortest first. Two parts must
    stay: every name ends in ".weight".
    """
    for name in (lost[0], lost[len(lost) // 2], lost[-1]):
        parts = name.split(".")
        for cut in range(min(max(1, len(parts) - 1), _MOST_PARTS)):
            end = ".".join(parts[cut:])
            alike = [found for found in extra if found == end or found.endswith(f".{end}")]
            for found in alike[:_MOST_TRIED]:
                a, b = name[: len(name) - len(end)], found[: len(found) - len(end)]
                if not (_NUMBERED.search(a) and _NUMBERED.search(b)):  # other layers, then
                    yield a, b


def prefix_hint(a: str, of_a: str, b: str, of_b: str) -> str:
    """What to say of names that differ by `renamed`'s (a, b), and of whose they are."""
    written = next((f" ({who})" for key, who in WRITERS.items() if key in (a, b)), "")
    return (
        f"the names differ only by a prefix, {_shown(a)} in '{of_a}' and {_shown(b)} in "
        f"'{of_b}'{written}; rename the tensors of one"
    )


def _shown(prefix: str) -> str:
    return f"'{prefix}'" if prefix else "none"

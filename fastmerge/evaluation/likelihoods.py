"""Log-likelihoods of continuations, with every token read once.

The endings of an item share its question, and the items of a task their examples: as sequences of
tokens they are a prefix tree. The tree is read from its root. What many share is read once and
stays in the key-value cache; what hangs below is packed, branch beside branch, into one row of
tokens without padding, in which a token sees its ancestors alone. Only the nodes before a
continuation's tokens go through the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmerge.errors import FastmergeError

Tokens = Sequence[int]
Request = tuple[Tokens, Tokens]  # what is given, what is asked
Answer = tuple[float, bool]  # the log-likelihood (nats), and whether it is the likeliest by tokens

# Tokens of one pass. On a CPU the matrix products are at full speed from some 256 on, and what
# branches add to one another's attention grows with it; a GPU needs more to be busy.
_PACK = {"cpu": 384}
_PACK_ELSEWHERE = 2048
_CHAIN = 1024  # of a pass over what all below share: bounds the activations and the logits
_SHORT = 32  # tokens: a shorter common beginning is cheaper to read again than in a pass of its own

# Models whose tokens see all before them, through positions that do not depend on the length.
_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma")
_ROPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Step:
    """One pass: new tokens after the first ``past`` of the cache."""

    past: int
    tokens: list[int]
    parents: list[int]  # the node before each within the pass; -1: the last of the cache
    targets: list[tuple[int, int, int]] = field(default_factory=list)  # node, its next, request


def reads(model: Any) -> bool:
    """Whether `likelihoods` reads ``model`` as a plain pass over each sequence would."""
    config = model.config
    ropes = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in _TYPES
        and getattr(config, "sliding_window", None) is None
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention"}
        and ropes.get("rope_type", "default") in _ROPES
        and getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
    )


def likelihoods(
    model: Any, requests: Sequence[Request], max_length: int, *, pack: int | None = None
) -> list[Answer]:
    """The answers of a transformers ``model`` that `reads` accepts, in the order of ``requests``.

    A sequence of more than ``max_length`` tokens before the last is cut on the left, as
    lm-evaluation-harness does. ``pack``: tokens of one pass.
    """
    import torch
    from transformers import DynamicCache

    if pack is None:
        pack = _PACK.get(model.device.type, _PACK_ELSEWHERE)
    totals = np.zeros(len(requests))
    greedy = np.ones(len(requests), bool)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for step in steps(requests, max_length, pack):
            cache.crop(step.past - cache.get_seq_length())
            nodes = sorted({node for node, _, _ in step.targets})
            logits = _pass(model, cache, step, nodes or [0])
            if not step.targets:
                continue
            place = {node: row for row, node in enumerate(nodes)}
            rows = torch.tensor([place[node] for node, _, _ in step.targets], device=model.device)
            asked = torch.tensor([token for _, token, _ in step.targets], device=model.device)
            found = logits[rows, asked] - logits.logsumexp(-1)[rows]
            likeliest = logits.argmax(-1)[rows] == asked
            owners = [request for _, _, request in step.targets]
            np.add.at(totals, owners, found.double().cpu().numpy())
            np.logical_and.at(greedy, owners, likeliest.cpu().numpy())
    return [(float(total), bool(best)) for total, best in zip(totals, greedy, strict=True)]


def _pass(model: Any, cache: Any, step: Step, nodes: list[int]) -> Any:
    """The logits behind ``nodes``, in float32; the cache holds the step's tokens thereafter."""
    import torch

    depths, seen = _relations(step.parents)
    options: dict[str, Any] = {}
    if step.past or not _is_chain(step.parents):
        hidden = np.zeros((len(seen), step.past + len(seen)), np.float32)
        hidden[:, step.past :][~seen] = float(torch.finfo(model.dtype).min)
        mask = torch.from_numpy(hidden).to(model.device, model.dtype)
        options["attention_mask"] = mask[None, None]
    return (
        model(
            input_ids=torch.tensor([step.tokens], device=model.device),
            position_ids=torch.from_numpy(step.past + depths)[None].to(model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(nodes, device=model.device),
            **options,
        )
        .logits[0]
        .float()
    )


def _is_chain(parents: Sequence[int]) -> bool:
    return all(parent == node - 1 for node, parent in enumerate(parents))


def _relations(
    parents: Sequence[int],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """How far below the cache each node is, and which nodes of the pass it sees (rows: who)."""
    depths = np.zeros(len(parents), np.int64)
    seen = np.zeros((len(parents), len(parents)), bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            seen[node] = seen[parent]
        seen[node, node] = True
    return depths, seen


def steps(requests: Sequence[Request], max_length: int, pack: int) -> Iterator[Step]:
    """The passes that read every token once, in the order in which they build on the cache."""
    return _Tree(requests, max_length, pack).steps()


class _Tree:
    """The requests' sequences, sorted: those that share a beginning lie side by side."""

    def __init__(self, requests: Sequence[Request], max_length: int, pack: int) -> None:
        for given, asked in requests:
            if not given or not 0 < len(asked) <= max_length:
                raise FastmergeError(
                    f"a text of {len(asked)} tokens after {len(given)} cannot be scored by a model "
                    f"that reads {max_length}: raise evaluate.max_length, or drop the item"
                )
        cut = [
            (tuple((*given, *asked)[-(max_length + 1) :][:-1]), number)
            for number, (given, asked) in enumerate(requests)
        ]
        cut.sort()
        groups = [(tokens, [n for _, n in same]) for tokens, same in groupby(cut, lambda x: x[0])]
        self._pack = pack
        self._asked = [asked for _, asked in requests]
        self._tokens = [tokens for tokens, _ in groups]
        self._owners = [owners for _, owners in groups]
        # How many tokens each has in common with the one before it.
        self._common = [0, *map(_common, self._tokens, self._tokens[1:])]
        own = [len(t) - c for t, c in zip(self._tokens, self._common, strict=True)]
        self._sums = np.concatenate([[0], np.cumsum(own)])

    def _size(self, first: int, last: int, depth: int) -> int:
        """The nodes below ``depth`` of the sequences from ``first`` up to ``last``."""
        others = int(self._sums[last] - self._sums[first + 1])
        return len(self._tokens[first]) - depth + others

    def steps(self) -> Iterator[Step]:
        # The rest of a subtree comes before its siblings, so the cache never loses what they need.
        waiting = [(0, len(self._tokens), 0)] if self._tokens else []
        while waiting:
            first, last, depth = waiting.pop()
            if self._size(first, last, depth) <= self._pack:
                yield self._packed(range(first, last), depth)
                continue
            shared = min(self._common[first + 1 : last], default=len(self._tokens[first]))
            if shared - depth >= _SHORT:
                yield from self._trunk(first, last, depth, shared)
                depth = shared
            again = shared - depth  # read in each pack
            packed: list[int] = []
            used = again
            for begin, end in self._branches(first, last, shared):
                size = self._size(begin, end, shared)
                if again + size > self._pack:
                    waiting.append((begin, end, depth))
                elif again + size:
                    if used + size > self._pack:
                        yield self._packed(packed, depth)
                        packed, used = [], again
                    used += size
                    packed += range(begin, end)
            if packed:
                yield self._packed(packed, depth)

    def _branches(self, first: int, last: int, shared: int) -> Iterator[tuple[int, int]]:
        """The ranges that part from one another after ``shared`` tokens."""
        begin = first
        for number in range(first + 1, last):
            if self._common[number] == shared:
                yield begin, number
                begin = number
        yield begin, last

    def _trunk(self, first: int, last: int, depth: int, shared: int) -> Iterator[Step]:
        """What a range shares below ``depth``, in pieces."""
        for begin in range(depth, shared, _CHAIN):
            end = min(begin + _CHAIN, shared)
            tokens = list(self._tokens[first][begin:end])
            step = Step(begin, tokens, list(range(-1, len(tokens) - 1)))
            for number in range(first, last):
                self._aim(step, number, range(begin, end), range(end - begin))
            yield step

    def _packed(self, numbers: Sequence[int], depth: int) -> Step:
        """The tree below ``depth`` of some sequences, in their order."""
        step = Step(depth, [], [])
        path: list[int] = []  # the nodes of the sequence at hand, from ``depth`` on
        before: Tokens = ()
        for number in numbers:
            tokens = self._tokens[number]
            del path[max(_common(before, tokens) - depth, 0) :]
            for token in tokens[depth + len(path) :]:
                step.parents.append(path[-1] if path else -1)
                path.append(len(step.tokens))
                step.tokens.append(token)
            self._aim(step, number, range(depth, len(tokens)), path)
            before = tokens
        return step

    def _aim(self, step: Step, number: int, places: range, nodes: Sequence[int]) -> None:
        """Adds the targets of a sequence behind its ``places``, which are ``nodes`` of the step."""
        length = len(self._tokens[number])
        for request in self._owners[number]:
            asked = self._asked[request]
            begin = length - len(asked)
            for place in range(max(begin, places.start), min(length, places.stop)):
                step.targets.append((nodes[place - places.start], asked[place - begin], request))


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    low, high = 0, length  # alike up to low, not up to high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle)
    return low

"""The plan of a merge: every output tensor's tree, and what follows from headers alone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.errors import in_a_line
from fastmerge.methods import Combination, Consensus, Pointwise
from fastmerge.models.model import Model, folder_of
from fastmerge.models.side_files import is_tokenizer
from fastmerge.models.vocabulary import GENERATION, Vocabulary, with_ids, with_template
from fastmerge.once import cached_property
from fastmerge.planning.any_plan import AnyPlan
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.spanning import spanning
from fastmerge.tree.collapse import collapse
from fastmerge.tree.nodes import Leaf, LowRank, Made, Merge, Node
from fastmerge.tree.rewrite import Digests


@dataclass(frozen=True)
class Plan(AnyPlan):
    """Everything a merge needs to know before it reads a weight.

    ``tensors``: in the order to write them. ``config``: of the output. ``donor_model``: whose
    tokenizer and other side files are copied. ``vocabulary``, ``chat_template``, ``token_ids``:
    what is written beside the weights where that is not the donor's as it is. ``template``: of a
    search, the linear merge of all its models, whose sources every candidate's are among, so that
    what is prepared for one serves them all.

    ``models``, ``references``: what is read, and as the user wrote it. ``seed``: None where nothing
    is drawn; ``seed_derived``: nobody gave it, and it follows from what the recipe means.
    ``recipe_text``: or another text that says how. ``notes``: what was decided that the recipe does
    not say. ``keep_paths``: whether what is written may name folders of this machine.
    """

    tensors: tuple[TensorPlan, ...]
    config: dict[str, Any]
    donor_model: Model
    vocabulary: Vocabulary | None = None
    chat_template: str | None = None
    token_ids: Mapping[str, Any] | None = None
    template: Plan | None = None

    def __repr__(self) -> str:
        return in_a_line(self, "references", "tensors", "bytes_in", "bytes_out", "methods", "seed")

    @property
    def as_numbers(self) -> Plan:
        """The plan with no tensor rounded to codes: what memory holds."""
        if all(tensor.encoding is None for tensor in self.tensors):
            return self
        return replace(self, tensors=tuple(replace(t, encoding=None) for t in self.tensors))

    @property
    def written(self) -> list[tuple[str, DType, tuple[int, ...]]]:
        """What the output's files hold: each tensor's name, type and shape, in order."""
        parts = (part for tensor in self.tensors for part in tensor.written)
        return [(part.name, part.dtype, part.shape) for part in parts]

    @property
    def donor(self) -> Path:
        """The folder of ``donor_model``; UnsupportedError where it has none."""
        return folder_of(self.donor_model)

    def side_files(self) -> dict[str, bytes | Path]:
        """Returns what is written beside the weights, by name, but for config.json: bytes, or a
        file to copy.
        """
        files = dict(self.donor_model.side_files())
        if self.vocabulary is not None:
            files = {name: file for name, file in files.items() if not is_tokenizer(name)}
            files |= self.vocabulary.written()
        if self.chat_template is not None:
            files = with_template(files, self.chat_template, self.donor_model.label)
        if self.token_ids and GENERATION in files:
            files[GENERATION] = with_ids(files[GENERATION], self.token_ids)
        return files

    @cached_property
    def bytes_in(self) -> int:
        """Bytes of the source tensors of every output tensor, each counted once for each output."""
        return sum(tensor.bytes_in for tensor in self.tensors)

    @cached_property
    def spanning(self) -> Mapping[Merge, int]:
        """The merges that are trimmed together, over all tensors, with their element counts;
        FastmergeError where that cannot be.
        """
        return spanning((item.merges, item.count) for item in self.tensors)

    @cached_property
    def bytes_out(self) -> int:
        """Bytes of tensor data written."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of all that decides the output's bytes: version, inputs, methods, values,
        seed, dtypes.
        """
        from fastmerge.version import __version__

        trees, digest = Digests(), hashlib.sha256()
        head = [__version__, [model.fingerprint for model in self.models], self.config]
        digest.update(json.dumps(head, sort_keys=True, default=str).encode())
        for tensor in self.tensors:
            tree = trees.of(tensor.root)
            digest.update(f"\n{tensor.name!r} {tensor.shape} {tensor.dtype.code} {tree}".encode())
            if tensor.encoding is not None:
                digest.update(repr(tensor.encoding).encode())
            if tensor.in_float64:
                digest.update(b" in float64")
        return digest.hexdigest()

    @property
    def methods(self) -> dict[str, int]:
        """How many output tensors each method takes part in; 'copy' for those taken as they are,
        'adapter' for those that one makes of a base's.
        """
        return dict(Counter(name for tensor in self.tensors for name in _made_by(tensor)))

    def describe(self) -> dict[str, Any]:
        """Returns the plan in plain values, for people and for JSON. ``passes`` is the most any
        tensor needs over its inputs.
        """
        return {
            "tensors": len(self.tensors),
            "parameters": sum(tensor.count for tensor in self.tensors),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "passes": max((passes(tensor) for tensor in self.tensors), default=0),
            "methods": self.methods,
            "dtypes": dict(Counter(dtype.name for _, dtype, _ in self.written)),
            "largest_tensor_bytes": max((tensor.nbytes for tensor in self.tensors), default=0),
            "models": [
                {
                    "reference": reference,
                    "path": model.label,
                    "tensors": len(model.tensors),
                    "bytes": sum(info.nbytes for info in model.tensors.values()),
                }
                for reference, model in zip(self.references, self.models, strict=True)
            ],
            "donor": str(self.donor_model.folder or self.donor_model.label),
            "seed": self.seed,
            "seed_derived": self.seed_derived,
            "notes": list(self.notes),
        }


def _made_by(tensor: TensorPlan) -> Iterable[str]:
    root = tensor.root
    if isinstance(root, Merge) and root.is_flat:
        return (root.method.name,)
    if isinstance(root, Made):
        return (root.kind,)
    methods = dict.fromkeys(node.method.name for node in reversed(tensor.merges))
    return methods or ("adapter" if isinstance(root, LowRank) else "copy",)


def passes(tensor: TensorPlan) -> int:
    """How often ``tensor``'s inputs are read: 1, or 2 when a Gram matrix or a threshold comes
    first, or an adapter's DoRA takes its rows' lengths.

    Merges that cannot be collapsed into one are computed one after another, and counted so.
    """
    total, extra, seen = 0, 0, set[Node]()
    stack: list[Node] = [tensor.root]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, Leaf):
            extra |= isinstance(node, LowRank) and node.magnitude is not None
            continue
        if isinstance(node.method, Combination):
            tree = collapse(node)
            total += 2 if tree.needs_gram else 1
            stack.extend(tree.parts)
            continue
        if isinstance(node.method, Consensus):
            total += node.method.passes(node.values, node.operand_values)
        elif isinstance(node.method, Pointwise):
            total += node.method.passes(node.values)
        else:
            total += 1
        stack.extend(node.inputs)
    return max(total, 1) + extra

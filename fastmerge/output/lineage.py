"""What an output followed from: the files' ``__metadata__`` and fastmerge.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastmerge.compute.tensor import Outcome, Trim
from fastmerge.models.side_files import LINEAGE_FILE as LINEAGE_FILE
from fastmerge.output.checksum import ALGORITHM, Written
from fastmerge.output.provenance import names, provenance
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan
from fastmerge.tree.nodes import Leaf, Merge, Node, Stored


def metadata(plan: Plan) -> dict[str, str]:
    """The lineage that is known before the merge: every shard's ``__metadata__``."""
    from fastmerge.version import __version__

    return {
        "format": "pt",
        "fastmerge_version": __version__,
        "fastmerge_recipe": provenance(plan).recipe_text,
        "fastmerge_seed": "" if plan.seed is None else str(plan.seed),
        **_foreign(plan),
        "fastmerge_inputs": json.dumps(
            {ref: model.fingerprint for ref, model in zip(names(plan), plan.models, strict=True)}
        ),
    }


def _foreign(plan: Plan) -> dict[str, str]:
    """Names and versions of methods that are not fastmerge's own, where there are any."""
    merges = (node for tensor in plan.tensors for node in tensor.merges)
    methods = {node.method for node in merges if node.method.version}
    return {"fastmerge_methods": ", ".join(sorted(m.identity for m in methods))} if methods else {}


def tensor_lineage(item: TensorPlan, outcome: Outcome, called: Sequence[str]) -> dict[str, Any]:
    """What one tensor's result followed from, in plain values; ``called`` names the models.

    ``copy``: the model whose tensor it is; ``tensors``: the names of tensors that models have under
    another, as where layers were moved.
    """
    lines: dict[str, Any] = {}
    if isinstance(item.root, Stored):
        lines["copy"] = called[item.root.model]
    elsewhere = [source for source in item.sources if source.name != item.name]
    if elsewhere:
        lines["tensors"] = {
            called[model]: [source.name for source in elsewhere if source.model == model]
            for model in dict.fromkeys(source.model for source in elsewhere)
        }
    if outcome.coefficients is not None:
        lines["coefficients"] = {
            called[source.model]: value if math.isfinite(value) else None
            for source, value in outcome.coefficients.items()
        }
    if outcome.kept is not None:
        lines["kept"] = list(outcome.kept)
    if outcome.nonfinite:
        lines["nonfinite"] = outcome.nonfinite
    if outcome.rounding is not None:
        error, size = outcome.rounding
        lines["rounding"] = float(f"{math.sqrt(error / size):.6g}") if size else 0.0
        lines["size"] = float(f"{math.sqrt(size):.6g}")
    return lines


def lineage_head(plan: Plan) -> dict[str, Any]:
    """What fastmerge.json has that is known before the merge."""
    inputs = zip(names(plan), plan.models, strict=True)
    return {
        **metadata(plan),
        "fastmerge_inputs": {name: model.fingerprint for name, model in inputs},
    }


def kept_of(plan: Plan, spanning: Mapping[Node, Trim]) -> dict[str, int]:
    """How many entries of each model are kept, where one threshold spans all tensors."""
    for node, trim in spanning.items():  # the counts are the same for all
        assert isinstance(node, Merge)
        return {
            names(plan)[part.own.model]: selection.kept
            for part, selection in zip(node.operands, trim.selections, strict=True)
            if isinstance(part, Leaf) and part.own is not None
        }
    return {}


def lineage_file(
    head: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    kept: Mapping[str, int],
    files: Iterable[str],
    written: Written,
) -> bytes:
    """The lineage that is known after it: effective coefficients, kept counts and checksums by
    tensor, or for whole models. ``head`` and ``kept``: as above. ``files``: what is written, which
    a later merge may replace; ``written``: what `fastmerge verify` compares it with.
    """
    lineage = {
        **head,
        "files": sorted(files),
        "written": {name: written[name] for name in sorted(written)},
        "checksum": ALGORITHM,
    }
    if kept:
        lineage["kept"] = dict(kept)
    # A line a tensor: with an indent Python's own encoder writes JSON, a tenth as fast.
    lines = (f"  {json.dumps(name)}: {json.dumps(results[name])}" for name in sorted(results))
    text = json.dumps(lineage, indent=1).removesuffix("\n}")
    return (f'{text},\n "tensors": {{\n' + ",\n".join(lines) + "\n }\n}\n").encode()

"""What an output followed from: the files' ``__metadata__`` and fastmerge.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastmerge.compute.tensor import Trim
from fastmerge.plan.plan import Plan
from fastmerge.tree.nodes import Merge, Node, Stored

LINEAGE_FILE = "fastmerge.json"


def metadata(plan: Plan) -> dict[str, str]:
    """The lineage that is known before the merge: every shard's ``__metadata__``."""
    from fastmerge.version import __version__

    return {
        "format": "pt",
        "fastmerge_version": __version__,
        "fastmerge_recipe": plan.recipe_text,
        "fastmerge_seed": "" if plan.seed is None else str(plan.seed),
        "fastmerge_inputs": json.dumps(
            {
                ref: model.fingerprint
                for ref, model in zip(plan.references, plan.models, strict=True)
            }
        ),
    }


def lineage_file(
    plan: Plan, results: Mapping[str, Mapping[str, Any]], spanning: Mapping[Node, Trim]
) -> bytes:
    """The lineage that is known after it: effective coefficients and kept counts by tensor, or for
    whole models.
    """
    lineage = {
        **metadata(plan),
        "fastmerge_inputs": {
            ref: model.fingerprint for ref, model in zip(plan.references, plan.models, strict=True)
        },
        "tensors": {name: results[name] for name in sorted(results)},
    }
    for node, trim in list(spanning.items())[:1]:  # the counts are the same for all
        assert isinstance(node, Merge)
        lineage["kept"] = {
            plan.references[part.model]: selection.kept
            for part, selection in zip(node.operands, trim.selections, strict=True)
            if isinstance(part, Stored)
        }
    return (json.dumps(lineage, indent=1) + "\n").encode()

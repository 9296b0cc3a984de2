"""Gram matrices kept beside a run."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastmerge.errors import OutputError
from fastmerge.evaluation.journal import digest, write_atomically
from fastmerge.methods.types import Float64
from fastmerge.output.place import explain
from fastmerge.planning.plan import Plan
from fastmerge.tree.nodes import Leaf, Stored, walk


def _gram_key(template: Plan) -> str:
    # 1 also held matrices over other bases, from walks with a base_model that measured nothing.
    nodes = (node for item in template.tensors for node in walk(item.root))
    derived = sorted({n.key for n in nodes if isinstance(n, Leaf) and not isinstance(n, Stored)})
    return digest([2, *(model.fingerprint for model in template.models), *derived])


def cached_grams(path: Path, template: Plan) -> dict[str, Float64]:
    """What an earlier run of the same models left; nothing where there was none."""
    if not os.path.isfile(path):
        return {}
    try:
        with np.load(path) as file:
            if str(file["key"]) != _gram_key(template):
                return {}
            names = [str(name) for name in file["names"]]
            return dict(zip(names, file["grams"], strict=True))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise OutputError(
            f"{path}: is damaged; delete it, and the inner products are found again"
        ) from None


def keep_grams(path: Path, template: Plan, grams: Mapping[str, Float64]) -> None:
    """Writes float64 (n, n) matrices by tensor to ``path``, whole or not at all, for the models of
    ``template``. Raises OSError where it cannot be written.
    """
    file = io.BytesIO()
    np.savez(
        file,
        key=np.array(_gram_key(template)),
        names=np.array(list(grams)),
        grams=np.stack(list(grams.values())),
    )
    try:
        write_atomically(path, file.getvalue())
    except OSError as error:
        raise explain(error, path) from error

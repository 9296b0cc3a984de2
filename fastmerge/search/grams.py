"""Gram matrices kept beside a run."""

from __future__ import annotations

import io
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastmerge.errors import OutputError
from fastmerge.evaluation.journal import digest, open_own, write_own
from fastmerge.methods.types import Float64
from fastmerge.planning.plan import Plan
from fastmerge.tree.nodes import Leaf, Merge, Stored, walk

# What NumPy's reader and what it calls raise for bytes that it did not write.
_DAMAGE = (
    ArithmeticError, EOFError, LookupError, MemoryError, OSError, RuntimeError, SyntaxError,
    TypeError, ValueError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _gram_key(template: Plan) -> str:
    # 1 also held matrices over other bases, from walks with a base_model that measured nothing.
    nodes = (node for item in template.tensors for node in walk(item.root))
    derived = sorted({n.key for n in nodes if isinstance(n, Leaf) and not isinstance(n, Stored)})
    return digest([2, *(model.fingerprint for model in template.models), *derived])


def cached_grams(path: Path, template: Plan) -> dict[str, Float64]:
    """What an earlier run of the same models left; nothing where there was none. Raises OutputError
    for what no run leaves there: its folder may come out of an archive.
    """
    if not os.path.lexists(path):
        return {}
    count = {len(t.root.operands) for t in template.tensors if isinstance(t.root, Merge)}
    try:
        with open_own(path) as own:
            data = io.BytesIO(own.read())
        with zipfile.ZipFile(data) as packed:
            if any(part.compress_type != zipfile.ZIP_STORED for part in packed.infolist()):
                raise ValueError("packed: of any size, when it is unpacked")
        data.seek(0)
        with np.load(data, allow_pickle=False) as file:
            if str(file["key"]) != _gram_key(template):
                return {}
            names, grams = [str(name) for name in file["names"]], file["grams"]
        if grams.dtype != np.float64 or {grams.shape} != {(len(names), n, n) for n in count}:
            raise ValueError("not a matrix for each tensor")
        return dict(zip(names, grams, strict=True))
    except _DAMAGE as error:
        raise OutputError(
            f"{path}: is damaged; delete it, and the inner products are found again"
        ) from error


def keep_grams(path: Path, template: Plan, grams: Mapping[str, Float64]) -> None:
    """Writes float64 (n, n) matrices by tensor to ``path``, whole or not at all, for the models of
    ``template``. Raises FastmergeError where they cannot be written.
    """
    file = io.BytesIO()
    np.savez(
        file,
        key=np.array(_gram_key(template)),
        names=np.array(list(grams)),
        grams=np.stack(list(grams.values())),
    )
    write_own(path, file.getvalue())

"""Runs a merge of adapters alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge.compute.adapters import Asked, Given, merged
from fastmerge.compute.cpu import thread_count
from fastmerge.compute.reference import widen
from fastmerge.engine.adapters import Made, Piece, write_adapter
from fastmerge.engine.report import MergeReport
from fastmerge.errors import ModelError
from fastmerge.methods.types import Float64
from fastmerge.models.header import show
from fastmerge.models.model import Model, stored_bytes
from fastmerge.output.provenance import provenance
from fastmerge.planning.adapter_plan import peft_config
from fastmerge.planning.adapters import AdapterMerge, Joined
from fastmerge.progress import Progress


def merge_adapter_plan(
    plan: AdapterMerge,
    out: Path,
    *,
    threads: int | None = None,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Writes the adapter that ``plan`` decides on to the folder ``out``; as `merge_plan` does, it
    is absent or whole, and an interrupted one is continued. Several modules are merged at a time,
    as many as ``threads``, in float64.
    """
    pieces = [
        Piece(
            item.module,
            item.tensors,
            plan.bytes_in(item),
            partial(_make, plan, item),
        )
        for item in plan.joined
    ]
    base = plan.config["base_model_name_or_path"]
    shared = {**plan.config, "base_model_name_or_path": _told(plan, base)}
    ranks = {item.module: item.rank for item in plan.joined}
    config = peft_config(shared, ranks, plan.target_names)
    report, _ = write_adapter(
        plan, pieces, config, _method(plan), out,
        threads=thread_count(threads), overwrite=overwrite, fresh=fresh, progress=progress,
    )  # fmt: skip
    return report


def _told(plan: AdapterMerge, base: str | None) -> str | None:
    """The base's name without the way to a folder of this machine."""
    if base is None or plan.keep_paths or not base.startswith(("/", "~", ".")):
        return base
    return provenance(plan).told(Path(base).name)


def _method(plan: AdapterMerge) -> list[str]:
    lines = [f"**{plan.method.name}** of adapters: {plan.method.summary}"]
    if plan.seed is not None:
        lines.append(f"random seed: {plan.seed}")
    return [*lines, "arithmetic in float64, one rounding to the factors' type"]


def _make(plan: AdapterMerge, item: Joined) -> Made:
    given = [
        Given(
            _numbers(plan.models[part.adapter], part.factors.b),
            _numbers(plan.models[part.adapter], part.factors.a),
            part.factors.scale,
            part.weight,
            part.density,
            part.adapter,
        )
        for part in item.parts
    ]
    values = item.values
    asked = Asked(
        plan.method,
        item.rank if plan.method.cuts(values.get("rank")) else None,
        values.get("svd_clamp"),
        values.get("majority_sign_method") == "frequency",
        plan.seed or 0,
    )
    b, a = merged(given, asked, item.module)
    told: dict[str, Any] = {"rank": item.rank}
    if asked.rank is not None and asked.clamp is None:
        told["singular_values"] = [float(np.linalg.norm(b[:, i])) for i in (0, -1)]
    return Made([_f32(a), _f32(b)], told)


def _f32(factor: Float64) -> Any:
    with np.errstate(over="ignore"):  # it is as infinite in every narrower type
        return factor.astype(np.float32)


def _numbers(model: Model, name: str) -> Float64:
    """A stored factor in float64."""
    info = model.tensors[name]
    view = model.view(name, raw=True)  # it keeps the mapping while the bytes are read
    stored: Any = stored_bytes(view).view(str(info.dtype.numpy)).reshape(info.shape)
    numbers = widen(stored)
    if not np.isfinite(numbers).all():
        raise ModelError(
            f"{model.label}: {show(name)} has NaN or infinite values; train or save it again"
        )
    return numbers.astype(np.float64)

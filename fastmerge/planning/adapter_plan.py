"""What any output that is an adapter knows before a weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge.errors import ModelError, in_a_line
from fastmerge.methods import METHODS
from fastmerge.models import hub
from fastmerge.models.adapter import CONFIG
from fastmerge.planning.any_plan import AnyPlan
from fastmerge.recipe.located import LocatedDict


@dataclass(frozen=True, kw_only=True)
class AdapterPlan(AnyPlan):
    """``config``: adapter_config.json, but for what follows from the ranks. ``base``: the name of
    the model that the adapter is for, as the config has it. ``settings``: what decides the numbers,
    in plain values.
    """

    config: Mapping[str, Any]
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        return in_a_line(self, "references", "seed", "settings")

    @property
    def key(self) -> str:
        """sha256 (hex) of all that decides the output's bytes."""
        from fastmerge.version import __version__

        prints = [model.fingerprint for model in self.models]
        head = [__version__, prints, self.seed, dict(self.settings), dict(self.config)]
        return hashlib.sha256(json.dumps(head, sort_keys=True, default=str).encode()).hexdigest()


def is_of_adapters(documents: Sequence[LocatedDict]) -> bool:
    """Whether a recipe merges adapters alone: one document of whole models that are all folders of
    adapters, or by a method that merges nothing else.
    """
    if len(documents) != 1:
        return False
    models: Any = documents[0].get("models")
    entries = models if isinstance(models, list) else []
    names = [entry.get("model") for entry in entries if isinstance(entry, Mapping)]
    texts = [name.strip() for name in names if isinstance(name, str)]
    if not texts or len(texts) != len(entries):
        return False
    method = documents[0].get("merge_method")
    if not isinstance(method, str):
        return False
    if method not in METHODS:  # rare: start-up does not pay for the table
        from fastmerge.methods.adapters import ADAPTER_METHODS

        if method in ADAPTER_METHODS:
            return True
    return all(map(_is_adapter, texts))


def _is_adapter(reference: str) -> bool:
    try:
        place = hub.local(reference)
    except ModelError:  # no path: the plan of models says so, with the place in the recipe
        return False
    return place is not None and (place / CONFIG).is_file() and not (place / "config.json").exists()


def peft_config(
    shared: Mapping[str, Any],
    ranks: Mapping[str, int],
    targets: Collection[str],
    r: int | None = None,
) -> dict[str, Any]:
    """adapter_config.json of factors that are applied with scale 1: ``r`` and ``lora_alpha`` are,
    unless given, the most common of the ``ranks`` by module, and the patterns have the others.
    ``targets``: what PEFT finds the modules by.
    """
    each = list(ranks.values())
    if r is None:
        r = max(sorted(set(each), reverse=True), key=each.count, default=0)
    others = {name: rank for name, rank in ranks.items() if rank != r}
    return {
        "peft_type": "LORA",
        **shared,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(targets),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def short_names(wanted: Iterable[str], modules: Sequence[str], *, dotted: bool) -> list[str]:
    """Names that PEFT finds the ``wanted`` modules by and no other of ``modules``: the last part
    where that will do, else the whole. It looks for modules whose name ends in a target's after a
    dot (``dotted``), in that of a module to save at any letter.
    """
    chosen = set(wanted)
    found: dict[str, None] = {}
    by_leaf: dict[str, list[str]] = {}
    for name in chosen:
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    for leaf, own in by_leaf.items():
        end = f".{leaf}" if dotted else leaf
        alike = {m for m in modules if (f".{m}" if dotted else m).endswith(end)}
        found.update(dict.fromkeys([leaf] if alike <= chosen else own))
    return sorted(found)

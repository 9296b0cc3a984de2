"""An adapter's folder: what PEFT reads, its card and its lineage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.errors import printable
from fastmerge.limits import MAX_PATH_LETTERS
from fastmerge.models.adapter import CONFIG, WEIGHTS
from fastmerge.models.side_files import CARD_FILE, LINEAGE_FILE
from fastmerge.output.card import bullets, escaped, fenced, front_matter_text, union
from fastmerge.output.checksum import ALGORITHM, Written
from fastmerge.output.layout import Layout
from fastmerge.output.provenance import is_hub_id, licence, names, provenance
from fastmerge.planning.adapter_plan import AdapterPlan

_OF_TENSOR = ("checksum", "nonfinite")  # of what a tensor came to; the rest is its module's
_ALL_IN_ONE = 1 << 62  # PEFT reads one file


def adapter_layout(
    plan: AdapterPlan, tensors: Sequence[tuple[str, DType, tuple[int, ...]]]
) -> Layout:
    """Every byte of adapter_model.safetensors but the weights."""
    return Layout.plan(
        tensors, max_shard_bytes=_ALL_IN_ONE, metadata=metadata(plan), single=WEIGHTS
    )


def metadata(plan: AdapterPlan) -> dict[str, str]:
    """The lineage that is known before a weight is read."""
    from fastmerge.version import __version__

    return {
        "format": "pt",
        "fastmerge_version": __version__,
        "fastmerge_recipe": provenance(plan).recipe_text,
        "fastmerge_seed": "" if plan.seed is None else str(plan.seed),
        "fastmerge_inputs": json.dumps(_inputs(plan)),
    }


def _inputs(plan: AdapterPlan) -> dict[str, str]:
    pairs = zip(names(plan), plan.models, strict=True)
    return {name: model.fingerprint for name, model in pairs}


def adapter_files(
    plan: AdapterPlan, config: Mapping[str, Any], title: str, method: Sequence[str]
) -> dict[str, bytes]:
    """What is written beside the weights, by name. ``config``: adapter_config.json; ``method``: how
    it was made, a line each, for the card.
    """
    return {
        CONFIG: (json.dumps(dict(config), indent=2) + "\n").encode(),
        CARD_FILE: adapter_card(plan, config, title, method).encode(errors="backslashreplace"),
    }


def adapter_lineage(
    plan: AdapterPlan, results: Mapping[str, Mapping[str, Any]], written: Written
) -> bytes:
    """fastmerge.json: what each module came to, from the ``results`` of its tensors, and what
    `fastmerge verify` compares the folder with.
    """
    told = by_module(results)
    lineage = {
        **metadata(plan),
        "fastmerge_inputs": _inputs(plan),
        "settings": dict(plan.settings),
        "files": sorted([*written, LINEAGE_FILE]),
        "written": {name: written[name] for name in sorted(written)},
        "checksum": ALGORITHM,
        "modules": {name: dict(told[name]) for name in sorted(told)},
        "tensors": {name: _of_tensor(results[name]) for name in sorted(results)},
    }
    return (json.dumps(lineage, indent=1) + "\n").encode()


def _of_tensor(result: Mapping[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in _OF_TENSOR if key in result}


def by_module(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What was told of each module by the first of its tensors."""
    found: dict[str, Mapping[str, Any]] = {}
    for result in results.values():
        told = {k: v for k, v in result.items() if k not in ("module", *_OF_TENSOR)}
        if told:
            found[result["module"]] = told
    return found


def adapter_card(
    plan: AdapterPlan, config: Mapping[str, Any], title: str, method: Iterable[str]
) -> str:
    """The Markdown of README.md, with the front matter that the Hugging Face Hub reads."""
    from fastmerge.version import __version__

    said = provenance(plan)
    base = str(config.get("base_model_name_or_path") or "")
    base = base if len(base) <= MAX_PATH_LETTERS else ""
    front: dict[str, Any] = {}
    if is_hub_id(base):
        front["base_model"] = base
    front["library_name"] = "peft"
    if config.get("task_type") == "CAUSAL_LM":
        front["pipeline_tag"] = "text-generation"
    front |= licence(said.cards)
    tags = union(card.get("tags") for card in said.cards)
    front["tags"] = list(dict.fromkeys(["lora", "merge", "fastmerge", *tags]))
    table = ["| model | fingerprint |", "|---|---|"]
    table += (
        f"| {escaped(name)} | `{model.fingerprint}` |"
        for name, model in zip(said.names, plan.models, strict=True)
    )
    folder = json.dumps(f"path/to/{printable(title)}", ensure_ascii=False)
    use = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base or 'path/to/base')})\n"
        f"model = PeftModel.from_pretrained(base, {folder})"
    )
    notes = bullets(escaped(said.told(note)) for note in plan.notes)
    sections = [
        front_matter_text(front),
        f"# {escaped(title)}",
        f"A LoRA adapter of rank {config['r']}, made with fastmerge {__version__}.",
        "## Models\n\n" + "\n".join(table) + "\n\n`fastmerge.json` has what each matrix came to.",
        "## Method\n\n" + bullets(method),
        "## Use\n\n" + fenced(use, "python"),
        *(["## Notes\n\n" + notes] if notes else []),
        "## Recipe\n\n" + fenced(said.recipe_text, "yaml"),
    ]
    return "\n\n".join(sections) + "\n"

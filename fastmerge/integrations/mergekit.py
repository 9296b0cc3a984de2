"""mergekit's ``run_merge`` on fastmerge's engine: change the import and keep the call.

::

    from fastmerge.integrations.mergekit import run_merge

    run_merge(merge_config, out_path, options=options, config_source=text)

Needs no mergekit: its ``MergeConfiguration`` and ``MergeOptions`` are read if they are given, and a
recipe and plain keywords do as well. Two things differ on purpose (README, "What to expect"): the
arithmetic is fp32 whatever ``dtype`` says, and an existing model is replaced only with
``overwrite``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmerge import api
from fastmerge.arguments import a_flag, a_path, one_of
from fastmerge.compute.devices import DEVICES
from fastmerge.engine.merge import MAX_SHARD_BYTES, merge_plan
from fastmerge.engine.report import MergeReport, Progress
from fastmerge.errors import FastmergeError, OutputError, UnsupportedError, brief, nearest
from fastmerge.models.side_files import CARD_FILE, CONFIG_FILE, is_tokenizer
from fastmerge.output.provenance import provenance
from fastmerge.plan.plan import Plan
from fastmerge.recipe.document import Recipe

# mergekit 0.1.5's options that change how it works and not what it writes, permissions whose cases
# a plan refuses by name (other architectures, LoRAs), and trust in model code, none of which is
# run here.
_NO_EFFECT = frozenset(
    {
        "allow_crimes",
        "async_write",
        "clone_tensors",
        "lazy_unpickle",
        "lora_merge_cache",
        "lora_merge_dtype",
        "low_cpu_memory",
        "multi_gpu",
        "quiet",
        "read_to_gpu",
        "trust_remote_code",
        "verbosity",
        "write_threads",
    }
)
_FLAGS = {
    "copy_tokenizer",
    "cuda",
    "gpu_rich",
    "safe_serialization",
    "unsafe_truncate_embeddings",
    "write_model_card",
}
_KNOWN = (
    _NO_EFFECT
    | _FLAGS
    | {"device", "num_threads", "out_shard_size", "random_seed", "transformers_cache"}
)


def run_merge(
    merge_config: Any,
    out_path: str | Path,
    options: Any = None,
    config_source: str | None = None,
    *,
    overwrite: bool = False,
    keep_paths: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges ``merge_config`` into the folder ``out_path``, as ``mergekit.merge.run_merge`` is
    called.

    merge_config: a MergeConfiguration, or any recipe that ``fastmerge.merge`` takes. options: a
    MergeOptions, or a mapping of its names. Of these, ``device``, ``cuda``, ``num_threads``,
    ``out_shard_size`` (bytes), ``random_seed``, ``copy_tokenizer``, ``write_model_card`` and
    ``unsafe_truncate_embeddings`` are followed; those that only change how mergekit works are
    accepted, the others refused by name.
    config_source: the recipe as its author wrote it, kept as ``mergekit_config.yml`` but for the
    local paths in it (``keep_paths``: with them). Raises
    FastmergeError before anything is written.
    """
    given = _options(options)
    out = a_path(out_path, "out_path")
    if config_source is not None and not isinstance(config_source, str):
        raise FastmergeError(f"config_source: must be text, not {brief(config_source)}")
    device = _device(given)
    source = merge_config.to_yaml() if hasattr(merge_config, "to_yaml") else merge_config
    recipe = Recipe.load(source)
    if recipe.output.vocabulary is not None or recipe.output.chat_template is not None:
        given.pop("copy_tokenizer", None)  # asked for in the recipe: mergekit writes it too
    planned = api.plan(
        recipe,
        seed=given.get("random_seed"),
        truncate_embeddings=given.get("unsafe_truncate_embeddings", False),
    )
    plan = replace(planned, keep_paths=a_flag(keep_paths, "keep_paths"))
    files = _files(plan, out, given, config_source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # as mergekit does
    except OSError as error:
        raise OutputError(f"{out.parent}: cannot be created ({error.strerror})") from error
    for note in plan.notes:  # callers of mergekit's look for them there
        logging.getLogger("fastmerge").warning(note)
    return merge_plan(
        plan,
        out,
        threads=given.get("num_threads"),
        max_shard_bytes=given.get("out_shard_size", MAX_SHARD_BYTES),
        device=device,
        overwrite=overwrite,
        progress=progress,
        side_files=files,
    )


def _options(options: Any) -> dict[str, Any]:
    """What was asked for, by name, without what is at mergekit's default."""
    if options is None:
        return {}
    if isinstance(options, Mapping):
        given = dict(options)
    elif hasattr(options, "model_dump"):
        given = options.model_dump(exclude_defaults=True)
    else:
        kind = type(options).__name__
        raise FastmergeError(f"options: {kind} is neither a mapping nor mergekit's MergeOptions")
    for name in given:
        if name not in _KNOWN:
            raise FastmergeError(f"options: unknown '{name}'; {nearest(str(name), _KNOWN)}")
    given = {name: value for name, value in given.items() if value is not None}
    for name in _FLAGS & given.keys():
        a_flag(given[name], name)
    if not given.get("safe_serialization", True):
        raise UnsupportedError(
            "safe_serialization: fastmerge writes safetensors only; leave it true"
        )
    if "transformers_cache" in given:
        raise UnsupportedError(
            "transformers_cache: models come from huggingface_hub's cache; set HF_HUB_CACHE instead"
        )
    return given


def _device(given: Mapping[str, Any]) -> str:
    wants_gpu = given.get("cuda") or given.get("gpu_rich")
    device = given.get("device", "cuda" if wants_gpu else "cpu")
    if not isinstance(device, str):
        raise FastmergeError(f"device: must be text, not {brief(device)}")
    kind, _, index = device.partition(":")
    if index:
        raise UnsupportedError(
            f"device: '{device}': every GPU that is visible takes part; "
            f"set CUDA_VISIBLE_DEVICES={index} and ask for '{kind}'"
        )
    return one_of(device, DEVICES, "device")


def _files(
    plan: Plan, out: Path, given: Mapping[str, Any], config_source: str | None
) -> dict[str, bytes | Path]:
    files = api.model_files(plan, out.name)
    if given.get("write_model_card", True):
        text = provenance(plan).told(config_source or plan.recipe_text)
        files[CONFIG_FILE] = text.encode(errors="backslashreplace")
    else:
        del files[CARD_FILE]
    if not given.get("copy_tokenizer", True):
        files = {name: file for name, file in files.items() if not is_tokenizer(name)}
    return files

"""mergekit's ``run_merge`` on fastmerge's engine: change the import and keep the call.

::

    from fastmerge.integrations.mergekit import run_merge

    run_merge(merge_config, out_path, options=options, config_source=text)

Needs no mergekit: its ``MergeConfiguration`` and ``MergeOptions`` are read if they are given, and a
recipe and plain keywords do as well. Two things differ on purpose (docs/mergekit.md): the
arithmetic is fp32 but where ``dtype`` says float64, and a folder is replaced as a whole or not at
all: one that holds files which no merge wrote and no model has is refused by their names, where
mergekit would write among them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastmerge import api
from fastmerge.arguments import a_flag, a_path
from fastmerge.compute.devices import a_device
from fastmerge.engine.merge import MAX_SHARD_BYTES, merge_plan
from fastmerge.engine.report import MergeReport
from fastmerge.errors import (
    FastmergeError,
    ModelError,
    OutputError,
    RecipeError,
    UnsupportedError,
    argument,
    brief,
    near_miss,
    nearest,
)
from fastmerge.integrations.value_errors import as_value_error
from fastmerge.models import hub
from fastmerge.models.side_files import CARD_FILE, CONFIG_FILE, MOE_CONFIG_FILE, is_tokenizer
from fastmerge.output.provenance import provenance
from fastmerge.planning.plan import Plan
from fastmerge.planning.planner import make_plan
from fastmerge.progress import Progress
from fastmerge.recipe.document import Recipe
from fastmerge.recipe.mixture import Mixture

# mergekit 0.1.5's options that change how it works and not what it writes, permissions whose cases
# a plan refuses by name (other architectures, LoRAs), and trust in model code, none of which is
# run here.
NO_EFFECT = frozenset(
    {
        "allow_crimes",
        "async_write",
        "clone_tensors",
        "lazy_unpickle",
        "lora_merge_cache",
        "lora_merge_dtype",
        "low_cpu_memory",
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
    "multi_gpu",
    "safe_serialization",
    "unsafe_truncate_embeddings",
    "write_model_card",
}
_KNOWN = (
    NO_EFFECT
    | _FLAGS
    | {"device", "num_threads", "out_shard_size", "random_seed", "transformers_cache"}
)


def run_merge(
    merge_config: Any,
    out_path: str | Path,
    options: Any = None,
    config_source: str | None = None,
    *,
    overwrite: bool = True,
    keep_paths: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merges ``merge_config`` into the folder ``out_path``, as ``mergekit.merge.run_merge`` is
    called.

    ``merge_config``: a MergeConfiguration, or any recipe that ``fastmerge.merge`` takes.
    ``out_path``: a model folder that is there, or what a merge wrote, is replaced once the new one
    is whole; it may lie in the folder of an input. ``options``: a MergeOptions, or a mapping or
    argparse.Namespace of its names. Of these, ``device`` (``cuda:N`` too), ``cuda``,
    ``num_threads``, ``out_shard_size`` (bytes), ``random_seed``, ``transformers_cache``,
    ``copy_tokenizer``, ``write_model_card`` and ``unsafe_truncate_embeddings`` are followed; those
    that only change how mergekit works are accepted, the others refused by name. ``config_source``:
    the recipe as its author wrote it, kept as ``mergekit_config.yml`` but for the local paths in it
    (``keep_paths``: with them). ``overwrite``: False refuses a folder that is there. ``progress``:
    a function of bytes done, bytes in all and a tensor's name.

    Returns a `MergeReport`. Raises, before anything is written, RecipeError, ModelError and
    UnsupportedError, which are ValueErrors too, as mergekit's are, OutputError for what stands at
    ``out_path``, FastmergeError for another argument.
    """
    try:
        plan, arguments = prepared(merge_config, out_path, options, config_source, keep_paths)
        for note in plan.notes:  # callers of mergekit's look for them there
            logging.getLogger("fastmerge").warning(note)
        return merge_plan(plan, overwrite=overwrite, progress=progress, **arguments)
    except (RecipeError, ModelError, UnsupportedError) as error:
        text = str(error)
        if " mismatch in " in text:  # callers look for mergekit's words
            text = f"Tensor size mismatch: {text}"
        raise as_value_error(error, text) from error


def prepared(
    merge_config: Any,
    out_path: str | Path,
    options: Any = None,
    config_source: str | None = None,
    keep_paths: bool = False,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of `run_merge`'s arguments, and those of `merge_plan` that they come to."""
    given = _options(options)
    out = a_path(out_path, "out_path")
    if config_source is not None and not isinstance(config_source, str):
        raise FastmergeError(f"config_source: must be text, not {brief(config_source)}")
    device = _device(given)
    source = merge_config.to_yaml() if hasattr(merge_config, "to_yaml") else merge_config
    recipe = Recipe.load(source)
    if recipe.output.vocabulary is not None or recipe.output.chat_template is not None:
        given.pop("copy_tokenizer", None)  # asked for in the recipe: mergekit writes it too
    planned = make_plan(
        recipe,
        seed=given.get("random_seed"),
        resolve=partial(hub.resolve, cache=given.get("transformers_cache")),
        sparing=True,
        truncate_embeddings=given.get("unsafe_truncate_embeddings", False),
    )
    plan = replace(planned, keep_paths=a_flag(keep_paths, "keep_paths"))
    kept_as = MOE_CONFIG_FILE if isinstance(recipe.output, Mixture) else CONFIG_FILE
    files = _files(plan, out, given, config_source, kept_as)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # as mergekit does
    except OSError as error:
        raise OutputError(f"{out.parent}: cannot be created ({error.strerror})") from error
    return plan, {
        "out": out,
        "threads": given.get("num_threads"),
        "max_shard_bytes": given.get("out_shard_size", MAX_SHARD_BYTES),
        "device": device,
        "side_files": files,
    }


def _options(options: Any) -> dict[str, Any]:
    """What was asked for, by name, without what is at mergekit's default."""
    if options is None:
        return {}
    if isinstance(options, Mapping):
        given = dict(options)
    elif isinstance(options, argparse.Namespace):  # a script's other arguments are there too
        given = {
            name: value
            for name, value in vars(options).items()
            if name in _KNOWN or near_miss(name, _KNOWN)
        }
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
            f"{argument('safe_serialization', False)}: fastmerge writes safetensors only; leave it "
            "out"
        )
    if "transformers_cache" in given:
        given["transformers_cache"] = a_path(given["transformers_cache"], "transformers_cache")
    return given


def _device(given: Mapping[str, Any]) -> str:
    wants_gpu = any(given.get(flag) for flag in ("cuda", "gpu_rich", "multi_gpu"))
    device = given.get("device", "cuda" if wants_gpu else "cpu")
    return a_device(device, "device")


def _files(
    plan: Plan, out: Path, given: Mapping[str, Any], config_source: str | None, kept_as: str
) -> dict[str, bytes | Path]:
    files = api.model_files(plan, out.name)
    if given.get("write_model_card", True):
        text = provenance(plan).told(config_source or plan.recipe_text)
        files[kept_as] = text.encode(errors="backslashreplace")
    else:
        del files[CARD_FILE]
    if not given.get("copy_tokenizer", True):
        files = {name: file for name, file in files.items() if not is_tokenizer(name)}
    return files

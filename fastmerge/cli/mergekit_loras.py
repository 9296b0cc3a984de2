"""mergekit 0.1.5's ``mergekit-extract-lora``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastmerge.cli.app import command
from fastmerge.cli.loras import (
    DistributeScale,
    EmbedLora,
    Exclude,
    Include,
    SaveModule,
    SkipUndecomposable,
    SvEpsilon,
    run_extraction,
)
from fastmerge.cli.mergekit import Options, given_options
from fastmerge.cli.options import Option
from fastmerge.errors import FastmergeError


@command
def mergekit_extract_lora(
    model: Annotated[str, Option(help="The tuned model.")],
    base_model: Annotated[str, Option(help="What it was tuned from.")],
    out_path: Annotated[Path, Option(help="Folder to write.")],
    max_rank: Annotated[int, Option(help="Of a matrix, at most.", min=1)] = 128,
    distribute_scale: DistributeScale = True,
    embed_lora: EmbedLora = False,
    save_module: SaveModule = None,
    exclude_regex: Exclude = None,
    include_regex: Include = None,
    sv_epsilon: SvEpsilon = 0.0,
    skip_undecomposable: SkipUndecomposable = False,
    **options: Annotated[Any, Options],
) -> None:
    """Do what mergekit-extract-lora does, by its options."""
    from fastmerge.integrations.mergekit import NO_EFFECT

    followed = {"num_threads", "quiet", "random_seed", "safe_serialization", "transformers_cache"}
    idle = (Options.__annotations__.keys() | NO_EFFECT) - followed
    given = given_options(options, idle)
    if not given.get("safe_serialization", True):
        raise FastmergeError(
            "--no-safe-serialization: fastmerge writes safetensors only; leave it out"
        )
    extraction: dict[str, Any] = {
        "max_rank": max_rank,
        "dtype": None,
        "include": include_regex or (),
        "exclude": exclude_regex or (),
        "save_modules": save_module or (),
        "embed_lora": embed_lora,
        "skip_undecomposable": skip_undecomposable,
        "distribute_scale": distribute_scale,
        "sv_epsilon": sv_epsilon,
        "seed": given.get("random_seed", 0),
        "threads": given.get("num_threads"),
        "overwrite": True,
        "cache": given.get("transformers_cache"),
    }
    run_extraction(model, base_model, out_path, extraction, quiet=bool(given.get("quiet")))

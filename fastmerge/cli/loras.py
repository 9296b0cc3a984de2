"""``fastmerge extract-lora``."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from fastmerge.cli.app import Json, Quiet, Threads, command
from fastmerge.cli.console import Progress, print_json, put
from fastmerge.cli.merge import interruptible, tell
from fastmerge.cli.options import Argument, Option

_WORST = 5  # matrices named


class FactorType(str, Enum):
    """What the factors are stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    model = "model"


Include = Annotated[
    list[str] | None,
    Option(
        "--include-regex",
        "-i",
        metavar="REGEX",
        help="Decompose only modules it is in.",
        many=True,
    ),
]
Exclude = Annotated[
    list[str] | None,
    Option("--exclude-regex", "-e", metavar="REGEX", help="No modules it is in.", many=True),
]
SaveModule = Annotated[
    list[str] | None,
    Option("--save-module", metavar="NAME", help="Save such modules whole.", many=True),
]
EmbedLora = Annotated[
    bool, Option("--embed-lora", help="Factors of embeddings and head too.", either=True)
]
SkipUndecomposable = Annotated[
    bool, Option("--skip-undecomposable", help="Leave out norms and the like.")
]
DistributeScale = Annotated[
    bool,
    Option("--distribute-scale", help="Singular values' roots into both factors.", either=True),
]
SvEpsilon = Annotated[float, Option("--sv-epsilon", help="Drop singular values up to it.")]


@command
def extract_lora(
    tuned: Annotated[str, Argument(help="Folder or Hub id.")],
    base: Annotated[str, Argument(help="Folder or Hub id of what it was tuned from.")],
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write.")],
    rank: Annotated[int | None, Option(help="Of every matrix.", min=1)] = None,
    max_rank: Annotated[int | None, Option(help="Or all that a matrix has.", min=1)] = None,
    dtype: Annotated[FactorType, Option(help="Of the factors.")] = FactorType.float32,
    include_regex: Include = None,
    exclude_regex: Exclude = None,
    save_module: SaveModule = None,
    embed_lora: EmbedLora = False,
    skip_undecomposable: SkipUndecomposable = False,
    distribute_scale: DistributeScale = True,
    sv_epsilon: SvEpsilon = 0.0,
    power_iterations: Annotated[int, Option(help="More: nearer to the best.", min=0)] = 2,
    seed: Annotated[int, Option(help="Of the random directions.", min=0)] = 0,
    threads: Threads = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT at the end.")] = False,
    fresh: Annotated[bool, Option("--fresh", help="Do not continue an interrupted run.")] = False,
    keep_paths: Annotated[bool, Option("--keep-paths", help="Write local paths.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write the LoRA adapter that brings BASE nearest to TUNED."""
    options: dict[str, Any] = {
        "rank": rank,
        "max_rank": max_rank,
        "dtype": None if dtype is FactorType.model else dtype.value,
        "include": include_regex or (),
        "exclude": exclude_regex or (),
        "save_modules": save_module or (),
        "embed_lora": embed_lora,
        "skip_undecomposable": skip_undecomposable,
        "distribute_scale": distribute_scale,
        "sv_epsilon": sv_epsilon,
        "power_iterations": power_iterations,
        "seed": seed,
        "threads": threads,
        "overwrite": overwrite,
        "fresh": fresh,
        "keep_paths": keep_paths,
    }
    run_extraction(tuned, base, out, options, quiet=quiet, json=json)


def run_extraction(
    tuned: str,
    base: str,
    out: Path,
    options: Mapping[str, Any],
    *,
    quiet: bool,
    json: bool = False,
) -> None:
    """`adapters.extract_lora` with these ``options``, under a progress bar; then what it came to,
    with the relative error of all matrices and of the worst.
    """
    from fastmerge import adapters

    title = f"extracting to {out.name or out}"
    with interruptible(out), Progress(title, quiet=quiet or json) as progress:
        found = adapters.extract_lora(tuned, base, out, progress=progress, **options)
    if json:
        modules = {name: dict(own) for name, own in found.modules.items()}
        print_json(found.report.as_dict() | {"error": found.error, "modules": modules})
        return
    tell(found.report, quiet=quiet)
    if quiet:
        return
    matrices = sorted(found.modules.items(), key=lambda item: -item[1]["error"])
    put(f"relative error {found.error:.4f} (Frobenius) over {len(matrices)} matrices; largest:")
    for name, own in matrices[:_WORST]:
        put(f"  {own['error']:.4f}  rank {own['rank']}  {name}")

"""``fastmerge average``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastmerge.cli.app import Json, Quiet, Threads, command
from fastmerge.cli.fold import Dtype
from fastmerge.cli.merge import (
    Check,
    Cluster,
    Device,
    Io,
    MaxShardSize,
    MemoryLimit,
    PartOf,
    chosen_part,
    limits_of,
    run_merge,
)
from fastmerge.cli.options import Argument, Option
from fastmerge.errors import FastmergeError, brief, in_words


@command
def average(
    models: Annotated[
        list[str], Argument(help="Folder, file or Hub id; with --pattern: folder of them.")
    ],
    out: Annotated[Path, Option("--out", "-o", metavar="OUT", help="Folder to write.")],
    weights: Annotated[
        str | None, Option(metavar="W,W,...", help="One for each model, instead of 1.")
    ] = None,
    last: Annotated[int | None, Option(help="Only the last N.", min=1)] = None,
    ema: Annotated[
        float | None, Option(metavar="DECAY", help="An exponential moving average of them.")
    ] = None,
    pattern: Annotated[
        str | None, Option(help="Models in the folders by name, such as 'checkpoint-*'.")
    ] = None,
    dtype: Annotated[
        Dtype, Option(help="Of the output; as_base: codes again, as fp8 or MXFP4 models have.")
    ] = Dtype.base,
    threads: Threads = None,
    memory_limit: MemoryLimit = "512MiB",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT at the end.")] = False,
    fresh: Annotated[bool, Option("--fresh", help="Do not continue an interrupted run.")] = False,
    device: Annotated[Device, Option(help="Where to compute.")] = Device.cpu,
    io: Annotated[Io, Option(help="How to write.")] = Io.auto,
    max_shard_size: MaxShardSize = "5GB",
    keep_paths: Annotated[bool, Option("--keep-paths", help="Write local paths.")] = False,
    check: Check = False,
    part: PartOf = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write the average of MODELS to OUT."""
    from fastmerge import api
    from fastmerge.averages import AVERAGING, average_recipe

    chosen = None if part is None else chosen_part(part, quiet=quiet)
    limits = limits_of(memory_limit, max_shard_size)
    recipe = average_recipe(
        models, weights=_numbers(weights), last=last, ema=ema, pattern=pattern,
        dtype=None if dtype is Dtype.base else dtype.value,
    )  # fmt: skip
    with in_words(AVERAGING):
        decided = (api.check if check else api.plan)(recipe)
    options: dict[str, Any] = {"threads": threads, "overwrite": overwrite, "fresh": fresh}
    options |= {"keep_paths": keep_paths, "io": io.value, "device": device.value, **limits}
    options |= {"part": chosen, "cluster": cluster}
    title = f"averaging {len(recipe['models'])} models to {out.name or out}"
    run_merge(decided, out, title, options, quiet=quiet, json=json)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    found = []
    for word in text.split(","):
        try:
            found.append(float(word))
        except ValueError:
            raise FastmergeError(
                f"--weights: {brief(word)} is not a number; write them with commas: 1,1,2"
            ) from None
    return found

"""``fastmerge fold``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from fastmerge.cli.app import Json, Quiet, Threads, command
from fastmerge.cli.merge import Check, Device, Io, MaxShardSize, MemoryLimit, limits_of, run_merge
from fastmerge.cli.options import Argument, Option
from fastmerge.errors import in_words


class Dtype(str, Enum):
    """What the output is stored in."""

    base = "base"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"
    as_base = "as_base"


@command
def fold(
    base: Annotated[str, Argument(help="Folder or Hub id.")],
    adapter: Annotated[str, Argument(help="Folder or Hub id of a LoRA for it.")],
    out: Annotated[Path, Argument(metavar="OUT", help="Folder to write.")],
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
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write BASE with the LoRA ADAPTER folded into its weights to OUT."""
    from fastmerge import api

    limits = limits_of(memory_limit, max_shard_size)
    recipe = api.fold_recipe(base, adapter, dtype=None if dtype is Dtype.base else dtype.value)
    with in_words(api.FOLDING):
        decided = (api.check if check else api.plan)(recipe)
    options: dict[str, Any] = {"threads": threads, "overwrite": overwrite, "fresh": fresh}
    options |= {"keep_paths": keep_paths, "io": io.value, "device": device.value, **limits}
    run_merge(decided, out, f"folding to {out.name or out}", options, quiet=quiet, json=json)

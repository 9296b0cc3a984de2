"""``fastmerge merge`` and ``fastmerge plan``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastmerge import console
from fastmerge.cli.app import INTERRUPTED, Json, Quiet, RecipePath, Seed, Threads, command, fail
from fastmerge.units import format_bytes, format_seconds, parse_size


class Device(str, Enum):
    """Where the arithmetic runs."""

    cpu = "cpu"
    cuda = "cuda"
    auto = "auto"


class Io(str, Enum):
    """How the output is written."""

    auto = "auto"
    direct = "direct"
    buffered = "buffered"


@command
def merge(
    recipe: RecipePath,
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    threads: Threads = None,
    memory_limit: Annotated[str, typer.Option(help="Bound on working memory.")] = "512MiB",
    overwrite: Annotated[bool, typer.Option(help="Replace OUT once the merge is done.")] = False,
    fresh: Annotated[bool, typer.Option(help="Do not continue an interrupted merge.")] = False,
    seed: Seed = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    io: Annotated[Io, typer.Option(help="How to write.")] = Io.auto,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Merge models as RECIPE says and write the result to OUT."""
    from fastmerge import api

    limits = {
        "memory_limit": parse_size(memory_limit, "--memory-limit"),
        "max_shard_bytes": parse_size(max_shard_size, "--max-shard-size"),
    }
    plan = api.plan(recipe, seed=seed)
    try:
        with console.Progress(f"merging to {out.name or out}", quiet=quiet or json) as progress:
            report = api.merge(
                plan,
                out,
                threads=threads,
                overwrite=overwrite,
                fresh=fresh,
                io=io.value,
                device=device.value,
                progress=progress,
                **limits,
            )
    except KeyboardInterrupt:
        fail(f"interrupted; {out} is untouched, the same command continues", INTERRUPTED)
    if json:
        console.print_json(report.as_dict())
    if quiet or json:
        return
    for note in report.notes:
        console.say(f"note: {note}")
    for name, count in report.nonfinite.items():
        console.say(f"warning: {name}: {count} NaN or infinite values")
    resumed = f", {report.resumed} of them done before" if report.resumed else ""
    console.put(
        f"{report.out}: {report.tensors} tensors{resumed}, {format_bytes(report.bytes_written)} "
        f"in {format_seconds(report.seconds)}"
    )
    console.put(
        f"read and wrote {report.gigabytes_per_second:.2f} GB/s on {report.threads} threads "
        f"({report.backend}, {report.isa}, {report.io} writes), "
        f"{format_bytes(report.peak_anonymous_bytes)} of memory at most"
    )
    if report.seed is not None:
        console.put(f"seed {report.seed}")

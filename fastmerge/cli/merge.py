"""``fastmerge merge`` and ``fastmerge plan``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastmerge.cli.app import Json, Quiet, RecipePath, Seed, Threads, command
from fastmerge.cli.console import Progress, pairs, print_json, put, say, seed_of, table
from fastmerge.cli.options import Argument, Option
from fastmerge.cli.signals import stopped
from fastmerge.errors import FastmergeError
from fastmerge.units import (
    format_bytes,
    format_count,
    format_seconds,
    parse_shard_size,
    parse_size,
)

if TYPE_CHECKING:
    from fastmerge.engine.report import MergeReport
    from fastmerge.output.share import Part
    from fastmerge.planning.adapters import AdapterMerge
    from fastmerge.planning.by_layer import Row
    from fastmerge.planning.plan import Plan


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


MemoryLimit = Annotated[str, Option(metavar="SIZE", help="Bound on anonymous memory.")]
MaxShardSize = Annotated[str, Option(metavar="SIZE", help="Largest weight file.")]
PartOf = Annotated[
    str | None, Option(metavar="I/N", help="Only part I of N; auto: by SLURM's array or RANK.")
]
Cluster = Annotated[
    str | None, Option(metavar="ADDRESS", help="Parts on a Ray cluster: auto, or ray://HOST:PORT.")
]
Check = Annotated[bool, Option("--check", help="First ask transformers whether it would load.")]

MOST_WARNINGS = 5  # tensors named, before a count


@command
def merge(
    recipe: RecipePath,
    out: Annotated[Path, Argument(metavar="OUT", help="Folder, or URL of a store, to write.")],
    threads: Threads = None,
    memory_limit: MemoryLimit = "512MiB",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT at the end.")] = False,
    fresh: Annotated[bool, Option("--fresh", help="Do not continue an interrupted merge.")] = False,
    seed: Seed = None,
    device: Annotated[Device, Option(help="Where to compute.")] = Device.cpu,
    gpu_memory: Annotated[
        str, Option(metavar="SIZE", help="Tensors in flight on each GPU.")
    ] = "2GiB",
    io: Annotated[Io, Option(help="How to write.")] = Io.auto,
    max_shard_size: MaxShardSize = "5GB",
    keep_paths: Annotated[
        bool, Option("--keep-paths", help="Write local paths into card, recipe and lineage.")
    ] = False,
    check: Check = False,
    part: PartOf = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Merge models as RECIPE says and write the result to OUT."""
    from fastmerge import api

    chosen = None if part is None else chosen_part(part, quiet=quiet)
    limits = limits_of(memory_limit, max_shard_size)
    decided = (api.check if check else api.decide)(recipe, seed=seed)
    options: dict[str, Any] = {"threads": threads, "overwrite": overwrite, "fresh": fresh}
    options |= {"keep_paths": keep_paths, "io": io.value, "device": device.value, **limits}
    options["gpu_memory"] = parse_size(gpu_memory, "--gpu-memory")
    options |= {"part": chosen, "cluster": cluster}
    title = f"merging {f'part {chosen} ' if chosen else ''}to {out.name or out}"
    run_merge(decided, out, title, options, quiet=quiet, json=json)


def chosen_part(text: str, *, quiet: bool = False) -> Part:
    """The part that ``--part`` asks for; what ``auto`` came to is said."""
    from fastmerge.output.share import a_part

    found, choice = a_part(text, "--part")
    if choice:
        say(f"note: {choice}", quiet=quiet)
    return found


def run_merge(
    decided: Plan | AdapterMerge,
    out: Path,
    title: str,
    options: Mapping[str, Any],
    *,
    quiet: bool,
    json: bool,
) -> None:
    """`api.merge` of a plan with these ``options``, under a progress bar of this ``title``; then
    what it came to.
    """
    from fastmerge import api

    with interruptible(out), Progress(title, quiet=quiet or json) as progress:
        report = api.merge(decided, out, progress=progress, **options)
    if json:
        print_json(report.as_dict())
    else:
        tell(report, quiet=quiet)


@contextmanager
def interruptible(out: Path) -> Iterator[None]:
    """Ctrl-C within it is told with what became of ``out``."""
    before = _which(out)
    try:
        yield
    except KeyboardInterrupt:
        from fastmerge.arguments import is_url

        if is_url(out):
            stopped(f"; {out} is a model once all of it is there, the same command continues")
        if _which(out) == before:
            stopped(f"; {out} is untouched, the same command continues")
        stopped(f"; {out} is whole")


def _which(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def tell(report: MergeReport, *, quiet: bool = False) -> None:
    """What a merge came to, in words; ``quiet``: what may be wrong with it alone."""
    for note in () if quiet else report.notes:
        say(f"note: {note}")
    tell_nonfinite(list(report.nonfinite.items()))
    if quiet:
        return
    resumed = f", {report.resumed} of them done before" if report.resumed else ""
    place = report.url or report.out
    put(
        f"{place}: {report.tensors} tensors{resumed}, {format_bytes(report.bytes_written)} "
        f"in {format_seconds(report.seconds)}"
    )
    put(
        f"read and wrote {report.gigabytes_per_second:.2f} GB/s on {report.threads} "
        f"thread{'s'[: report.threads != 1]} "
        f"({report.backend}, {report.isa}, {report.io} writes), "
        f"{format_bytes(report.peak_anonymous_bytes)} of memory at most"
    )
    if report.seed is not None:
        put(f"seed {report.seed}")
    if report.part:
        put(f"part {report.part} is done; `fastmerge finish {place}` joins all parts")


def tell_nonfinite(bad: list[tuple[str, int]]) -> None:
    """Which tensors have numbers that are NaN or infinite, if any."""
    for name, count in bad[:MOST_WARNINGS]:
        say(f"warning: {name}: {count} NaN or infinite values")
    if len(bad) > MOST_WARNINGS:
        rest = sum(count for _, count in bad[MOST_WARNINGS:])
        say(f"warning: {len(bad) - MOST_WARNINGS} more tensors: {rest} NaN or infinite values")


@command
def finish(
    out: Annotated[Path, Argument(metavar="OUT", help="Folder that merge --part was given.")],
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Join the parts of a merge to the folder OUT; needs no recipe and no model."""
    from fastmerge import api

    report = api.finish(out, overwrite=overwrite)
    if json:
        print_json(report.as_dict())
        return
    for note in () if quiet else report.notes:
        say(f"note: {note}")
    tell_nonfinite(list(report.nonfinite.items()))
    if quiet:
        return
    files = f"{report.files} file{'s'[: report.files != 1]}"
    put(
        f"{report.url or out}: {report.tensors} tensors of {report.parts} "
        f"part{'s'[: report.parts != 1]}, "
        f"{format_bytes(report.bytes_written)} in {files}, joined in "
        f"{format_seconds(report.seconds)}"
    )


@command
def plan(
    recipe: RecipePath,
    out: Annotated[Path | None, Argument(metavar="OUT", help="Folder to write.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="OUT may exist.")] = False,
    seed: Seed = None,
    memory_limit: MemoryLimit = "512MiB",
    max_shard_size: MaxShardSize = "5GB",
    check: Check = False,
    part: PartOf = None,
    json: Json = False,
) -> None:
    """Say what merge would do. Reads recipe and headers, no weights; writes nothing."""
    from fastmerge import api
    from fastmerge.models.side_files import bytes_of
    from fastmerge.output.layout import Layout
    from fastmerge.output.place import check_output
    from fastmerge.output.share import share_of
    from fastmerge.planning.by_layer import by_layer as values_by_layer
    from fastmerge.planning.plan import Plan

    chosen = None if part is None else chosen_part(part)
    limits = limits_of(memory_limit, max_shard_size)
    decided = (api.check if check else api.decide)(recipe, seed=seed)
    if not isinstance(decided, Plan):
        from fastmerge.cli.adapter_plan import show_adapter_plan

        api.check_part(decided, chosen)
        show_adapter_plan(decided, out, overwrite=overwrite, json=json)
        return
    side = decided.side_files()
    layout = Layout.plan(decided.written, max_shard_bytes=limits["max_shard_bytes"])
    if out is not None:
        needed = layout.file_bytes + bytes_of(side)
        if chosen:
            needed = share_of(decided, layout, chosen)["file_bytes"]
        check_output(out, decided.places, needed, overwrite=overwrite)
    found = decided.describe()
    found |= {"files": len(layout.shards), "memory_limit": limits["memory_limit"]}
    by_layer = values_by_layer(decided.tensors, decided.references)
    found["values"] = [row.as_dict() for row in by_layer]
    if chosen:
        found["part"] = share_of(decided, layout, chosen)
    if json:
        print_json(found)
    else:
        beside = f"{len(side)} from {found['donor']}, {format_bytes(bytes_of(side))}"
        _show_plan(found, beside, str(chosen or ""), by_layer)


def _show_plan(found: Mapping[str, Any], beside: str, part: str, rows: list[Row]) -> None:
    """A plan in words. ``beside``: what is written beside the weights; ``rows``: of parameters."""
    methods = ", ".join(f"{count} {name}" for name, count in found["methods"].items())
    passes, files = found["passes"], found["files"]
    often = "once" if passes == 1 else f"up to {passes} times"
    said = [
        ("model", f"{m['reference']}: {m['tensors']} tensors, {format_bytes(m['bytes'])}")
        for m in found["models"]
    ]
    limit = format_bytes(found["memory_limit"])
    said += [
        ("tensors", f"{found['tensors']} ({methods})"),
        ("parameters", format_count(found["parameters"])),
        ("type", ", ".join(found["dtypes"])),
        ("read", f"{format_bytes(found['bytes_in'])}, each tensor {often}"),
        ("write", f"{format_bytes(found['bytes_out'])} in {files} file{'s'[: files != 1]}"),
        ("memory", f"{limit} at most; inputs are mapped, not loaded"),
        ("side files", beside),
    ]
    if "part" in found:
        own = found["part"]
        names = " to ".join(dict.fromkeys([*own["files"][:1], *own["files"][-1:]])) or "none"
        share = f"{len(own['files'])} of {files} files ({names}): {own['tensors']} tensors, "
        share += f"read {format_bytes(own['bytes_in'])}, write {format_bytes(own['bytes_out'])}"
        said.append((f"part {part}", share))
    said += seed_of(found)
    everywhere = all(row.values == rows[0].values for row in rows)
    if everywhere and rows and rows[0].values:  # without a table, whose library takes 17 ms
        heads, values = _heads(list(rows[0].values)), rows[0].values.values()
        pairs_of = zip(heads, values, strict=True)
        said.append(("values", ", ".join(f"{head} {_shown(value)}" for head, value in pairs_of)))
    pairs([*said, *(("note", note) for note in found["notes"])])
    if not everywhere:
        _show_values(rows)


def _heads(names: list[str]) -> list[str]:
    """Parameters with their models by folder name, where these differ."""
    parts = [name.partition(" of ") for name in names]
    heads = [f"{name}{of}{Path(model).name}" for name, of, model in parts]
    return names if len(set(heads)) < len(heads) else heads


def _show_values(rows: Sequence[Row]) -> None:
    """A table of the parameters, a line for each run of layers that have the same."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    heads = _heads(names)
    table(
        ("layers", "tensors", *heads),
        (
            (row.layers, row.tensors, *(_shown(row.values.get(name)) for name in names))
            for row in rows
        ),
        right=heads,
    )


def _shown(value: Any) -> str:
    if isinstance(value, str):  # of what is copied from other layers: the shift is from N
        return re.sub(r", layer ([+-]\d+)$", r", its layer N\1", value)
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def limits_of(memory_limit: str, max_shard_size: str) -> dict[str, int]:
    from fastmerge.engine.merge import LEAST_MEMORY_BYTES

    memory_bytes = parse_size(memory_limit, "--memory-limit")
    if memory_bytes < LEAST_MEMORY_BYTES:
        least = format_bytes(LEAST_MEMORY_BYTES)
        raise FastmergeError(f"--memory-limit: {memory_limit} is less than the {least} it takes")
    return {
        "memory_limit": memory_bytes,
        "max_shard_bytes": parse_shard_size(max_shard_size, "--max-shard-size"),
    }

"""Runs a plan into a model folder: read, compute and write, one bounded-memory pass."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

from fastmerge.arguments import a_flag, a_function, a_path, a_size, one_of
from fastmerge.collector import MERGING, rarely_collected
from fastmerge.compute.cpu import isa
from fastmerge.compute.devices import GPU_MEMORY_BYTES, Device, a_device
from fastmerge.engine.executor import Local
from fastmerge.engine.report import MergeReport, Observer, PeakMemory, nonfinite_of
from fastmerge.engine.window import window_size
from fastmerge.errors import FastmergeError, enough_memory
from fastmerge.output.lineage import kept_of
from fastmerge.output.place import real_target
from fastmerge.output.share import Part
from fastmerge.output.shipping import Destination
from fastmerge.output.sink import ModelFolder
from fastmerge.planning.plan import Plan
from fastmerge.progress import Progress, Told

MEMORY_LIMIT_BYTES = 512 << 20
MAX_SHARD_BYTES = 5_000_000_000
Io = Literal["auto", "direct", "buffered"]
"""How the output is written: past the page cache where the file system can, always so, or through
the page cache."""

IO = get_args(Io)
LEAST_MEMORY_BYTES = 64 << 20  # Python, NumPy and the smallest buffers take 40 MiB

_AHEAD_SHARE = 4  # what remote models hold ahead takes at most 1/4 of the budget
_SCRATCH_SHARE = 4  # intermediate tensors beyond 1/4 of the budget lie in files, not in memory


@enough_memory("merge")
@rarely_collected(MERGING)
def merge_plan(
    plan: Plan,
    out: Path,
    *,
    threads: int | None = None,
    memory_limit: int = MEMORY_LIMIT_BYTES,
    overwrite: bool = False,
    fresh: bool = False,
    io: Io = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    side_files: Mapping[str, bytes | Path] | None = None,
    observe: Observer | None = None,
    device: Device = "cpu",
    gpu_memory: int = GPU_MEMORY_BYTES,
    part: Part | None = None,
    to: Destination | None = None,
) -> MergeReport:
    """Merges ``plan`` into the folder ``out`` and returns what was done.

    ``memory_limit`` bounds anonymous memory in bytes. An interrupted merge leaves ``out`` as it was
    and a working folder beside it; the same call continues there (``fresh`` starts over).
    ``side_files`` are written beside the weights: bytes, or files to copy. ``observe`` is told what
    each tensor came to, except those that an interrupted run had finished. Raises FastmergeError
    for anything a user can mend. ``device``: "cpu", "cuda" (every GPU of the machine, with
    ``gpu_memory`` bytes of tensors in flight on each), "cuda:N" or "auto"; the bits are the same.
    ``part``: only that part's share, to be joined with the others' by `fastmerge.engine.join`.
    ``to``: where weight files go one by one if the disk has no room for all of them; with ``part``
    the disk must have it for all parts.
    """
    started = time.perf_counter()
    out = a_path(out, "out")
    one_of(io, IO, "io")
    a_device(device, "device")
    memory_limit = a_size(memory_limit, "memory_limit", LEAST_MEMORY_BYTES)
    max_shard_bytes = a_size(max_shard_bytes, "max_shard_bytes")
    gpu_memory = a_size(gpu_memory, "gpu_memory")
    overwrite, fresh = a_flag(overwrite, "overwrite"), a_flag(fresh, "fresh")
    a_function(progress, "progress")
    files = _outside(out, side_files or {})
    executor = Local(
        plan,
        threads=threads,
        device=device,
        gpu_memory=gpu_memory,
        scratch_bytes=memory_limit // _SCRATCH_SHARE,
        ahead_bytes=memory_limit // _AHEAD_SHARE,
    )
    folder = ModelFolder(
        out,
        plan,
        max_shard_bytes=max_shard_bytes,
        staging_bytes=_staging_bytes(executor.threads, memory_limit),
        overwrite=overwrite,
        fresh=fresh,
        io=io,
        side_files=files,
        part=part,
        to=to,
    )
    with folder:
        own, pending = folder.own(plan.tensors), folder.pending(plan.tensors)
        resumed = len(own) - len(pending)
        total, left = (sum(item.bytes_moved for item in items) for items in (own, pending))
        told, peak = Told(progress, total, total - left), PeakMemory()
        bytes_read = 0
        executor.shared = folder.shared
        running = executor.run(folder) if folder.works else None
        with closing(running) if running else nullcontext(()) as finished:
            for item, outcome in finished:
                if observe is not None:
                    observe(item, outcome)
                bytes_read += item.bytes_in
                peak.look()
                told.add(item.bytes_moved, item.name)
        try:
            plan.check_unchanged()
        except FastmergeError:
            folder.discard()
            raise
        folder.finish(kept_of(plan, executor.trims))
    return MergeReport(
        out=out,
        seconds=time.perf_counter() - started,
        bytes_read=bytes_read,
        bytes_written=folder.bytes_written,
        tensors=len(own),
        resumed=resumed,
        threads=executor.threads,
        isa=isa(),
        backend=executor.backend,
        io="direct" if folder.direct else "buffered",
        seed=plan.seed,
        peak_anonymous_bytes=peak.nbytes,
        nonfinite=nonfinite_of(folder.results),
        notes=(*plan.notes, *executor.notes, *folder.notes, *rounding_note(folder.results)),
        part=str(part or ""),
    )


def rounding_note(results: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What rounding to codes came to, where any was: of the whole, and of the worst tensor."""
    coded = {name: (r["rounding"], r["size"]) for name, r in results.items() if "rounding" in r}
    size = math.fsum(own**2 for _, own in coded.values())
    if not size:
        return ()
    error = math.sqrt(math.fsum((share * own) ** 2 for share, own in coded.values()) / size)
    worst = max(coded, key=lambda name: coded[name])
    whole = f"rounding to codes: {error:.2%} of the merged numbers' root mean square"
    return (f"{whole}, {coded[worst][0]:.2%} in {worst}",)


def _outside(out: Path, files: Mapping[str, bytes | Path]) -> dict[str, bytes | Path]:
    """The files but for those in ``out`` itself, which may lie in an input's folder."""
    target = real_target(out)
    return {
        name: file
        for name, file in files.items()
        if not (isinstance(file, Path) and file.is_relative_to(target))
    }


def _staging_bytes(threads: int, memory_limit: int) -> int:
    """4 MiB for each buffer that a window can hold unfinished (2 W + 2), a worker can fill or an
    I/O thread can write; at most half the budget.
    """
    return min(memory_limit // 2, (2 * window_size(threads) + threads + 16) * (4 << 20))

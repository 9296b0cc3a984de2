"""Runs a plan: read, compute and write, one bounded-memory pass over the inputs.

A window of consecutive tensors is in flight. Each has a Python thread that asks for its pages,
calls the primitives (which release the GIL and share one pool of workers, oldest tensor first) and
hands the output to the writer's staging buffers. So a tensor's Gram pass, another's combine pass,
and the disk overlap, and the output stays in file order.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from fastmerge.compute.cpu import CpuBackend, isa, thread_count
from fastmerge.compute.devices import GPU_MEMORY_BYTES, choose_devices
from fastmerge.compute.lane import Place
from fastmerge.compute.stream import Streamer
from fastmerge.compute.tensor import Outcome, Trim
from fastmerge.engine.inputs import Inputs, trims_of, write_tensor
from fastmerge.engine.report import MergeReport, Observer, Progress, anonymous_bytes
from fastmerge.engine.window import in_order, window_size
from fastmerge.errors import FastmergeError, is_whole
from fastmerge.output.layout import Layout
from fastmerge.output.lineage import LINEAGE_FILE, lineage_file, metadata
from fastmerge.output.writer import ModelWriter
from fastmerge.plan.inputs import TensorPlan
from fastmerge.plan.plan import Plan
from fastmerge.tree.nodes import Leaf, Node, leaves

MEMORY_LIMIT_BYTES = 512 << 20
MAX_SHARD_BYTES = 5_000_000_000
IO = ("auto", "direct", "buffered")  # how the output is written

_SCRATCH_SHARE = 4  # intermediate tensors beyond 1/4 of the budget lie in files, not in memory


class _Run:
    """One merge in progress: the shared state of the window's threads."""

    def __init__(
        self,
        plan: Plan,
        writer: ModelWriter,
        backend: CpuBackend,
        streamer: Streamer | None,
        observe: Observer | None,
        trims: Mapping[Node, Trim],
    ) -> None:
        self._plan = plan
        self._trims = trims
        self._streamer = streamer
        self._observe = observe
        self._inputs = Inputs(plan.models)
        self._writer = writer
        self._backend = backend
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.peak_anonymous_bytes = 0

    def tensor(self, item: TensorPlan) -> int:
        """Computes one tensor into the writer; returns the bytes it read and wrote."""
        sources = leaves([item.root])
        nbytes = sum(stored.nbytes for stored in sources)
        self._inputs.prefetch(sources)
        if self._streamer is None or isinstance(item.root, Leaf):
            sink = self._writer.sink(item.name)
            outcome = write_tensor(self._backend, self._inputs, item, sink, self._trims)
        else:
            place = Place(item.dtype, self._writer.parts(item.name))
            outcome = self._streamer.run(item.name, item.root, item.shape, place)
        self._inputs.drop(sources)
        self._writer.computed(item.name, self._lineage(outcome))
        if self._observe is not None:
            self._observe(item, outcome)
        with self._lock:
            self.bytes_read += nbytes
            self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, anonymous_bytes())
        return nbytes + item.nbytes

    def _lineage(self, outcome: Outcome) -> dict[str, Any]:
        """What one tensor's result followed from, for the journal and the lineage file."""
        lines: dict[str, Any] = {}
        if outcome.coefficients is not None:
            lines["coefficients"] = {
                self._plan.references[source.model]: value if math.isfinite(value) else None
                for source, value in outcome.coefficients.items()
            }
        if outcome.kept is not None:
            lines["kept"] = list(outcome.kept)
        if outcome.nonfinite:
            lines["nonfinite"] = outcome.nonfinite
        return lines


def merge_plan(
    plan: Plan,
    out: Path,
    *,
    threads: int | None = None,
    memory_limit: int = MEMORY_LIMIT_BYTES,
    overwrite: bool = False,
    fresh: bool = False,
    io: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    side_files: Mapping[str, bytes | Path] | None = None,
    observe: Observer | None = None,
    device: str = "cpu",
    gpu_memory: int = GPU_MEMORY_BYTES,
) -> MergeReport:
    """Merges ``plan`` into the folder ``out`` and returns what was done.

    ``memory_limit`` bounds anonymous memory in bytes. An interrupted merge leaves ``out`` as it was
    and a working folder beside it; the same call continues there (``fresh`` starts over).
    ``side_files`` are written beside the weights: bytes, or files to copy. ``observe`` is told what
    each tensor came to, except those that an interrupted run had finished. Raises FastmergeError
    for anything a user can mend. ``device``: "cpu", "cuda" (every GPU of the machine, with
    ``gpu_memory`` bytes of tensors in flight on each) or "auto"; the bits are the same.
    """
    started = time.perf_counter()
    if io not in IO:
        raise FastmergeError(f"io: unknown '{io}'; use {', '.join(IO)}")
    for name, nbytes in (
        ("memory_limit", memory_limit),
        ("max_shard_bytes", max_shard_bytes),
        ("gpu_memory", gpu_memory),
    ):
        if not is_whole(nbytes) or nbytes < 1:
            raise FastmergeError(f"{name}: {nbytes!r} is not a number of bytes of 1 or more")
    inputs = Inputs(plan.models)
    roots = [(item.name, item.root) for item in plan.tensors]
    devices, note = choose_devices(device, roots, inputs.fetch)
    count = thread_count(threads)
    window = window_size(count)
    layout = Layout.plan(
        [(item.name, item.dtype, item.shape) for item in plan.tensors],
        max_shard_bytes=max_shard_bytes,
        metadata=metadata(plan),
    )
    items = {item.name: item for item in plan.tensors}
    total = plan.bytes_in + plan.bytes_out
    with ModelWriter(
        out,
        layout,
        key=_job_key(plan),
        inputs=[model.path for model in plan.models],
        overwrite=overwrite,
        fresh=fresh,
        io=io,
        staging_bytes=_staging_bytes(count, memory_limit),
    ) as writer:
        backend = CpuBackend(
            count, scratch_folder=writer.partial, scratch_bytes=memory_limit // _SCRATCH_SHARE
        )
        spanning = trims_of(plan, backend, inputs)
        streamer = None
        if devices:
            streamer = Streamer(
                devices, backend, inputs.fetch, gpu_memory=gpu_memory, trims=spanning
            )
        run = _Run(plan, writer, backend, streamer, observe, spanning)
        pending = [items[name] for name in writer.pending()]
        done = total - sum(item.bytes_in + item.nbytes for item in pending)
        with closing(in_order(run.tensor, pending, window)) as finished:
            for item, nbytes in finished:
                done += nbytes
                if progress is not None:
                    progress(done, total, item.name)
        try:
            for model in plan.models:
                model.check_unchanged()
        except FastmergeError:
            writer.discard()
            raise
        results = writer.results
        files = dict(side_files or {})
        files[LINEAGE_FILE] = lineage_file(plan, results, spanning)
        writer.finish(files)
        written = writer.bytes_written
    return MergeReport(
        out=out,
        seconds=time.perf_counter() - started,
        bytes_read=run.bytes_read,
        bytes_written=written,
        tensors=len(plan.tensors),
        resumed=len(plan.tensors) - len(pending),
        threads=count,
        isa=isa(),
        backend=backend.name if streamer is None else "triton",
        io="direct" if writer.direct else "buffered",
        seed=plan.seed,
        peak_anonymous_bytes=run.peak_anonymous_bytes,
        nonfinite={
            name: int(result["nonfinite"])
            for name, result in results.items()
            if "nonfinite" in result
        },
        notes=(*plan.notes, *([note] if note else ()), *(streamer.notes if streamer else ())),
    )


def _staging_bytes(threads: int, memory_limit: int) -> int:
    """4 MiB for each buffer that a window can hold unfinished (2 W + 2), a worker can fill or an
    I/O thread can write; at most half the budget.
    """
    return min(memory_limit // 2, (2 * window_size(threads) + threads + 16) * (4 << 20))


def _job_key(plan: Plan) -> str:
    """What must not change between an interrupted run and the one that continues it."""
    stamps = [stamp for model in plan.models for stamp in model.stamp]
    return f"{plan.key} {stamps}"

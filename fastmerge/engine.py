"""Runs a plan: read, compute and write, one bounded-memory pass over the inputs.

A window of consecutive tensors is in flight. Each has a Python thread that asks for its pages,
calls the primitives (which release the GIL and share one pool of workers, oldest tensor first) and
hands the output to the writer's staging buffers. So a tensor's Gram pass, another's combine pass,
and the disk overlap, and the output stays in file order.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmerge import _C, algebra, backends, trims
from fastmerge.algebra import Float64, Merge, Node, Source
from fastmerge.backends import CpuBackend
from fastmerge.checkpoint import Checkpoint
from fastmerge.compute import Computation, Outcome, Trim
from fastmerge.dtypes import DType
from fastmerge.errors import FastmergeError
from fastmerge.layout import Layout
from fastmerge.plan import Plan, TensorPlan
from fastmerge.stream import GPU_MEMORY_BYTES, Place, Streamer, choose_devices
from fastmerge.units import is_whole
from fastmerge.writer import ModelWriter

Observer = Callable[[TensorPlan, Outcome], None]  # from the thread that computed the tensor
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all (read + written), tensor name

MEMORY_LIMIT_BYTES = 512 << 20
MAX_SHARD_BYTES = 5_000_000_000
LINEAGE_FILE = "fastmerge.json"
IO = ("auto", "direct", "buffered")  # how the output is written

_SCRATCH_SHARE = 4  # intermediate tensors beyond 1/4 of the budget lie in files, not in memory


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. Bytes are of tensor data; ``nonfinite`` counts NaN and Inf by output
    tensor.
    """

    out: Path
    seconds: float
    bytes_read: int
    bytes_written: int
    tensors: int
    resumed: int  # tensors that an interrupted run had finished
    threads: int
    isa: str
    backend: str
    io: str  # "direct" or "buffered"
    seed: int | None
    peak_anonymous_bytes: int
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def gigabytes_per_second(self) -> float:
        """Tensor bytes read and written per second, in 1e9."""
        return (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e9

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        values = asdict(self)
        values["out"] = str(self.out)
        values["gigabytes_per_second"] = round(self.gigabytes_per_second, 3)
        return values


def anonymous_bytes() -> int:
    """The process's anonymous resident memory now (Linux's RssAnon); 0 where it is not told."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def window_size(threads: int) -> int:
    """Tensors in flight: enough that small ones and the ends of large ones leave no worker idle."""
    return 4 + threads // 8


class Inputs:
    """The plan's checkpoints as `Computation` wants them, with pages asked for ahead and dropped
    behind.
    """

    def __init__(self, models: Sequence[Checkpoint]) -> None:
        self._models = models

    def fetch(self, source: Source) -> _C.View:
        return self._models[source.model].view(source.name)

    def dtype(self, source: Source) -> DType:
        return self._models[source.model].tensors[source.name].dtype

    def nbytes(self, sources: Sequence[Source]) -> int:
        return sum(self._models[s.model].tensors[s.name].nbytes for s in sources)

    def prefetch(self, sources: Sequence[Source]) -> None:
        for source in sources:
            self._models[source.model].prefetch(source.name)

    def drop(self, sources: Sequence[Source]) -> None:
        for source in sources:
            self._models[source.model].drop(source.name)


def in_order(
    work: Callable[[Any], Any], items: Sequence[Any], window: int
) -> Generator[tuple[Any, Any], None, None]:
    """(item, work(item)) in order, with up to ``window`` of them running or waiting to be taken.

    When one raises, or the generator is closed, no further item starts and the running ones are
    waited for.
    """
    with ThreadPoolExecutor(window, thread_name_prefix="fastmerge") as pool:
        running: list[tuple[Any, Future[Any]]] = []
        try:
            for item in items:
                if len(running) == window:
                    first, future = running.pop(0)
                    yield first, future.result()
                running.append((item, pool.submit(work, item)))
            while running:
                first, future = running.pop(0)
                yield first, future.result()
        finally:
            for _, future in running:
                future.cancel()


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

    def bytes_in(self, item: TensorPlan) -> int:
        """Bytes of the sources of one tensor."""
        return self._inputs.nbytes(algebra.leaves([item.root]))

    def tensor(self, item: TensorPlan) -> int:
        """Computes one tensor into the writer; returns the bytes it read and wrote."""
        sources = algebra.leaves([item.root])
        nbytes = self._inputs.nbytes(sources)
        self._inputs.prefetch(sources)
        if self._streamer is None or isinstance(item.root, Source):
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
        return nbytes + output_bytes(item)

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


def output_bytes(item: TensorPlan) -> int:
    """Bytes of one output tensor."""
    return item.dtype.bytes_for(math.prod(item.shape))


def trims_of(plan: Plan, backend: CpuBackend, inputs: Inputs) -> Mapping[Node, Trim]:
    """The trims that span all tensors, which are found before the first one is merged."""
    nodes = trims.spanning((item.root, item.count) for item in plan.tensors)
    return trims.find(nodes, backend, inputs.fetch)


def write_tensor(
    backend: CpuBackend,
    inputs: Inputs,
    item: TensorPlan,
    sink: _C.Sink,
    spanning: Mapping[Node, Trim] | None = None,
) -> Outcome:
    """One output tensor into ``sink``: copied byte for byte when nothing is to be computed."""
    root = item.root
    if isinstance(root, Source) and inputs.dtype(root) == item.dtype:
        _C.copy(backend.pool, inputs.fetch(root), sink)
        return Outcome()
    return Computation(backend, inputs.fetch, item.name, item.shape, spanning).run(root, sink)


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
    count = backends.thread_count(threads)
    window = window_size(count)
    layout = Layout.plan(
        [(item.name, item.dtype, item.shape) for item in plan.tensors],
        max_shard_bytes=max_shard_bytes,
        metadata=_metadata(plan),
    )
    items = {item.name: item for item in plan.tensors}
    total = sum(output_bytes(item) for item in plan.tensors) + plan.bytes_in
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
        done = total - sum(output_bytes(item) + run.bytes_in(item) for item in pending)
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
        files[LINEAGE_FILE] = _lineage_file(plan, results, spanning)
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
        isa=backends.isa(),
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


def materialise(
    plan: Plan, *, threads: int | None = None
) -> Iterator[tuple[TensorPlan, NDArray[Any]]]:
    """Every output tensor of ``plan`` in memory, in plan order; nothing is written.

    The arrays have the output's shape: float32, float16, or uint16 holding bfloat16 bits; tensors
    of types that are only copied come as their raw bytes (uint8, one axis).
    """
    count = backends.thread_count(threads)
    backend = backends.cpu(count)
    inputs = Inputs(plan.models)
    spanning = trims_of(plan, backend, inputs)

    def compute_one(item: TensorPlan) -> NDArray[Any]:
        sources = algebra.leaves([item.root])
        inputs.prefetch(sources)
        array, sink = array_sink(item)
        write_tensor(backend, inputs, item, sink, spanning)
        inputs.drop(sources)
        return array

    with closing(in_order(compute_one, plan.tensors, window_size(count))) as finished:
        yield from finished
    for model in plan.models:
        model.check_unchanged()


_STORAGE: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def array_sink(item: TensorPlan) -> tuple[NDArray[Any], _C.Sink]:
    """A new array for one output tensor, and the sink that fills it."""
    storage = _STORAGE.get(item.dtype.code)
    array: NDArray[Any]
    if storage is None:
        array = np.empty(output_bytes(item), np.uint8)
        view = _C.View(array.ctypes.data, array.nbytes, "RAW", array)
    else:
        array = np.empty(item.shape, storage)
        view = _C.View(array.ctypes.data, array.size, item.dtype.code, array)
    return array, _C.MemorySink(view)


def grams(
    models: Sequence[Checkpoint],
    tensors: Mapping[str, Sequence[Source]],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Float64]:
    """The Gram matrix of each tensor's sources, in one pass over the weights.

    ``tensors`` maps a name to sources of one shape. The result is float64, shape (n, n), over
    [x_0, x_1 - x_0, ..., x_{n-1} - x_0]: what `algebra.coefficients` takes with ``reference`` = 0.
    """
    count = backends.thread_count(threads)
    backend = backends.cpu(count)
    inputs = Inputs(models)
    total = sum(inputs.nbytes(sources) for sources in tensors.values())
    done = 0

    def one(entry: tuple[str, Sequence[Source]]) -> Float64:
        sources = list(entry[1])
        inputs.prefetch(sources)
        first, *others = [inputs.fetch(source) for source in sources]
        split = (others, first) if others else ([first], None)
        gram = backend.gram(*split, axis=None, rows=1, cols=first.count)
        inputs.drop(sources)
        return gram

    found: dict[str, Float64] = {}
    with closing(in_order(one, list(tensors.items()), window_size(count))) as finished:
        for (name, sources), gram in finished:
            found[name] = gram
            done += inputs.nbytes(sources)
            if progress is not None:
                progress(done, total, name)
    return found


def _staging_bytes(threads: int, memory_limit: int) -> int:
    """4 MiB for each buffer that a window can hold unfinished (2 W + 2), a worker can fill or an
    I/O thread can write; at most half the budget.
    """
    return min(memory_limit // 2, (2 * window_size(threads) + threads + 16) * (4 << 20))


def _job_key(plan: Plan) -> str:
    """What must not change between an interrupted run and the one that continues it."""
    stamps = [stamp for model in plan.models for stamp in model.stamp]
    return f"{plan.key} {stamps}"


def _metadata(plan: Plan) -> dict[str, str]:
    """The lineage that is known before the merge: every shard's ``__metadata__``."""
    from fastmerge import __version__

    return {
        "format": "pt",
        "fastmerge_version": __version__,
        "fastmerge_recipe": plan.recipe_text,
        "fastmerge_seed": "" if plan.seed is None else str(plan.seed),
        "fastmerge_inputs": json.dumps(
            {
                ref: model.fingerprint
                for ref, model in zip(plan.references, plan.models, strict=True)
            }
        ),
    }


def _lineage_file(
    plan: Plan, results: Mapping[str, Mapping[str, Any]], spanning: Mapping[Node, Trim]
) -> bytes:
    """The lineage that is known after it: effective coefficients and kept counts by tensor, or for
    whole models.
    """
    lineage = {
        **_metadata(plan),
        "fastmerge_inputs": {
            ref: model.fingerprint for ref, model in zip(plan.references, plan.models, strict=True)
        },
        "tensors": {name: results[name] for name in sorted(results)},
    }
    for node, trim in list(spanning.items())[:1]:  # the counts are the same for all
        assert isinstance(node, Merge)
        lineage["kept"] = {
            plan.references[part.model]: selection.kept
            for part, selection in zip(node.operands, trim.selections, strict=True)
            if isinstance(part, Source)
        }
    return (json.dumps(lineage, indent=1) + "\n").encode()

"""Who computes a plan's tensors: this machine, or what others plug in."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from typing import Protocol

from fastmerge import _C
from fastmerge.compute.across import Shared
from fastmerge.compute.cpu import CpuBackend, cpu, thread_count
from fastmerge.compute.devices import GPU_MEMORY_BYTES, choose_devices
from fastmerge.compute.lane import Place
from fastmerge.compute.stream import Streamer
from fastmerge.compute.tensor import Outcome, Trim
from fastmerge.engine.inputs import (
    Inputs,
    is_double,
    on_host,
    trims_of,
    write_tensor,
)
from fastmerge.engine.window import in_order, window_size
from fastmerge.errors import FastmergeError, UnsupportedError, argument, brief
from fastmerge.output.sink import Sink
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan
from fastmerge.tree.nodes import Dequantised, LowRank, Node, walk

_SCRATCH_BYTES = 64 << 20
_AHEAD_BYTES = 128 << 20
_DOUBLES = 8  # tensors at a time in NumPy, of which each holds some 10 MiB


class Executor(Protocol):
    """Computes the tensors of one plan."""

    def run(self, sink: Sink) -> Iterator[tuple[TensorPlan, Outcome]]:
        """Every tensor that is pending in ``sink``, computed into it; in order, as they end.

        No further tensor starts when one raises or the iterator is closed.
        """
        ...


class Local:
    """This machine: a window of consecutive tensors in flight.

    Each has a Python thread that asks for its pages, calls the primitives (which release the GIL
    and share one pool of workers, oldest tensor first) and hands the output to the sink. So a
    tensor's Gram pass, another's combine pass, and the disk overlap, and the output stays in order.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        threads: int | None = None,
        device: str = "cpu",
        gpu_memory: int = GPU_MEMORY_BYTES,
        scratch_bytes: int = _SCRATCH_BYTES,
        ahead_bytes: int = _AHEAD_BYTES,
    ) -> None:
        """Raises FastmergeError where ``device`` ("cpu", "cuda", "auto") cannot take the plan.

        ``gpu_memory``: bytes of tensors in flight on each GPU. ``scratch_bytes``: what intermediate
        tensors may take of memory, where the sink has a folder for the rest. ``ahead_bytes``: what
        remote models may hold that is not wanted yet.
        """
        self._plan = plan
        self._inputs = Inputs(plan.models)
        self.threads = thread_count(threads)
        roots = [(item.name, item.root) for item in plan.tensors]
        double = next((item for item in plan.tensors if item.in_float64), None)
        if double is None or device == "cpu":
            self._devices, note = choose_devices(device, roots, self._inputs.fetch)
        elif device == "auto":
            self._devices, note = [], "device auto: merged on the CPU, as GPUs have no float64 here"
        else:
            raise UnsupportedError(
                f"device {device}: {double.name} is merged in float64, for which there are no GPU "
                f"kernels; use {argument('device', 'cpu')}, or write `dtype: float32`"
            )
        self._gpu_memory, self._scratch_bytes = gpu_memory, scratch_bytes
        self._ahead_bytes = ahead_bytes
        self.notes: tuple[str, ...] = (note,) if note else ()
        if self._devices:
            self.notes += _kept_here(plan)
        self.shared: Shared | None = None  # what parts of the merge find out for one another
        self.trims: Mapping[Node, Trim] = {}  # those that span all tensors, once `run` has begun

    @property
    def backend(self) -> str:
        """What computes: "cpu" or "triton"."""
        return "triton" if self._devices else "cpu"

    def run(self, sink: Sink) -> Generator[tuple[TensorPlan, Outcome], None, None]:
        folder = sink.scratch_folder
        backend = cpu(self.threads)
        if folder is not None:
            backend = CpuBackend(
                self.threads, scratch_folder=folder, scratch_bytes=self._scratch_bytes
            )
        self.trims = self._trims(backend)
        streamer = None
        if self._devices:
            streamer = Streamer(
                self._devices,
                backend,
                self._inputs,
                gpu_memory=self._gpu_memory,
                trims=self.trims,
            )

        # Beside the pool's threads, which such tensors do not use.
        doubles = threading.BoundedSemaphore(min(self.threads, _DOUBLES))

        def compute(item: TensorPlan) -> Outcome:
            with self._inputs.reading(item.sources) as inputs:
                made = inputs.reduced(item, backend.pool)
                if is_double(made):
                    from fastmerge.engine.doubles import write_double  # 6 ms that few need

                    with doubles:
                        place = Place(item.dtype, sink.parts(item))
                        outcome = write_double(backend, inputs, made, place, self.trims)
                elif streamer is None or on_host(item):
                    slots = [_slot(sink, part) for part in item.written]
                    outcome = write_tensor(backend, inputs, made, slots, self.trims)
                else:
                    place = Place(item.dtype, sink.parts(item))
                    outcome = streamer.run(item.name, made.root, item.shape, place)
            sink.computed(item, outcome)
            return outcome

        pending = _pending(sink, self._plan)
        window = window_size(self.threads)
        with (
            self._inputs.ahead(pending, self._ahead_bytes),
            closing(in_order(compute, pending, window, _moved)) as finished,
        ):
            yield from finished
        if streamer is not None:
            self.notes += streamer.notes

    def _trims(self, backend: CpuBackend) -> Mapping[Node, Trim]:
        """Those that span all tensors, in the arithmetic of these."""
        plan, inputs = self._plan, self._inputs
        if not plan.spanning:
            return {}
        kinds = {t.in_float64 for t in plan.tensors if any(m in plan.spanning for m in t.merges)}
        if len(kinds) > 1:
            raise UnsupportedError(
                "trim: model takes all tensors in one arithmetic, and some models have float64 in "
                "some of them; write `dtype: float64` or `dtype: float32`"
            )
        if kinds == {False}:
            return trims_of(plan, backend, lambda leaf: inputs.view(leaf, backend), self.shared)
        from fastmerge.compute.doubles import DoubleBackend  # 6 ms that few need
        from fastmerge.engine.doubles import numbers

        doubles = DoubleBackend(backend)
        return trims_of(plan, doubles, lambda leaf: numbers(leaf, backend, inputs), self.shared)


def _pending(sink: Sink, plan: Plan) -> list[TensorPlan]:
    found = sink.pending(plan.tensors)
    if not isinstance(found, list) or not all(isinstance(item, TensorPlan) for item in found):
        raise FastmergeError(
            f"{type(sink).__name__}.pending gives {brief(found)}; it must be a list of the tensors "
            "given that it wants"
        )
    return found


def _slot(sink: Sink, item: TensorPlan) -> _C.Sink:
    found = sink.slot(item)
    if not isinstance(found, _C.Sink):
        raise FastmergeError(
            f"{type(sink).__name__}.slot gives {brief(found)} for '{item.name}'; it must be a "
            "fastmerge._C.Sink, such as a MemorySink"
        )
    return found


def _moved(item: TensorPlan) -> int:
    return item.bytes_moved


def _kept_here(plan: Plan) -> tuple[str, ...]:
    """What of a merge on GPUs the CPU computes all the same, where that is more than a few rows."""
    kinds = [{type(node) for node in walk(item.root)} for item in plan.tensors if on_host(item)]
    counts = {
        "are stored as codes": sum(Dequantised in each for each in kinds),
        "have an adapter on them": sum(LowRank in each for each in kinds),
    }
    return tuple(
        f"{count} tensors {what}: the CPU computes them, with the GPU's bits"
        for what, count in counts.items()
        if count
    )

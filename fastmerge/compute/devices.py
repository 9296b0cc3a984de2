"""Which devices take part in a merge, and what a tensor needs there."""

from __future__ import annotations

import ctypes
import math
import mmap
import re
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from fastmerge import _C
from fastmerge.arguments import one_of
from fastmerge.compute.on_device import factor_bytes, made_count
from fastmerge.compute.tensor import consensus_terms, steps
from fastmerge.dtypes import DType
from fastmerge.errors import FastmergeError, ResourceError, UnsupportedError, argument
from fastmerge.extras import install
from fastmerge.methods import Consensus, Function, Pointwise
from fastmerge.primitives import Vectors
from fastmerge.selection import RANKED
from fastmerge.tree.nodes import Merge, Node, Stored, leaves, walk

Device = Literal["cpu", "cuda", "auto"] | str
"""Where the arithmetic runs: the CPU, every GPU of the machine, whichever is faster, or "cuda:N",
one GPU."""

DEVICES = get_args(get_args(Device)[0])
GPU_MEMORY_BYTES = 2 << 30
_LOOKS = 16  # at the pages of a tensor


def cuda_devices() -> list[str]:
    """The CUDA devices of this machine; FastmergeError where there is none to use."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"device cuda: {error.name} is not installed; {install('gpu')}, or use cpu"
        ) from error
    if not torch.cuda.is_available():
        raise ResourceError(
            f"device cuda: this machine has no usable CUDA device; use {argument('device', 'cpu')}"
        )
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def a_device(value: object, where: str) -> str:
    """``cpu``, ``cuda`` (every GPU of the machine), ``auto``, or ``cuda:N``: that one alone."""
    if isinstance(value, str) and re.fullmatch(r"cuda:\d+", value):
        return value
    return one_of(value, DEVICES, where)


def device_bytes(root: Node, shape: tuple[int, ...], dtype: DType) -> int:
    """Device memory that one tensor's merge takes: sources and what leaves make of them, output,
    intermediates, what select gathers of each delta, inner products of rows, and 1 MiB for tables.
    """
    from fastmerge.kernels.select import gathered_bytes

    count = math.prod(shape)
    merges = [node for node in walk(root) if isinstance(node, Merge)]
    intermediates = 4 * count * max(0, len(merges) - 1)
    sparse = [node for node in merges if isinstance(node.method, Consensus)]
    deltas = max((len(node.operands) for node in sparse), default=0)
    gathered = deltas * int(gathered_bytes(count))
    gathered += max((_drawn_bytes(node, shape) for node in sparse), default=0)
    products = 0
    for node in merges:
        if node.axis is not None:
            vectors = Vectors.of(shape, node.axis).count
            products = max(products, 8 * vectors * (len(node.inputs) + 1) ** 2)
    for node in merges:
        method = node.method
        if isinstance(method, Pointwise) and method.passes(node.values) > 1:
            # What a formula makes of each model, of all of them and of none; what it searches in.
            made = 4 * count * (len(node.operands) + 2)
            gathered = max(gathered, made + 3 * int(gathered_bytes(count)))
    if any(isinstance(node.method, Function) for node in merges):
        intermediates += 4 * count  # what it returns, until that is rounded
    sources = sum(stored.nbytes for stored in leaves([root]))
    sources += 4 * made_count(root) + factor_bytes(root)
    most = sources + dtype.bytes_for(count) + intermediates + gathered
    return most + products + (1 << 20)


def _drawn_bytes(node: Merge, shape: tuple[int, ...]) -> int:
    """Device memory of a merge's draws by rank: masks, and what those of one launch take."""
    from fastmerge.kernels.draw import BUFFER_BYTES, drawn_bytes

    count = math.prod(shape)
    specs = [keep.of(shape, 0) for keep in consensus_terms(node).keep]
    needs = [int(drawn_bytes(count, s.length)) for s in specs if s.kind == RANKED and count]
    most: int = max([BUFFER_BYTES, *needs])
    return len(needs) * count // 8 + min(sum(needs), most)


def choose_devices(
    device: str, roots: Sequence[tuple[str, Node]], fetch: Callable[[Stored], _C.View]
) -> tuple[list[str], str]:
    """The CUDA devices for `a_device`, none of them for the CPU, and a note on what auto chose.

    ``roots``: the tensors to merge, by name. auto: the GPUs, where the inputs are in the page
    cache; from a disk, the GPU would only wait for it. Raises FastmergeError where ``cuda`` is
    asked for and there is none (or no such one), or where its kernels cannot take as many inputs.
    """
    if device == "cpu":
        return [], ""
    try:
        found = cuda_devices()
    except FastmergeError:
        if device != "auto":
            raise
        return [], "device auto: merged on the CPU, as there is no usable CUDA device"
    if ":" in device:
        if device not in found:
            raise ResourceError(f"device {device}: this machine has {', '.join(found)}")
        found = [device]
    from fastmerge.kernels.backend import TritonBackend

    for name, root in roots:
        for step in steps(root) if isinstance(root, Merge) else []:
            refusal = TritonBackend.takes(step.node, step.taken)
            if refusal is None:
                continue
            if device == "auto":
                return [], f"device auto: merged on the CPU, as {name} {refusal}"
            raise UnsupportedError(
                f"device cuda: {name} {refusal}; use {argument('device', 'cpu')}"
            )
    views = [fetch(source) for source in leaves(root for _, root in roots)]
    if device == "auto" and cached_share(views) < 0.5:
        return [], "device auto: merged on the CPU, as the files are on disk and a GPU would wait"
    return found, "device auto: merged on the GPU" if device == "auto" else ""


def cached_share(views: Sequence[_C.View]) -> float:
    """The share of mapped tensors' pages that are in memory, 0 to 1, from a few pages of each."""
    libc = ctypes.CDLL(None)
    flag = ctypes.c_ubyte()
    present = asked = 0
    for view in views:
        first = view.address // mmap.PAGESIZE
        pages = (view.address + view.nbytes - 1) // mmap.PAGESIZE - first + 1
        for i in range(looks := min(_LOOKS, pages)):
            page = first + i * pages // looks
            where = ctypes.c_void_p(page * mmap.PAGESIZE)
            if libc.mincore(where, ctypes.c_size_t(1), ctypes.byref(flag)) == 0:
                present += flag.value & 1
            asked += 1
    return present / max(asked, 1)

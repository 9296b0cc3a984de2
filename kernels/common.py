"""What every kernel shares: element types as integers, the segment table, the random bits and the
launch.

Weights are loaded and stored as plain integers and converted in the open, so that a rounding is the
same bit on every GPU, on AMD and in Triton's interpreter (but for the sign and payload of a NaN).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from fastmerge.errors import FastmergeError, ResourceError, UnsupportedError

# Element types by number: the first three as in csrc/tensor.h, then the two that are only read.
F32: tl.constexpr = tl.constexpr(0)
F16: tl.constexpr = tl.constexpr(1)
BF16: tl.constexpr = tl.constexpr(2)
E4M3: tl.constexpr = tl.constexpr(3)
E5M2: tl.constexpr = tl.constexpr(4)
CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
OUTPUTS = (torch.float32, torch.float16, torch.bfloat16)
MAX_INPUTS = 16  # of one launch, a base apart: what is tested to compile without spills

# One program does CHUNK elements: 64 KiB of bf16, so that the table look-up before it is noise and
# the largest tensors of a 7 B model still give 4000 programs.
CHUNK = 32768
WARPS = 4
MOST_REGISTERS = 255  # of a thread of an NVIDIA GPU
_LAUNCHING = threading.Lock()  # neither Triton's compiler nor its interpreter is made for threads
HEAD = 2  # table columns before the addresses: element count, first chunk


# --- on the device ------------------------------------------------------------------------------


@triton.jit
def locate(table, owners, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's segment: its number, its table row, its first and last + 1 element here
    (int64).
    """
    pid = tl.program_id(0).to(tl.int64)
    segment = tl.load(owners + pid).to(tl.int64)
    row = table + segment * COLUMNS
    begin = (pid - tl.load(row + 1)) * CHUNK
    return segment, row, begin, tl.minimum(tl.load(row), begin + CHUNK)


@triton.jit
def pointer(address, CODE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address from the table as a pointer to raw integers of the type's width."""
    if CODE == F32:
        raw = address.to(tl.pointer_type(tl.int32))
    elif CODE == F16 or CODE == BF16:
        raw = address.to(tl.pointer_type(tl.int16))
    else:
        raw = address.to(tl.pointer_type(tl.int8))
    return tl.multiple_of(raw, 16) if ALIGNED else raw


@triton.jit
def decode(raw, CODE: tl.constexpr):
    """Raw integers to fp32, exactly."""
    if CODE == F32:
        value = raw.to(tl.float32, bitcast=True)
    elif CODE == F16:
        value = raw.to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == BF16:
        value = (raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif CODE == E5M2:  # the upper half of an fp16
        half = raw.to(tl.uint8, bitcast=True).to(tl.uint16) << 8
        value = half.to(tl.float16, bitcast=True).to(tl.float32)
    else:  # E4M3FN: moved up; then 2**120 corrects the bias (127 - 7), subnormals included
        bits = raw.to(tl.uint8, bitcast=True).to(tl.uint32)
        magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        magnitude = tl.where((bits & 0x7F) == 0x7F, float("nan"), magnitude)
        signed = magnitude.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)
        value = signed.to(tl.float32, bitcast=True)
    return value


# Compiled, fp32 is rounded to bf16 by the GPU's own instruction (to nearest even, everywhere), a
# tenth of the instructions of a merge; the interpreter's does not round so.
NATIVE: tl.constexpr = tl.constexpr(isinstance(decode, triton.runtime.JITFunction))


@triton.jit
def encode(value, CODE: tl.constexpr):
    """fp32 to raw integers of an output type, to nearest even; NaN stays NaN."""
    bits = value.to(tl.uint32, bitcast=True)
    if CODE == F32:
        raw = bits.to(tl.int32, bitcast=True)
    elif CODE == F16:
        raw = value.to(tl.float16).to(tl.int16, bitcast=True)
    elif NATIVE:
        raw = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        even = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False) >> 16
        kept = (bits >> 16) | 0x40  # rounding could carry a NaN's payload into infinity
        raw = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, kept, even).to(tl.uint16)
        raw = raw.to(tl.int16, bitcast=True)
    return raw


@triton.jit
def nonfinite(raw, CODE: tl.constexpr):
    """1 where a stored value is NaN or infinite, else 0 (int32)."""
    if CODE == F32:
        bad = (raw & 0x7F800000) == 0x7F800000
    elif CODE == F16:
        bad = (raw & 0x7C00) == 0x7C00
    else:
        bad = (raw & 0x7F80) == 0x7F80
    return bad.to(tl.int32)


@triton.jit
def fetch(address, offsets, mask, CODE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr):
    """Elements as fp32; 0 outside the mask. Without a mask the loads are 16 bytes wide."""
    where = pointer(address, CODE, ALIGNED) + offsets
    if MASKED:
        raw = tl.load(where, mask=mask, other=0)
    else:
        raw = tl.load(where)
    return decode(raw, CODE)


@triton.jit
def put(
    address, offsets, mask, value, CODE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr
):
    """Stores fp32 values in an output type; returns nonfinite() of what was stored."""
    where = pointer(address, CODE, ALIGNED) + offsets
    raw = encode(value, CODE)
    bad = nonfinite(raw, CODE)
    if MASKED:
        tl.store(where, raw, mask=mask)
        bad = tl.where(mask, bad, 0)
    else:
        tl.store(where, raw)
    return bad


@triton.jit
def tally(where, count):
    """Adds to an int64 counter that nothing reads before the kernel's end: no fence is needed."""
    tl.atomic_add(where, count.to(tl.int64), mask=count > 0, sem="relaxed")


# --- on the host --------------------------------------------------------------------------------


class Group(NamedTuple):
    """Segments that share one compiled kernel, and where each came from."""

    indices: list[int]
    members: torch.Tensor  # int64, the same on the device
    table: torch.Tensor  # int64 (segments, HEAD + addresses), on the device
    owners: torch.Tensor  # int32 (chunks,): the segment of each program
    chunks: int
    first_chunks: np.ndarray  # int64 (segments + 1,)


def group(
    indices: list[int], rows: Sequence[Sequence[torch.Tensor]], counts: np.ndarray | None = None
) -> Group:
    """Builds the table of one launch; row i holds the tensors of segment i, all of one length.

    counts: elements of work per segment where that is not the length.
    """
    if counts is None:
        counts = np.array([row[0].numel() for row in rows], dtype=np.int64)
    firsts = np.concatenate([[0], np.cumsum((counts + CHUNK - 1) // CHUNK)])
    table = np.empty((len(rows), HEAD + len(rows[0])), dtype=np.int64)
    table[:, 0], table[:, 1] = counts, firsts[:-1]
    table[:, HEAD:] = [[tensor.data_ptr() for tensor in row] for row in rows]
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(firsts))
    device = rows[0][0].device
    members = upload(np.array(indices, dtype=np.int64), device)
    return Group(
        indices, members, upload(table, device), upload(owners, device), int(firsts[-1]), firsts
    )


class Groups:
    """`group` of some of the rows, made once for each choice of them."""

    def __init__(self, rows: Sequence[Sequence[torch.Tensor]]) -> None:
        self._rows = rows
        self._made: dict[tuple[int, ...], Group] = {}

    def of(self, members: list[int]) -> Group:
        key = tuple(members)
        if key not in self._made:
            self._made[key] = group(members, [self._rows[i] for i in members])
        return self._made[key]


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Does not wait for the stream, as a copy from memory that is not pinned would: the next launch
    is prepared while the last one runs.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def partition(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """Positions by equal key, in order of first appearance."""
    found: dict[Any, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return found


def runs(members: Sequence[int], needs: Sequence[int], room: int) -> Iterator[list[int]]:
    """The members in runs of neighbours whose needs together fit the room, or a single one."""
    some: list[int] = []
    left = room
    for member, need in zip(members, needs, strict=True):
        if some and need > left:
            yield some
            some, left = [], room
        some.append(member)
        left -= need
    if some:
        yield some


def aligned(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all begin where 16 bytes are read at once."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def codes(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Their element types as the kernels name them: `CODES`."""
    return tuple(CODES[tensor.dtype] for tensor in tensors)


def per_lane(inputs: int) -> int:
    """Elements of one step that a lane takes: with more than 8 inputs in registers, half as many,
    or the registers spill.
    """
    return 16 if inputs <= 8 else 8


def register_limit(inputs: int) -> int:
    """Registers of a thread: enough that nothing spills, on sm_80 to sm_100, triton 3.6 to 3.9."""
    return 128 if inputs <= 8 else MOST_REGISTERS


def lanes() -> int:
    """Threads of one program."""
    return WARPS * (64 if torch.version.hip else 32)


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    *args: object,
    registers: int | None = None,
    fused: bool = False,
    **meta: object,
) -> None:
    """Runs ``programs`` programs on the tensors' device; multiply and add only ``fused`` if asked.

    registers: the most that a thread of an NVIDIA GPU may use. Left to itself ptxas sometimes
    spills four bytes to reach the next occupancy, which a kernel bound by memory has no use for.
    """
    if not programs:
        return
    if registers and not torch.version.hip:
        meta["maxnreg"] = registers
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with _LAUNCHING, on_device:
        try:
            kernel[(programs,)](*args, **meta, num_warps=WARPS, enable_fp_fusion=fused)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            # Triton's own, where the device has no room for the kernel's code.
            raise torch.cuda.OutOfMemoryError(str(error)) from error


def check(
    inputs: Sequence[torch.Tensor], base: torch.Tensor | None, out: torch.Tensor | None
) -> None:
    """Refuses, by name, what the kernels cannot take; see the messages."""
    if not inputs:
        raise FastmergeError("no input tensors; give at least one")
    if len(inputs) > MAX_INPUTS:
        raise UnsupportedError(
            f"{len(inputs)} inputs: the GPU kernels merge up to {MAX_INPUTS} at once"
        )
    named = [(f"input {i}", tensor) for i, tensor in enumerate(inputs)]
    named += [("base", base)] if base is not None else []
    named += [("out", out)] if out is not None else []
    first = inputs[0]
    if first.device.type != "cuda" and not interpreted():
        raise ResourceError(
            f"input 0 is on '{first.device}': the Triton kernels need a GPU; use device cpu"
        )
    for name, tensor in named:
        if tensor.dtype not in CODES or (name == "out" and tensor.dtype not in OUTPUTS):
            known = ", ".join(
                str(t).removeprefix("torch.") for t in (OUTPUTS if name == "out" else CODES)
            )
            raise UnsupportedError(
                f"{name}: cannot merge {tensor.dtype}; convert it to one of {known}"
            )
        if tensor.device != first.device:
            raise FastmergeError(
                f"{name} is on {tensor.device} and input 0 on {first.device}; "
                "move them to one device"
            )
        if tensor.numel() != first.numel():
            raise FastmergeError(
                f"{name} has {tensor.numel()} elements and input 0 has {first.numel()}; "
                "they must match"
            )
        if not tensor.is_contiguous():
            raise FastmergeError(
                f"{name} is not contiguous (strides {tuple(tensor.stride())}); "
                "call .contiguous() on it"
            )


def interpreted() -> bool:
    """Whether Triton runs its kernels in the Python interpreter (TRITON_INTERPRET=1 at import)."""
    return not NATIVE.value


def vectors(count: int, axis: int | None, rows: int, cols: int) -> int:
    """How many vectors an axis gives; FastmergeError where rows x cols is not the tensor."""
    if axis is None:
        return 1
    if axis not in (0, 1):
        raise FastmergeError(f"axis {axis}: use None, 0 (columns) or 1 (rows)")
    if rows * cols != count:
        raise FastmergeError(f"rows {rows} x cols {cols} is not the tensor's {count} elements")
    return rows if axis == 1 else cols

"""Leaves that follow from stored tensors, as fp32 numbers: codes times their scales, and a matrix
plus the product of two thin ones. The bits are those of csrc/primitives/{dequantised,low_rank}.cpp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmerge.kernels.common import CODES, E4M3, E5M2, decode, launch

MXFP4: tl.constexpr = tl.constexpr(5)
CODINGS = {"e4m3": E4M3.value, "e5m2": E5M2.value, "mxfp4": MXFP4.value}
_RAW = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # by bytes

# One program makes ROWS x COLS numbers: 32 of each thread's own, so that a row of the right factor
# is read once for eight of the output's.
ROWS, COLS = 8, 512


# --- on the device ------------------------------------------------------------------------------


@triton.jit
def tile(rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """This program's rows and columns (int64, shapes (ROWS, 1) and (1, COLS)), and which of the
    tile are inside the matrix.
    """
    pid = tl.program_id(0).to(tl.int64)
    across = (cols + COLS - 1) // COLS
    row = (pid // across) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    col = (pid % across) * COLS + tl.arange(0, COLS).to(tl.int64)[None, :]
    return row, col, (row < rows) & (col < cols)


@triton.jit
def e2m1(code):
    """Four bits to fp32: a sign, two bits of exponent, one of mantissa."""
    exponent = (code >> 1) & 3
    mantissa = (code & 1).to(tl.float32) * 0.5
    power = ((exponent + 126) << 23).to(tl.float32, bitcast=True)  # 2**(exponent - 1)
    size = tl.where(exponent == 0, mantissa, (1.0 + mantissa) * power)
    bits = size.to(tl.uint32, bitcast=True) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e8m0(code):
    """Eight bits to 2**(code - 127), the smallest of them subnormal."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    return tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def dequantise_kernel(
    codes,
    scales,
    out,
    total_rows,
    rows,
    cols,
    block_rows,
    block_cols,
    CODING: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Matrices of (rows, cols), one after another, ``total_rows`` in all; each has an fp32 scale
    for every block. MXFP4's lie as their transposes, two codes to a byte, with E8M0 scales.
    """
    row, col, inside = tile(total_rows, cols, ROWS, COLS)
    matrix = row // rows
    if CODING == MXFP4:
        place = row % rows
        stored = matrix * cols + col
        packed = tl.load(codes + stored * (rows // 2) + place // 2, inside, 0).to(tl.uint32)
        number = e2m1((packed >> ((place % 2) * 4).to(tl.uint32)) & 15)
        scale = e8m0(tl.load(scales + stored * (rows // 32) + place // 32, inside, 0).to(tl.uint32))
    else:
        number = decode(tl.load(codes + row * cols + col, inside, 0), CODING)
        band = matrix * ((rows + block_rows - 1) // block_rows) + row % rows // block_rows
        across = (cols + block_cols - 1) // block_cols
        scale = tl.load(scales + band * across + col // block_cols, inside, 0.0)
    tl.store(out + row * cols + col, number * scale, inside)


@triton.jit
def low_rank_kernel(
    base,
    left,
    right,
    out,
    rows,
    cols,
    rank,
    scale,
    CODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """base + scale * sum_k left[row, k] right[k, col]: fused multiply-adds in the order of k."""
    row, col, inside = tile(rows, cols, ROWS, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    own, of_all = left + row * rank, right + col
    for _ in range(rank):
        a = tl.broadcast_to(tl.load(own, row < rows, 0.0), [ROWS, COLS])
        b = tl.broadcast_to(tl.load(of_all, col < cols, 0.0), [ROWS, COLS])
        total = tl.fma(b, a, total)
        own += 1
        of_all += cols
    stored = decode(tl.load(base + row * cols + col, inside, 0), CODE)
    tl.store(out + row * cols + col, tl.fma(total, tl.zeros_like(total) + scale, stored), inside)


# --- on the host --------------------------------------------------------------------------------


def dequantised(
    coding: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    rows: int,
    cols: int,
    block_rows: int,
    block_cols: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 numbers, flat, of matrices of (rows, cols): each code times its block's scale.

    codes: uint8, flat; of "mxfp4" two numbers to a byte, each matrix as its transpose. scales:
    flat, of any float type, one for every (block_rows, block_cols); uint8 are E8M0.
    out: where they go, and what is returned; None for new memory.
    """
    count = codes.numel() * (2 if coding == "mxfp4" else 1)
    if out is None:
        out = torch.empty(count, dtype=torch.float32, device=codes.device)
    if coding != "mxfp4":
        codes, scales = codes.view(torch.int8), widened(scales)
    total = count // cols
    launch(
        dequantise_kernel, _programs(total, cols), codes.device, codes, scales, out, total, rows,
        cols, block_rows, block_cols, CODING=CODINGS[coding], ROWS=ROWS, COLS=COLS,
    )  # fmt: skip
    return out


def widened(scales: torch.Tensor) -> torch.Tensor:
    """Scales as fp32; those of one byte are E8M0, whose bits are fp32's exponent."""
    if scales.element_size() > 1:
        return scales.float()
    codes = scales.view(torch.uint8).int()
    bits = torch.where(codes == 0, 1 << 22, codes << 23)  # 2**-127 is subnormal
    return torch.where(codes == 255, 0x7FC00000, bits).view(torch.float32)


def low_rank(
    base: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp32 numbers, flat: ``base + scale * left @ right``, of a matrix or of several.

    base: flat, of an input type. left: fp32, ([matrices,] rows, rank). right: fp32, ([matrices,]
    rank, cols). out: as in `dequantised`; not the base.
    """
    (rows, rank), cols = left.shape[-2:], right.shape[-1]
    if out is None:
        out = torch.empty(base.numel(), dtype=torch.float32, device=base.device)
    raw = base.view(_RAW[base.element_size()])
    for number in range(base.numel() // (rows * cols)):
        part = slice(number * rows * cols, (number + 1) * rows * cols)
        own = (each if each.dim() == 2 else each[number] for each in (left, right))
        launch(
            low_rank_kernel, _programs(rows, cols), base.device, raw[part], *own, out[part], rows,
            cols, rank, scale, CODE=CODES[base.dtype], ROWS=ROWS, COLS=COLS,
        )  # fmt: skip
    return out


def _programs(rows: int, cols: int) -> int:
    return -(-rows // ROWS) * -(-cols // COLS)

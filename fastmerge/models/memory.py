"""NumPy arrays and torch tensors as the kernels see them: their memory, never copied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge import _C
from fastmerge.dtypes import BF16, BY_NAME, MERGEABLE, WITH_KERNELS, DType
from fastmerge.errors import FastmergeError, UnsupportedError

if TYPE_CHECKING:
    import torch

Extent = tuple[int, int]
_HOLD = (*(d.name for d in MERGEABLE), "float8_e4m3fn", "float8_e5m2")
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


def is_torch(tensor: Any) -> bool:
    """Whether ``tensor`` is a torch tensor; torch itself is not imported for the answer."""
    kind: Any = type(tensor)
    return _is_torch(kind)


@lru_cache(maxsize=64)
def _is_torch(kind: Any) -> bool:
    return hasattr(kind, "data_ptr") and hasattr(kind, "layout")  # a storage has only the former


def widened(tensor: Any) -> Any:
    """A float8 tensor as the bfloat16 numbers that it holds, exactly; else itself."""
    if not is_float8(tensor.dtype):
        return tensor
    if is_torch(tensor):
        import torch

        return tensor.to(torch.bfloat16)
    import ml_dtypes  # whose types NumPy's float8 are

    return tensor.astype(ml_dtypes.bfloat16)


@lru_cache
def is_float8(dtype: Any) -> bool:
    """Whether NumPy or torch means numbers of 8 bits by it, not scales."""
    return str(dtype).removeprefix("torch.") in _FLOAT8


def dtype_of(tensor: Any, where: str) -> DType:
    """The element type, one with kernels; uint16 NumPy arrays hold bfloat16 bits."""
    dtype = _named(tensor.dtype)
    if dtype is None or not dtype.kernels:
        known = ", ".join(d.name for d in WITH_KERNELS)
        if not getattr(tensor.dtype, "isnative", True):
            raise UnsupportedError(
                f"{where}: the array's bytes are in another order than this machine's; pass "
                "x.astype(x.dtype.newbyteorder('='))"
            )
        raise UnsupportedError(
            f"{where}: cannot merge {str(tensor.dtype).removeprefix('torch.')} tensors; convert "
            f"to one of {known}"
        )
    return dtype


@lru_cache  # NumPy takes 14 us to name a type, a kernel of 4096 elements 4
def _named(dtype: Any) -> DType | None:
    """The type that NumPy or torch calls ``dtype``."""
    if isinstance(dtype, np.dtype) and dtype == np.uint16:
        return BF16
    return BY_NAME.get(str(dtype).removeprefix("torch."))


_ONE_THAT_IS = "give one that is, and copy from it"  # a copy that is passed would be what is filled


def view_of(
    tensor: Any, where: str, *, writable: bool = False, dtype: DType | None = None
) -> _C.View:
    """A contiguous CPU tensor's memory; ``dtype`` where it is known to be its `dtype_of`."""
    dtype = dtype or dtype_of(tensor, where)
    if is_torch(tensor):
        if not tensor.is_contiguous():
            remedy = _ONE_THAT_IS if writable else "pass tensor.contiguous()"
            raise FastmergeError(f"{where}: the tensor is not contiguous; {remedy}")
        address, count = tensor.data_ptr(), tensor.numel()
        if count and not address:  # what FakeTensorMode makes of any tensor
            raise _no_memory(tensor, where)
        return _C.View(address, count, dtype.code, tensor)
    if isinstance(tensor, np.ma.MaskedArray):
        raise FastmergeError(f"{where}: a masked array; pass its numbers, x.filled(0)")
    if not tensor.flags.c_contiguous:
        remedy = _ONE_THAT_IS if writable else "pass np.ascontiguousarray(x)"
        raise FastmergeError(f"{where}: the array is not contiguous; {remedy}")
    if writable and not tensor.flags.writeable:
        raise FastmergeError(f"{where}: the array is read-only")
    return _C.View(tensor.ctypes.data, tensor.size, dtype.code, tensor)


def check_torch(tensor: Any, where: str) -> None:
    """Raises FastmergeError for a torch tensor that is not just its memory: reading that would give
    other numbers, or end the process.
    """
    kind: Any = type(tensor)
    strided, dispatches = _about(kind)
    if tensor.layout != strided or tensor.is_nested:
        raise UnsupportedError(f"{where}: a sparse, nested or packed tensor; pass a dense one")
    if dispatches:
        raise _no_memory(tensor, where)
    try:
        negated = tensor.is_neg() or tensor.is_conj()
        held = tensor.untyped_storage().nbytes()
    # Inside vmap and grad; ValueError: a lazy module's parameter before its first input.
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise _no_memory(tensor, where) from error
    if negated:
        raise FastmergeError(f"{where}: the tensor is a negated view; pass tensor.resolve_neg()")
    count = tensor.numel()
    if tensor.is_meta or not count or not tensor.is_contiguous():
        return
    if held < (tensor.storage_offset() + count) * tensor.element_size():
        raise FastmergeError(f"{where}: the tensor's memory has been freed")
    if not tensor.data_ptr():  # inside functionalize
        raise _no_memory(tensor, where)


def check_holds(target: Any, where: str) -> None:
    """Raises UnsupportedError where a merge's numbers would not be numbers in ``target``: torch
    cuts their fractions off for integers, without a word.
    """
    if not is_torch(target):
        if target.dtype != np.float64:
            dtype_of(target, where)
        return
    named = str(target.dtype).removeprefix("torch.")
    if named not in _HOLD:
        raise UnsupportedError(
            f"{where}: {named} holds no merged weights; give a tensor of {', '.join(_HOLD)}"
        )


@lru_cache(maxsize=64)  # to import torch again takes a fifth of all the checks
def _about(kind: Any) -> tuple[Any, bool]:
    """torch's layout of dense tensors, and whether a class of tensors answers torch's operations
    itself.
    """
    import torch

    own = getattr(kind, "__torch_dispatch__", None)
    return torch.strided, own not in (None, torch.Tensor.__torch_dispatch__)


def _no_memory(tensor: Any, where: str) -> FastmergeError:
    if type(tensor).__name__ == "Tensor":
        return FastmergeError(
            f"{where}: a tensor inside torch.func's transforms (vmap, grad, functionalize) has no "
            "memory of its own; call it outside them"
        )
    return FastmergeError(
        f"{where}: a {type(tensor).__name__} has no memory of its own; pass a plain tensor "
        "(of a DTensor: to_local() or full_tensor())"
    )


def is_result(tensor: Any) -> bool:
    """Whether torch has recorded how a tensor was computed: its gradient would go on to that after
    it is overwritten, too.
    """
    import torch

    return torch.is_grad_enabled() and getattr(tensor, "grad_fn", None) is not None


def written(tensor: Any) -> None:
    """Tells autograd that a torch tensor has changed, as torch's own in-place operations do."""
    import torch

    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def as_torch(array: np.ndarray[Any, Any], dtype: DType, shape: Sequence[int]) -> torch.Tensor:
    """``array``'s memory as a torch tensor of ``dtype``: through bytes, since NumPy has no
    bfloat16.
    """
    import torch

    raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return raw.view(getattr(torch, dtype.name)).reshape(tuple(shape))


def extent(tensor: Any) -> Extent:
    """First address and the one past the last, of a `_C.View` or a torch tensor."""
    if isinstance(tensor, _C.View):
        return tensor.address, tensor.address + tensor.nbytes
    begin = int(tensor.data_ptr())
    return begin, begin + tensor.numel() * tensor.element_size()


def place_of(target: Any) -> Extent:
    """`extent` of a torch tensor or an array."""
    if is_torch(target):
        return extent(target)
    begin = int(target.__array_interface__["data"][0])
    return begin, begin + target.nbytes


def check_writable(target: Any, where: str) -> None:
    """Raises FastmergeError where not every entry has memory of its own to be written to."""
    strides = target.stride() if is_torch(target) else target.strides
    if any(size > 1 and step == 0 for size, step in zip(target.shape, strides, strict=True)):
        raise FastmergeError(f"{where} repeats one memory; give it a copy (clone)")
    if isinstance(target, np.ndarray) and not target.flags.writeable:
        raise FastmergeError(f"{where} is read-only; give a copy")

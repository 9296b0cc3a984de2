"""The protocol of the primitives, and the back end of a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from fastmerge.errors import UnsupportedError
from fastmerge.methods.shapes import Float32
from fastmerge.methods.types import Float64
from fastmerge.primitives import WHOLE, Agreement, Vectors
from fastmerge.selection import Selection, Sparsify

T = TypeVar("T")  # a back end's tensor
O = TypeVar("O", contravariant=True)  # noqa: E741  a back end's output


class Backend(Protocol[T, O]):
    """The four primitives with the meaning of ``_C.pyi``; CPU and Triton implement it."""

    @property
    def name(self) -> str: ...

    def gram(
        self, inputs: Sequence[T], base: T | None = None, vectors: Vectors = WHOLE
    ) -> Float64: ...

    def combine(
        self,
        inputs: Sequence[T],
        coefficients: Float64,
        out: O,
        *,
        divisor: float | None = None,
        vectors: Vectors = WHOLE,
    ) -> int: ...

    def select(
        self, inputs: Sequence[T], base: T, specs: Sequence[Sparsify]
    ) -> list[Selection]: ...

    def consensus(
        self,
        inputs: Sequence[T],
        base: T,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: O,
        agreement: Agreement,
    ) -> int: ...

    def scratch(self, count: int) -> tuple[T, Any]:
        """An fp32 tensor of ``count`` elements, as input and as output, for intermediates."""
        ...

    def array(self, tensor: T) -> Float32:
        """The numbers of a tensor, flat, to read only: what Python functions take."""
        ...

    def tensor(self, array: Float32) -> T:
        """A contiguous array as one of the back end's tensors."""
        ...


def triton(where: str, device: str) -> Any:
    """The Triton back end of a torch device; FastmergeError naming ``where`` if it has none."""
    if not device.startswith("cuda"):
        raise UnsupportedError(
            f"{where}: no kernels for device '{device}'; use CPU or CUDA tensors"
        )
    from fastmerge.kernels.backend import TritonBackend

    return TritonBackend(device)

"""The protocol of the primitives, and the back end of a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from fastmerge.errors import UnsupportedError
from fastmerge.methods.types import Float64
from fastmerge.primitives import WHOLE, Agreement, Vectors
from fastmerge.selection import Selection, Sparsify
from fastmerge.tree.nodes import Merge, Node

T = TypeVar("T")  # a back end's tensor
O = TypeVar("O", contravariant=True)  # noqa: E741  a back end's output


class Backend(Protocol[T, O]):
    """The four primitives; what each computes, bit for bit, is said in ``_C.pyi``.
    Back ends that take `fastmerge.methods.Pointwise` merges have `Primitives` besides.

    A tensor T holds one contiguous run of fp32, fp16 or bf16 elements; those of one call, the base
    among them, have the same number of elements and any mix of types. O is where as many elements
    of one type are written, which may be the memory of an input. Numbers go in as float64 and are
    rounded to fp32, but for wide sums. What does not fit together raises ValueError or
    FastmergeError; callers that answer to users check first. In `compute.doubles` all is float64.
    """

    @property
    def name(self) -> str:
        """As reports say it: "cpu", "triton"."""
        ...

    def takes(self, node: Merge, parts: Sequence[Node], /) -> str | None:
        """Why it cannot compute ``node`` from ``parts`` (see `compute.tensor.Step.taken`), as the
        end of a sentence about the tensor; None where it can.
        """
        ...

    def gram(self, inputs: Sequence[T], base: T | None = None, vectors: Vectors = WHOLE) -> Float64:
        """Inner products, float64 of shape (m, m), or with an axis (vectors.count, m, m): of the m
        inputs, or of [base, x_1 - base, ..., x_(m-1) - base].
        """
        ...

    def combine(
        self,
        inputs: Sequence[T],
        coefficients: Float64,
        out: O,
        *,
        divisor: float | None = None,
        vectors: Vectors = WHOLE,
        wide: bool = False,
    ) -> int:
        """out = sum_i coefficients[..., i] x_i, over ``divisor`` if there is one; ``wide``: in
        float64, without a divisor. Coefficients: (k,) of k inputs, or with an axis (vectors.count,
        k). Returns how many outputs are NaN or infinite.
        """
        ...

    def select(self, inputs: Sequence[T], base: T, specs: Sequence[Sparsify]) -> list[Selection]:
        """Which entries of each delta x_i - base survive: an answer to each of the k requests."""
        ...

    def consensus(
        self,
        inputs: Sequence[T],
        base: T,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: O,
        agreement: Agreement,
    ) -> int:
        """out = base + what the k deltas x_i - base, thinned and weighted, agree on. Returns how
        many outputs are NaN or infinite.
        """
        ...

    def is_fp32(self, out: O) -> bool:
        """Whether fp32 is written there."""
        ...

    def scratch(self, count: int) -> tuple[T, Any]:
        """An fp32 tensor of ``count`` elements, as input and as output, for intermediates."""
        ...

    def array(self, tensor: T) -> NDArray[Any]:
        """The numbers of a tensor, flat, to read only, in the type of the arithmetic: what Python
        functions take.
        """
        ...

    def tensor(self, array: NDArray[Any]) -> T:
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

"""The Triton back end: the primitives behind the protocol that fastmerge.compute calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge.kernels import combine, consensus, divergence, gram, select
from fastmerge.kernels.common import MAX_INPUTS
from fastmerge.kernels.pointwise import Computed, held
from fastmerge.primitives import WHOLE, Agreement, Vectors
from fastmerge.selection import ALL, Selection, Sparsify


class TritonBackend:
    """Contiguous torch tensors of one device, as inputs and as outputs."""

    name = "triton"
    kind = np.float32

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    @staticmethod
    def takes(node: Any, parts: Sequence[Any], /) -> str | None:
        if not node.method.on_gpu:
            return f"is merged by {node.method.name}, which has no GPU kernel"
        most = MAX_INPUTS - node.method.beside
        if len(parts) > most:
            return f"has {len(parts)} inputs and the GPU kernels take {most}"
        return None

    def gram(
        self,
        inputs: Sequence[torch.Tensor | Computed],
        base: torch.Tensor | Computed | None = None,
        vectors: Vectors = WHOLE,
    ) -> NDArray[np.float64]:
        of = None if base is None else held(base)
        return gram.gram([held(x) for x in inputs], of, **vars(vectors))

    def combine(
        self,
        inputs: Sequence[torch.Tensor | Computed],
        coefficients: NDArray[np.float64],
        out: torch.Tensor,
        *,
        divisor: float | None = None,
        vectors: Vectors = WHOLE,
        wide: bool = False,
    ) -> int:
        whole = len(inputs) == 1 and vectors.axis is None and divisor is None
        if whole and isinstance(inputs[0], Computed) and coefficients[0] == 1:
            return inputs[0].into(out)
        tensors = [held(x) for x in inputs]
        return combine.combine(
            tensors, coefficients, out, divisor=divisor, wide=wide, **vars(vectors)
        )

    def select(
        self,
        inputs: Sequence[torch.Tensor | Computed],
        base: torch.Tensor | Computed,
        specs: Sequence[Sparsify],
    ) -> list[Selection]:
        if all(spec.kind == ALL for spec in specs):  # nothing to find
            return [Selection(kept=tensor.numel()) for tensor in inputs]
        tensors = {id(x): held(x) for x in inputs}  # several requests may be of one
        return select.select([tensors[id(x)] for x in inputs], held(base), specs)

    def consensus(
        self,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: torch.Tensor,
        agreement: Agreement,
    ) -> int:
        return consensus.consensus(inputs, base, weights, selections, out, **vars(agreement))

    def pointwise(
        self,
        formula: str,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor,
        numbers: Sequence[float] = (),
        *,
        selection: Selection | None = None,
        factors: NDArray[np.float64] | None = None,
        origin: int = 0,
        cols: int = 0,
    ) -> Computed:
        """``origin``, ``cols``: of a piece, its first flat index and the elements of a factor."""
        if factors is not None and not cols:
            cols = base.numel() // len(factors)
        return Computed(formula, inputs, base, numbers, selection, factors, origin, cols or 1)

    def divergences(self, x: torch.Tensor, base: torch.Tensor, cols: int) -> NDArray[np.float64]:
        return divergence.divergences(x, base, cols)

    @staticmethod
    def is_fp32(out: torch.Tensor) -> bool:
        return out.dtype == torch.float32

    def scratch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = torch.empty(count, dtype=torch.float32, device=self.device)
        return tensor, tensor

    def array(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        made: NDArray[np.float32] = tensor.detach().cpu().float().numpy().reshape(-1)
        return made

    def tensor(self, array: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

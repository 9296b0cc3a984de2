"""The Triton back end: the four primitives behind the protocol that fastmerge.compute calls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge.kernels import combine, consensus, gram, select
from fastmerge.selection import ALL, Selection, Sparsify


class TritonBackend:
    """Contiguous torch tensors of one device, as inputs and as outputs."""

    name = "triton"

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    def gram(
        self,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        *,
        axis: int | None,
        rows: int,
        cols: int,
    ) -> NDArray[np.float64]:
        return gram.gram(inputs, base, axis=axis, rows=rows, cols=cols)

    def combine(
        self,
        inputs: Sequence[torch.Tensor],
        coefficients: NDArray[np.float64],
        out: torch.Tensor,
        *,
        divisor: float | None,
        axis: int | None,
        rows: int,
        cols: int,
    ) -> int:
        return combine.combine(
            inputs, coefficients, out, divisor=divisor, axis=axis, rows=rows, cols=cols
        )

    def select(
        self, inputs: Sequence[torch.Tensor], base: torch.Tensor, specs: Sequence[Sparsify]
    ) -> list[Selection]:
        if all(spec.kind == ALL for spec in specs):  # nothing to find
            return [Selection(kept=tensor.numel()) for tensor in inputs]
        return select.select(inputs, base, specs)

    def consensus(
        self,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor,
        weights: Sequence[float],
        selections: Sequence[Selection],
        out: torch.Tensor,
        *,
        elect: bool,
        normalize: bool,
        scale: float,
        origin: int = 0,
    ) -> int:
        return consensus.consensus(
            inputs,
            base,
            weights,
            selections,
            out,
            elect=elect,
            normalize=normalize,
            scale=scale,
            origin=origin,
        )

    def scratch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = torch.empty(count, dtype=torch.float32, device=self.device)
        return tensor, tensor

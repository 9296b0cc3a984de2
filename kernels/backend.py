"""The Triton back end: the four primitives behind the protocol that fastmerge.compute calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastmerge.kernels import combine, consensus, gram, select
from fastmerge.kernels.common import MAX_INPUTS
from fastmerge.primitives import WHOLE, Agreement, Vectors
from fastmerge.selection import ALL, Selection, Sparsify


class TritonBackend:
    """Contiguous torch tensors of one device, as inputs and as outputs."""

    name = "triton"

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    @staticmethod
    def takes(node: Any, parts: Sequence[Any], /) -> str | None:
        if not node.method.on_gpu:
            return f"is merged by {node.method.name}, which has no GPU kernel"
        if node.method.ranks(node.values, node.operand_values):
            return f"is merged by {node.method.name}, whose ranks in rows the GPU does not take"
        if len(parts) > MAX_INPUTS:
            return f"has {len(parts)} inputs and the GPU kernels take {MAX_INPUTS}"
        return None

    def gram(
        self,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor | None = None,
        vectors: Vectors = WHOLE,
    ) -> NDArray[np.float64]:
        return gram.gram(inputs, base, **vars(vectors))

    def combine(
        self,
        inputs: Sequence[torch.Tensor],
        coefficients: NDArray[np.float64],
        out: torch.Tensor,
        *,
        divisor: float | None = None,
        vectors: Vectors = WHOLE,
    ) -> int:
        return combine.combine(inputs, coefficients, out, divisor=divisor, **vars(vectors))

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
        agreement: Agreement,
    ) -> int:
        return consensus.consensus(inputs, base, weights, selections, out, **vars(agreement))

    def scratch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = torch.empty(count, dtype=torch.float32, device=self.device)
        return tensor, tensor

    def array(self, tensor: torch.Tensor) -> NDArray[np.float32]:
        made: NDArray[np.float32] = tensor.detach().cpu().float().numpy().reshape(-1)
        return made

    def tensor(self, array: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

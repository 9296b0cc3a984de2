"""Merges of tensors as one writes them in plain torch: what `fastmerge.ops` is compared with, and
whole models merged by a loop over safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TRIMS = ("topk", "kthvalue", "sort")
DRAWS = ("rand", "bernoulli")


def linear(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """In fp32, rounded once."""
    total = tensors[0].float() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.float(), alpha=weight)
    return total.div_(sum(weights)).to(tensors[0].dtype)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float, *, wide: bool) -> torch.Tensor:
    """Shoemake 1985, in three passes of reduction and two of sums."""
    import torch

    x, y = (a.float(), b.float()) if wide else (a, b)
    norms = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    product = torch.dot(x.flatten(), y.flatten())
    angle = torch.acos((product / norms).clamp(-1, 1).double()).item()
    sine = math.sin(angle)
    if sine < 1e-6:  # of one direction, as norms that training left alone are
        return (x * (1 - t)).add_(y, alpha=t).to(a.dtype)
    first, second = math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine
    return (x * first).add_(y, alpha=second).to(a.dtype)


def trimmed(delta: torch.Tensor, density: float, how: str) -> torch.Tensor:
    """The larger entries of a flat delta, by one of torch's ways to a threshold."""
    import torch

    size, keep = delta.abs(), max(1, int(density * delta.numel()))
    if how == "topk":
        kept = torch.zeros_like(delta)
        places = torch.topk(size, keep, sorted=False).indices
        return kept.scatter_(0, places, delta[places])
    if how == "kthvalue":
        threshold = torch.kthvalue(size, delta.numel() - keep + 1).values
    else:
        threshold = torch.sort(size, descending=True).values[keep - 1]
    return delta * (size >= threshold)


def ties(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float,
    how: str,
) -> torch.Tensor:
    """Yadav et al. 2023, in mergekit's words; of flat tensors."""
    import torch

    wide = base.float()
    kept = [trimmed(x.float() - wide, density, how) for x in tuned]
    deltas = torch.stack([w * delta for w, delta in zip(weights, kept, strict=True)])
    agree = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    total = (agree * torch.tensor(weights)[:, None]).sum(0)
    merged = (deltas * agree).sum(0) / torch.where(total == 0, 1.0, total)
    return (wide + merged).to(base.dtype)


def dare_linear(
    base: torch.Tensor,
    tuned: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float,
    how: str,
) -> torch.Tensor:
    """Yu et al. 2023, with the L1 norm restored as in mergekit; of flat tensors."""
    import torch

    wide = base.float()
    total = wide.clone()
    for weight, x in zip(weights, tuned, strict=True):
        delta = x.float() - wide
        if how == "rand":
            kept = delta * (torch.rand_like(delta) < density)
        else:
            kept = delta * torch.empty_like(delta).bernoulli_(density)
        total.add_(kept, alpha=weight * float(delta.abs().sum() / kept.abs().sum()))
    return total.to(base.dtype)


# What the loop over a whole model has: the tensors of each name, the base first where there is one.
WHOLE: dict[str, Callable[[list[torch.Tensor], list[float], float, float], torch.Tensor]] = {
    "linear": lambda x, weights, density, t: linear(x, weights),
    "slerp": lambda x, weights, density, t: slerp(x[0], x[1], t, wide=True),
    "ties": lambda x, weights, density, t: ties(x[0], x[1:], weights, density, "kthvalue"),
    "dare_linear": lambda x, weights, density, t: dare_linear(
        x[0], x[1:], weights, density, "rand"
    ),
}

"""A differentiable stand-in for a score: how unlikely the right answers are, and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Target(NamedTuple):
    """What is given and what should follow, as token ids, at the head of a share of the loss."""

    given: Sequence[int]
    asked: Sequence[int]
    share: float  # of the loss; those of all targets add up to 1


@runtime_checkable
class Differentiable(Protocol):
    """A scorer that can say which continuations it would like."""

    def targets(self, model: Any, split: str, limit: int | None = None) -> list[Target]:
        """The right answers of the items of ``split``, each task with the same share."""


def gradients(model: Any, targets: Sequence[Target]) -> tuple[float, Mapping[str, Any]]:
    """The mean over tasks and items of the negative log-likelihood of a target's token (nats), and
    its gradient by every parameter that has one, by name: one forward and one backward pass.
    """
    import torch

    model.requires_grad_(True)
    total = 0.0
    try:
        for given, asked, share in targets:
            ids = torch.tensor([[*given, *asked]], device=model.device)
            keep = len(asked) + 1  # the last given token's logits say the first asked
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, :-1]
            loss: Any = torch.nn.functional.cross_entropy(logits.float(), ids[0, -len(asked) :])
            (share * loss).backward()
            total += share * float(loss.detach())
        found = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    finally:
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None
    return total, found

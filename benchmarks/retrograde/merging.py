"""Merges of whole models in memory: a candidate's description in, merged weights out.

Every merge runs fastmerge's own kernels (``fastmerge.ops``), tensor by tensor. A candidate is plain
data, so a result file says exactly what was merged. In a *walk* every step mixes the state with one
other model; ``weights`` of a walk are its effective weights, exact when its steps are linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from fastmerge import ops

State = dict[str, torch.Tensor]
Method = Literal["linear", "slerp", "task_arithmetic", "ties", "dare_ties", "model_stock"]


@dataclass(frozen=True)
class OneShot:
    """One merge. SLERP takes two models, in order; Model Stock ignores the weights' values."""

    method: Method
    weights: Mapping[str, float]
    density: float = 1.0
    scale: float = 1.0  # lambda: factor on the merged delta
    normalize: bool = False
    seed: int = 0

    def record(self) -> dict[str, Any]:
        return {"kind": "one_shot", **asdict(self)}


@dataclass(frozen=True)
class Step:
    """Degrade toward ``partner`` by ``degrade``, then retrace toward the start by ``retrace``."""

    partner: str
    degrade: float
    retrace: float


@dataclass(frozen=True)
class Walk:
    """A retrograde schedule. With ``decoy`` each partner is replaced by the start plus Gaussian
    noise that has, per tensor, the norm of the partner's difference from the start. With
    ``moving_base`` a step's deltas are taken from the state it starts from.
    """

    method: Method
    start: str
    steps: tuple[Step, ...]
    density: float = 1.0
    seed: int = 0
    decoy: bool = False
    moving_base: bool = False

    @property
    def weights(self) -> dict[str, float]:
        """The one linear merge that this walk is, or stands beside: weights that sum to 1."""
        weights = {self.start: 1.0}
        for step in self.steps:
            weights = {name: w * (1 - step.degrade) for name, w in weights.items()}
            weights[step.partner] = weights.get(step.partner, 0.0) + step.degrade
            weights = {name: w * (1 - step.retrace) for name, w in weights.items()}
            weights[self.start] += step.retrace
        return weights

    def record(self) -> dict[str, Any]:
        return {"kind": "walk", **asdict(self), "effective_weights": self.weights}


Candidate = OneShot | Walk


def merge(candidate: Candidate, models: Mapping[str, State], base: str) -> State:
    """Return the merged weights, fp32. ``base`` names the model that deltas are taken from."""
    if isinstance(candidate, OneShot):
        states = [models[name] for name in candidate.weights]
        return _merge_states(candidate, list(candidate.weights.values()), states, models[base])
    start = models[candidate.start]
    state = start
    for index, step in enumerate(candidate.steps):
        partner = models[step.partner]
        if candidate.decoy:
            partner = decoy(start, partner, candidate.seed + index)
        for place, (other, t) in enumerate(((partner, step.degrade), (start, step.retrace))):
            one = OneShot(
                candidate.method,
                {},
                density=candidate.density,
                seed=candidate.seed + 2 * index + place,
            )
            if candidate.moving_base:
                state = _merge_states(one, [t], [other], state)
            else:
                state = _merge_states(one, [1 - t, t], [state, other], models[base])
    return state


def _merge_states(
    how: OneShot, weights: Sequence[float], states: Sequence[State], base: State
) -> State:
    return {
        name: _merge_tensor(how, weights, [state[name] for state in states], base[name], name)
        for name in base
    }


def _merge_tensor(
    how: OneShot,
    weights: Sequence[float],
    tensors: Sequence[torch.Tensor],
    base: torch.Tensor,
    name: str,
) -> torch.Tensor:
    if how.method == "linear":
        return ops.linear(tensors, weights, normalize=how.normalize)
    if how.method == "slerp":
        return ops.slerp(tensors[0], tensors[1], weights[1] / sum(weights))
    if how.method == "model_stock":
        return ops.model_stock(base, tensors)
    if how.method == "task_arithmetic":
        return ops.task_arithmetic(base, tensors, weights)
    sparse = {
        "density": how.density,
        "lambda_": how.scale,
        "normalize": how.normalize,
    }
    if how.method == "ties":
        return ops.ties(base, tensors, weights, **sparse)
    return ops.dare_ties(base, tensors, weights, **sparse, seed=how.seed, name=name)


def decoy(start: State, partner: State, seed: int) -> State:
    """Return start + noise, per tensor of the same norm as partner - start."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in start.items():
        noise = torch.randn(tensor.shape, generator=generator)
        norm = torch.linalg.vector_norm(partner[name] - tensor)
        result[name] = tensor + noise * (norm / torch.linalg.vector_norm(noise))
    return result

"""Score a model by teacher-forced exact match, which equals greedy decoding of the answer.

An answer is right when every one of its characters, and the newline that ends it, is the argmax
given the right characters before it; greedy decoding emits it under the same condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import data
import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

BATCH = 256


@dataclass(frozen=True)
class Items:
    """One split of every scored skill."""

    split: str
    skills: Mapping[str, data.Lines]

    @classmethod
    def draw(cls, skills: Sequence[str], split: str, per_skill: int, seed: int) -> Items:
        return cls(
            split,
            {s: data.draw(s, split, per_skill, seed, distinct=True) for s in skills},
        )


@dataclass(frozen=True)
class Score:
    """Per item and skill: right or not, shape (skills, items) bool; per skill: exp(-NLL)."""

    right: np.ndarray
    likelihood: np.ndarray

    @property
    def accuracy(self) -> float:
        """Mean exact match over skills, in percent."""
        return 100 * float(self.right.mean())

    @property
    def key(self) -> tuple[float, float]:
        """What candidates are ranked by: accuracy, ties by the bounded likelihood."""
        return self.accuracy, float(self.likelihood.mean())


@torch.no_grad()
def score(model: LlamaForCausalLM, items: Items) -> Score:
    right, likelihood = [], []
    for lines in items.skills.values():
        ids = torch.from_numpy(lines.ids)
        target = ids[:, -lines.answer :]
        logits = torch.cat(
            [
                model(
                    input_ids=ids[i : i + BATCH, :-1],
                    use_cache=False,
                    logits_to_keep=lines.answer,
                ).logits
                for i in range(0, len(ids), BATCH)
            ]
        )
        right.append((logits.argmax(-1) == target).all(1).numpy())
        nll = functional.cross_entropy(logits.flatten(0, 1), target.flatten()).item()
        likelihood.append(np.exp(-nll))
    return Score(np.stack(right), np.array(likelihood))

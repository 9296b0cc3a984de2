"""Where a state lies: lengths, angles, and the one merge nearest to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastmerge.evaluation.scores import a_number


@dataclass(frozen=True)
class Geometry:
    """Where a state lies: lengths of weight vectors, angles in degrees.

    ``angles``: between the state's delta and each model's, to the run's origin (base_model, else
    the baseline); for a state at the origin itself, and only then, their distances instead.
    """

    norm: float  # of the state's difference to the baseline
    relative_norm: float  # that, divided by the baseline's own norm
    angle: float  # between the state and the baseline
    angles: Mapping[int, float]
    # The weights of the linear merge of whole models that lies nearest to the state (one number a
    # model, by least squares over all weights), and what remains of ``norm``.
    one_shot: tuple[float, ...]
    residual: float

    def as_json(self) -> dict[str, Any]:
        """Plain values; from_json is the inverse."""
        values = asdict(self)
        values["angles"] = {str(index): value for index, value in self.angles.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Geometry:
        """From as_json's values. Raises what Python does, or ValueError, for others."""
        lengths = ("norm", "relative_norm", "angle", "residual")
        return cls(
            **{name: a_number(values[name]) for name in lengths},
            angles={int(index): a_number(value) for index, value in values["angles"].items()},
            one_shot=tuple(map(a_number, values["one_shot"])),
        )


def angle(inner: float, a: float, b: float) -> float:
    """The angle in degrees between vectors of squared lengths a and b; NaN when one is zero."""
    if a <= 0 or b <= 0:
        return float("nan")
    return float(np.degrees(np.arccos(np.clip(inner / np.sqrt(a * b), -1.0, 1.0))))


def small_angle(cross: float, delta: float, baseline: float, state: float) -> float:
    """The angle in degrees between x and x + d, by its tangent: exact for small d."""
    if baseline <= 0 or state <= 0:
        return float("nan")
    area = np.sqrt(max(baseline * delta - cross * cross, 0.0))
    return float(np.degrees(np.arctan2(area, baseline + cross)))

"""What the arguments of `fastmerge.ops` may be besides tensors and single numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from numpy.typing import NDArray

Numbers = Sequence[float] | NDArray[Any]
"""One number for each tensor, as a list or as an array of one axis."""

Votes = Literal["weighted", "plain", "frequency"]
"""What elects a sign: the sum of the weighted deltas, of the deltas, or of their signs."""

Divisor = Literal["weights", "count"]
"""What ``normalize`` divides by: the sum of the weights that took part, or how many did."""

Rescale = bool | Literal["l1", "density", "none"]
"""True is "l1": what stays is scaled to the L1 norm from before; "density": divided by the density;
False is "none"."""

EqualMagnitudes = Literal["mixed", "index", "all"]
"""Which of equal magnitudes stay at the threshold: some, spread evenly; those of lowest index; or
all of them."""

How = Literal["magnitude", "random", "rank"]
"""How `prune` picks entries."""

Given = dict[str, Any]

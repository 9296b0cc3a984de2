"""What a sparse merge keeps of each delta: the request (`Sparsify`) and the answer (`Selection`).

The CPU, Triton and reference back ends share them. ``kind`` is one of ALL, MAGNITUDE,
RANDOM, RANKED; ``tie_rule`` one of MIXED, INDEX, EVERY.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

ALL, MAGNITUDE, RANDOM, RANKED = 0, 1, 2, 3
MIXED, INDEX, EVERY = 0, 1, 2


class Sparsify(NamedTuple):
    """A request: which entries of one delta shall survive.

    MAGNITUDE keeps exactly the ``keep`` largest |delta| (fp32, NaN counts as largest) after the
    ``skip`` largest of all, which are dropped. Of entries that tie, those of smallest *mixed index*
    (MIXED) or smallest flat index (INDEX) count as larger; EVERY takes all that tie with the last,
    more than ``keep``, and spares the search among them and the count (`Selection.kept` stays
    ``keep``). RANDOM keeps element i when word i%4 of
    Philox4x32-10 at counter i//4 under ``key`` is below ``keep_below``. RANKED does so with a
    bound that rises with the entry's rank in its vector, evenly from ``keep_below`` for the
    smallest magnitude to ``keep_below_top`` for the largest (`rank_bound`). A vector is ``length``
    elements that lie ``stride`` apart, in slices of ``length * stride``; in it entries that tie
    rank by the mixed index of their position, the smallest highest, and every NaN ties with
    every other. ``rescale`` asks for the L1 factor sum|delta| / sum|kept delta|.
    """

    kind: int = ALL
    keep: int = 0
    tie_rule: int = MIXED
    keep_below: int = 0  # 0 ... 2**32
    key: int = 0  # 64 bits
    rescale: bool = False
    skip: int = 0
    keep_below_top: int = 0  # keep_below ... 2**32
    length: int = 0
    stride: int = 1


class Selection(NamedTuple):
    """The answer for one delta: everything `consensus` needs to decide each entry on its own.

    MAGNITUDE: entry i survives when |delta_i| > threshold, or |delta_i| == threshold and
    order(i) < tie_bound, unless the same holds of the ceiling and its bound; where order is the
    mixed index (defined by `compute.reference`'s ``mixed_indices``) or the flat index. Magnitudes
    are compared as the 31-bit patterns of fp32, so NaN is above infinity. RANKED: entry i survives
    when bit i % 32 of the mask's word i // 32 is set. Of float64 deltas all is float64's instead.
    """

    kind: int = ALL
    threshold_bits: int = 0  # bit pattern of the fp32 threshold, sign bit clear
    tie_bound: int | None = None  # 64 bits; None keeps every tied entry
    tie_rule: int = MIXED
    keep_below: int = 0
    key: int = 0
    rescale: float = 1.0  # multiplied in after the mask, in fp32
    kept: int = 0
    ceiling_bits: int = 0x7FFFFFFF  # with a bound of 0 nothing is above it
    ceiling_bound: int | None = 0
    mask: Any = None  # a tensor of the back end, whose elements are taken as 32-bit words

    @classmethod
    def asked(cls, spec: Sparsify, kept: int) -> Selection:
        """As far as it follows from the request alone."""
        return cls(
            spec.kind, tie_rule=spec.tie_rule, keep_below=spec.keep_below, key=spec.key, kept=kept
        )


def random_key(seed: int, tensor: str, model: int) -> int:
    """The 64-bit Philox key of one delta: of recipe seed, output tensor and model position."""
    text = f"{seed}\0{tensor}\0{model}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def keep_below(density: float) -> int:
    """The bound under which a random 32-bit word keeps its entry: round(density * 2**32)."""
    return min(1 << 32, max(0, round(density * (1 << 32))))


def rank_bound(spec: Sparsify, rank: int) -> int:
    """Under which word RANKED keeps the entry of this rank, 0 being the smallest magnitude's."""
    last = spec.length - 1
    if not last:  # alone in its vector
        return (spec.keep_below + spec.keep_below_top) // 2
    return spec.keep_below + (rank * (spec.keep_below_top - spec.keep_below) + last // 2) // last


def band_counts(density: float, gamma: float, count: int) -> tuple[int, int]:
    """How many of ``count`` entries breadcrumbs keeps, and how many larger ones it drops:
    int(density * count), and int(gamma * count) or as many as leave that number.

    The products are Python doubles, as in mergekit 0.1.5 (sparsify.py); none may be kept.
    """
    keep = int(density * count)
    return keep, min(int(gamma * count), count - keep)


def keep_count(density: float, count: int) -> int:
    """How many of ``count`` entries a trim to ``density`` keeps: int(density * count), at least 1
    but for a density of 0.

    The product is a Python double, as in mergekit 0.1.5 (sparsify.py).
    """
    return min(count, max(1, int(density * count))) if count and density else 0

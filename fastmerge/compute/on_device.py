"""Leaves on a GPU: stored tensors as they are, all others as the fp32 numbers that kernels make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fastmerge.compute.leaves import factors_of, lengthened, matrices, turned
from fastmerge.tree.nodes import Dequantised, Leaf, LowRank, Node, Stored, walk

if TYPE_CHECKING:
    from torch import Tensor

    from fastmerge.kernels.backend import TritonBackend

_ALIGNED = 64  # numbers: 256 bytes, as torch aligns what it allocates


class OnDevice:
    """The leaves of some trees as tensors of one device, by leaf.

    What is stored is held, each tensor once: a base's, codes and scales, an adapter's thin factors.
    The numbers that follow from it lie in scratch memory, where `make` puts them until somebody
    else uses that.
    """

    def __init__(
        self,
        leaves: Iterable[Leaf],
        fetch: Callable[[Stored], Tensor],
        backend: TritonBackend,
        scratch: Tensor | None = None,
    ) -> None:
        """fetch: a stored tensor on the device; uint8 of a type without kernels. scratch:
        `made_count` fp32 numbers or more, flat; by default its own.
        """
        self._backend = backend
        self._tensors: dict[Leaf, Tensor] = {}
        # Codes and scales; or, in fp32, the factors to multiply, left and right.
        self._parts: dict[Leaf, tuple[Tensor, Tensor]] = {}
        self._magnitudes: dict[LowRank, Tensor] = {}
        self._lengthening: dict[LowRank, Tensor] = {}  # what DoRA multiplies vectors by
        chain = _chain(leaves)
        for leaf in chain:
            if isinstance(leaf, Stored):
                self._tensors[leaf] = fetch(leaf)
            elif isinstance(leaf, Dequantised):
                codes, scales = fetch(leaf.codes), fetch(leaf.scales)
                coded = scales.element_size() == 1
                self._parts[leaf] = codes, scales if coded else scales.float()
            else:
                assert isinstance(leaf, LowRank)  # rows from several places are the host's to make
                self._parts[leaf] = _thin(leaf, fetch)
                if leaf.magnitude is not None:
                    self._magnitudes[leaf] = fetch(leaf.magnitude)
        count = sum(map(_room, self._parts))
        memory = backend.scratch(count)[0] if scratch is None else scratch
        begin = 0
        for leaf in self._parts:
            self._tensors[leaf] = memory[begin : begin + math.prod(leaf.shape)]
            begin += _room(leaf)

    def __getitem__(self, leaf: Leaf) -> Tensor:
        return self._tensors[leaf]

    def clear(self) -> None:
        """Lets go of the device's memory."""
        for held in (self._tensors, self._parts, self._magnitudes, self._lengthening):
            held.clear()

    def make(self, leaves: Iterable[Leaf]) -> None:
        """The numbers of those of the leaves that are not stored."""
        for leaf in _chain(leaves):
            if leaf in self._parts:
                self._make(leaf)

    def _make(self, leaf: Leaf) -> None:
        from fastmerge.kernels import leaves

        out = self._tensors[leaf]
        if isinstance(leaf, Dequantised):
            rows, cols, block = matrices(leaf.coding, leaf.shape)
            leaves.dequantised(
                leaf.coding.code, *self._parts[leaf],
                rows=rows, cols=cols, block_rows=block[0], block_cols=block[1], out=out,
            )  # fmt: skip
            return
        assert isinstance(leaf, LowRank)
        left, right = self._parts[leaf]
        leaves.low_rank(self._tensors[leaf.base], left, right, leaf.scale, out=out)
        if leaf in self._magnitudes:
            rows, cols = left.shape[0], right.shape[1]
            out.view(rows, cols).mul_(self._lengthened(leaf, out, rows, cols))

    def _lengthened(self, leaf: LowRank, summed: Tensor, rows: int, cols: int) -> Tensor:
        """What gives the sum's rows (or columns) their lengths; the same for every run."""
        if leaf not in self._lengthening:
            squares = self._backend.gram([summed], None, lengthened(leaf, rows, cols)).reshape(-1)
            factors = factors_of(self._backend.array(self._magnitudes[leaf]), squares)
            shape = (1, -1) if leaf.transposed else (-1, 1)
            self._lengthening[leaf] = self._backend.tensor(factors).view(shape)
        return self._lengthening[leaf]


def _chain(leaves: Iterable[Leaf]) -> dict[Leaf, None]:
    """The leaves and those that they are made of, each once and after those."""
    found: dict[Leaf, None] = {}
    for leaf in leaves:
        chain = [leaf]
        while isinstance(chain[-1], LowRank):
            chain.append(chain[-1].base)
        found.update(dict.fromkeys(reversed(chain)))
    return found


def _thin(leaf: LowRank, fetch: Callable[[Stored], Tensor]) -> tuple[Tensor, Tensor]:
    """`compute.leaves.thin` on the device."""
    a, b = fetch(leaf.a), fetch(leaf.b)
    stack = leaf.stack
    if stack is None or stack.one is None:
        left, right = turned(leaf, a.float(), b.float())
    else:
        own = slice(stack.one * leaf.rank, (stack.one + 1) * leaf.rank)
        right = a.reshape(leaf.a.shape)[own].float()
        left = b.reshape(leaf.b.shape)[stack.begin : stack.end, stack.one :: stack.matrices].float()
    return left.contiguous(), right.contiguous()


def _room(leaf: Leaf) -> int:
    """Numbers of scratch memory that a leaf takes."""
    return -(-math.prod(leaf.shape) // _ALIGNED) * _ALIGNED


def made_count(root: Node) -> int:
    """How many fp32 numbers of scratch memory a tree's leaves take, and what they are made of."""
    leaves = (node for node in walk(root) if isinstance(node, Leaf))
    return sum(_room(leaf) for leaf in _chain(leaves) if not isinstance(leaf, Stored))


def factor_bytes(root: Node) -> int:
    """Device memory that a tree's adapters take beyond what they store: factors and lengths."""
    leaves = (node for node in walk(root) if isinstance(node, Leaf))
    return sum(
        4 * leaf.factor_count + 8 * max(leaf.shape)
        for leaf in _chain(leaves)
        if isinstance(leaf, LowRank)
    )

"""sce and arcee_fusion against mergekit 0.1.5, entry by entry, on bf16 models and their deltas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastmerge import ops

SHAPES = [(96, 200), (300,), (64, 16, 3)]


def models(shape: tuple[int, ...]) -> list[Any]:
    draw = torch.Generator().manual_seed(5)
    base = (torch.randn(shape, generator=draw) * 0.02).bfloat16()
    moved = [torch.randn(shape, generator=draw) * 1e-3 for _ in range(3)]
    return [base.float(), *((base + delta).bfloat16().float() for delta in moved)]


def theirs(method: str, tensors: list[Any], **parameters: Any) -> Any:
    from mergekit.merge_methods.api import merge_tensors

    return merge_tensors(tensors, method, parameters=parameters, base_index=0)


@pytest.mark.parametrize("fraction", [0.7, 0.31, 0.02, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sce_keeps_the_same_entries(shape: tuple[int, ...], fraction: float) -> None:
    """As many of them, and the same but where variances tie, which topk leaves open."""
    base, *tunes = models(shape)
    kept = [
        made != base
        for made in (
            ops.sce(base, tunes, select_topk=fraction),
            theirs("sce", [base, *tunes], select_topk=fraction),
        )
    ]
    assert int(kept[0].sum()) == int(kept[1].sum())
    variance = torch.var(torch.stack([x - base for x in tunes]), dim=0, unbiased=False)
    count = int(int(torch.count_nonzero(variance)) * fraction)
    least = variance.ravel().sort(descending=True).values[max(count - 1, 0)]
    assert torch.equal(*(k[variance != least] for k in kept))


@pytest.mark.parametrize("fraction", [1.0, 0.7, 0.1])
def test_sce_without_ties(fraction: float) -> None:
    """All that is left are the weights, which mergekit sums in fp32."""
    draw = torch.Generator().manual_seed(6)
    base = torch.randn(100, 80, generator=draw)
    tunes = [base + 0.1 * torch.randn(100, 80, generator=draw) for _ in range(3)]
    ours = ops.sce(base, tunes, select_topk=fraction)
    peer = theirs("sce", [base, *tunes], select_topk=fraction)
    assert torch.allclose(ours, peer, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arcee_fusion_is_mergekits_in_float64(shape: tuple[int, ...]) -> None:
    """In fp32 mergekit's divergences, sums of about 1e-9 of terms of 1e-7, are rounding noise; up
    to a million entries its quantiles are those of all.
    """
    base, tune, *_ = models(shape)
    peer = theirs("arcee_fusion", [base.double(), tune.double()])
    ours = ops.arcee_fusion(base, tune)
    moved = int((peer != base).sum())
    assert 0 < moved < base.numel()
    assert np.array_equal(ours.numpy(), peer.float().numpy())

"""Triton kernels: the GPU versions of the four primitives. Importing this imports neither torch nor triton.

`load()` gives them under the names of the other back ends. Every kernel works on a *batch*: a table of
segments (one per tensor) that lives on the device, so that a whole model is one launch and not one per tensor.
"""

from __future__ import annotations

from types import SimpleNamespace


def load() -> SimpleNamespace:
    """gram, combine, select, consensus and their batched forms (``*_many``); imports torch and triton.

    Raises FastmergeError where either is not installed.
    """
    from fastmerge.errors import FastmergeError

    try:
        import torch  # noqa: F401
        import triton  # noqa: F401
    except ImportError as error:
        fix = "pip install 'fastmerge[gpu]'"
        raise FastmergeError(f"device cuda: {error.name} is not installed; {fix}") from error
    from fastmerge.kernels.combine import combine, combine_many
    from fastmerge.kernels.consensus import consensus, consensus_many
    from fastmerge.kernels.gram import gram, gram_many
    from fastmerge.kernels.select import select, select_many

    return SimpleNamespace(
        gram=gram,
        gram_many=gram_many,
        combine=combine,
        combine_many=combine_many,
        select=select,
        select_many=select_many,
        consensus=consensus,
        consensus_many=consensus_many,
    )

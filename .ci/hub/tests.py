"""The kernels against float64 in NumPy.

python -m pytest tests          on a GPU
TRITON_INTERPRET=1 python -m pytest tests
"""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") else "cuda"


@pytest.fixture(scope="module")
def kernels():
    """The build, as Hugging Face's package loads it: from a path, under a name of its own."""
    build = Path(__file__).resolve().parents[1] / "build" / "torch-universal"
    spec = importlib.util.spec_from_file_location("merging_under_test", build / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tensors(count, size=5000):
    values = np.random.default_rng(3).normal(size=(count, size)).astype(np.float32)
    return values, [torch.from_numpy(x).to(DEVICE) for x in values]


def test_gram_and_combine(kernels):
    values, (a, b, c) = tensors(3)
    exact = values.astype(np.float64) @ values.astype(np.float64).T
    np.testing.assert_allclose(kernels.gram([a, b, c]), exact, rtol=1e-6, atol=1e-3)
    out = torch.empty_like(a)
    kernels.combine([a, b, c], np.array([0.5, 0.25, -1.0]), out)
    wanted = 0.5 * values[0] + 0.25 * values[1] - values[2]
    np.testing.assert_allclose(out.cpu().numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_ties(kernels):
    values, (base, a, b) = tensors(3)
    keep = 1250
    chosen = kernels.select([a, b], base, [kernels.Sparsify(kernels.MAGNITUDE, keep)] * 2)
    assert [selection.kept for selection in chosen] == [keep, keep]
    out = torch.empty_like(base)
    kernels.consensus([a, b], base, [1.0, 1.0], chosen, out, elect=True, normalize=True)
    deltas = values[1:] - values[0]
    least = np.sort(np.abs(deltas), axis=1)[:, -keep]
    deltas = np.where(np.abs(deltas) >= least[:, None], deltas, 0)
    agree = (np.sign(deltas) == np.where(deltas.sum(axis=0) >= 0, 1, -1)) & (deltas != 0)
    wanted = values[0] + (deltas * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    np.testing.assert_allclose(out.cpu().numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(kernels):
    _, (a, b) = tensors(2)
    with pytest.raises(kernels.FastmergeError):
        kernels.combine([a, b[:10]], np.array([1.0, 1.0]), torch.empty_like(a))

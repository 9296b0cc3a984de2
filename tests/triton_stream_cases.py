"""``--device cuda`` from files to files, against ``--device cpu``: the same bytes.

Run by test_triton.py under Triton's interpreter, where the one device is the CPU; on a GPU, run it
there directly.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmerge import api, stream
from fastmerge.errors import FastmergeError
from fastmerge.kernels import common

INTERPRETED = common.interpreted()


@pytest.fixture
def device(monkeypatch):
    """The pipeline on this machine's GPUs, or on the CPU through the interpreter."""
    if INTERPRETED:
        monkeypatch.setattr(stream, "cuda_devices", lambda: ["cpu"])
    monkeypatch.setattr(stream, "PIECE_BYTES", 2000)  # several pieces, the last one short


def recipe(zoo, method: str) -> dict:
    base = zoo.base(layers=1)
    a, b = zoo.tune(base, "a", seed=1), zoo.tune(base, "b", seed=2, dtype="F32")
    head = {"merge_method": method, "base_model": str(base), "dtype": "bfloat16"}
    if method == "slerp":
        return head | {"parameters": {"t": 0.3}, "models": [{"model": str(m)} for m in (base, a)]}
    own = {"weight": 0.6, "density": 0.5}
    return head | {"models": [{"model": str(m), "parameters": own} for m in (a, b)], "seed": 3}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties"])
@pytest.mark.usefixtures("device")
def test_the_same_bytes_as_on_the_cpu(method, zoo, tmp_path):
    given = recipe(zoo, method)
    seed = given.pop("seed", None)
    api.merge(given, tmp_path / "cpu", seed=seed, device="cpu")
    report = api.merge(given, tmp_path / "gpu", seed=seed, device="cuda")
    assert report.backend == "triton" and not report.notes
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


@pytest.mark.usefixtures("device")
def test_what_does_not_fit_is_merged_on_the_cpu_and_said(zoo, tmp_path):
    given = recipe(zoo, "ties")
    given.pop("seed")
    api.merge(given, tmp_path / "cpu")
    report = api.merge(given, tmp_path / "gpu", device="cuda", gpu_memory=2_102_000)
    assert any("did not fit" in note and "--gpu-memory" in note for note in report.notes)
    assert not any("12 tensors" in note for note in report.notes)  # the small ones did fit
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


@pytest.mark.usefixtures("device")
def test_out_of_memory_falls_back_and_is_said(zoo, tmp_path, monkeypatch):
    given = recipe(zoo, "slerp")
    api.merge(given, tmp_path / "cpu")

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(stream._Lane, "upload", exhausted)
    report = api.merge(given, tmp_path / "gpu", device="cuda")
    assert any("did not fit" in note for note in report.notes)
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


def test_no_gpu_is_one_clear_line(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = recipe(zoo, "slerp")
    with pytest.raises(FastmergeError, match="no usable CUDA device; use --device cpu"):
        api.merge(given, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    report = api.merge(given, tmp_path / "out", device="auto")
    assert report.backend == "cpu" and any("device auto" in note for note in report.notes)


def test_auto_prefers_the_cpu_when_the_files_are_on_disk(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "cuda_devices", lambda: ["cpu"])
    monkeypatch.setattr(stream, "cached_share", lambda views: 0.1)
    report = api.merge(recipe(zoo, "slerp"), tmp_path / "out", device="auto")
    assert report.backend == "cpu" and any("on disk" in note for note in report.notes)


def test_cached_share_of_files_just_written(zoo):
    from fastmerge.checkpoint import Checkpoint

    model = Checkpoint.open(zoo.base(layers=1))
    assert stream.cached_share([model.view(name) for name in model.tensors]) == 1.0

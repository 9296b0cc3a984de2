"""``--device cuda`` from files to files, against ``--device cpu``: the same bytes.

Run by test_triton.py under Triton's interpreter, where the one device is the CPU; on a GPU, run it
there directly.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("yaml")  # recipes are read with it; the kernels' own tests need none

from fastmerge import api
from fastmerge.compute import devices, stream
from fastmerge.compute import lane as lane_module
from fastmerge.errors import FastmergeError
from fastmerge.kernels import common
from fastmerge.methods import METHODS, Function

INTERPRETED = common.interpreted()
VOCAB = 40  # conftest.py's


@pytest.fixture
def device(monkeypatch):
    """The pipeline on this machine's GPUs, or on the CPU through the interpreter."""
    if INTERPRETED:
        monkeypatch.setattr(devices, "cuda_devices", lambda: ["cpu"])
    monkeypatch.setattr(lane_module, "PIECE_BYTES", 2000)  # several pieces, the last one short


POINTWISE: dict[str, dict] = {
    "nearswap": {"t": 0.001}, "ram": {"epsilon": 0.001}, "ramplus_tl": {"epsilon": 0.001},
    "sce": {"select_topk": 0.4}, "magmax": {"lambda": 0.8}, "consensus_ta": {"agree": 1},
    "arcee_fusion": {},
}  # fmt: skip


def recipe(zoo, method: str) -> dict:
    base = zoo.base(layers=1)
    a, b = zoo.tune(base, "a", seed=1), zoo.tune(base, "b", seed=2, dtype="F32")
    head = {"merge_method": method, "base_model": str(base), "dtype": "bfloat16"}
    if method == "slerp":
        return head | {"parameters": {"t": 0.3}, "models": [{"model": str(m)} for m in (base, a)]}
    if method in POINTWISE:
        used = (a,) if method in ("nearswap", "arcee_fusion") else (a, b)
        models = [{"model": str(m)} for m in used]
        return head | {"parameters": POINTWISE[method], "models": models}
    own = {"weight": 0.6, "density": 0.5}
    return head | {"models": [{"model": str(m), "parameters": own} for m in (a, b)], "seed": 3}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "method", ["slerp", "ties", "dare_ties", "della", "della_linear", *POINTWISE]
)
@pytest.mark.usefixtures("device")
def test_the_same_bytes_as_on_the_cpu(method, zoo, tmp_path):
    given = recipe(zoo, method)
    seed = given.pop("seed", None)
    api.merge(given, tmp_path / "cpu", seed=seed, device="cpu")
    report = api.merge(given, tmp_path / "gpu", seed=seed, device="cuda")
    assert report.backend == "triton" and not report.notes
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


@pytest.mark.parametrize("method", ["slerp", "ties"])
@pytest.mark.usefixtures("device")
def test_tokenizers_are_merged_on_the_host(method, zoo, tmp_path):
    """Embeddings and head are; the layers go through the device."""
    given = recipe(zoo, method)
    given.pop("seed", None)
    names = [given["base_model"], *(entry["model"] for entry in given["models"])]
    rng = np.random.default_rng(7)
    for folder in dict.fromkeys(names):
        vocab = {f"w{i}": int(at) for i, at in enumerate(rng.permutation(VOCAB))}
        made = {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}}
        (Path(folder) / "tokenizer.json").write_text(json.dumps(made))
    api.merge(given, tmp_path / "unmoved", device="cuda")
    given["tokenizer"] = {"source": "base", "pad_to_multiple_of": 16}
    api.merge(given, tmp_path / "cpu", device="cpu")
    report = api.merge(given, tmp_path / "gpu", device="cuda")
    assert report.backend == "triton"
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")
    assert weights(tmp_path / "gpu") != weights(tmp_path / "unmoved")


@pytest.mark.usefixtures("device")
def test_a_trim_over_the_model(zoo, tmp_path):
    given = recipe(zoo, "ties") | {"parameters": {"trim": "model", "ties": "index"}}
    del given["seed"]
    api.merge(given, tmp_path / "cpu", device="cpu")
    api.merge(given, tmp_path / "gpu", device="cuda")
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


@pytest.mark.parametrize("budget", [1 << 30, 100_000])
@pytest.mark.usefixtures("device")
def test_a_python_function(budget, zoo, tmp_path, monkeypatch):
    """On the host, of what is on the device or of what does not fit there."""
    row = Function(
        "middle", "", "-", (), "operand", 1, None, version="1",
        function=lambda base, tensors, values: np.median(tensors, axis=0),
    )  # fmt: skip
    monkeypatch.setitem(METHODS, "middle", row)
    models = [{"model": str(m)} for m in family(zoo, 400)]
    given = {"merge_method": "middle", "dtype": "bfloat16", "models": models}
    api.merge(given, tmp_path / "cpu", device="cpu")
    report = api.merge(given, tmp_path / "gpu", device="cuda", gpu_memory=budget)
    assert report.backend == "triton" and bool(report.notes) == (budget < 1 << 20)
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


def family(zoo, vocab: int) -> list[Path]:
    base = zoo.base(layers=1, vocab=vocab)
    return [base, zoo.tune(base, "a", seed=1), zoo.tune(base, "b", seed=2, dtype="F32")]


@pytest.fixture
def wide(zoo):
    """A llama of one layer whose embeddings are two chunks long, and two tunes of it."""
    return family(zoo, 1100)


def of_wide(wide, method: str, parameters: dict | None = None) -> dict:
    base, *tunes = wide
    head = {"merge_method": method, "base_model": str(base), "dtype": "bfloat16"}
    models = tunes
    own = {"weight": 0.6, **({"density": 0.5} if method in ("ties", "dare_ties", "della") else {})}
    if method in ("slerp", "model_stock", *POINTWISE):
        own = {}
        models = wide[:2] if method == "slerp" else tunes
        models = tunes[:1] if method == "arcee_fusion" else models
    listed = [{"model": str(m), "parameters": own} for m in models]
    return head | {"models": listed, "parameters": parameters or {}}


# Parameters; vocabulary; bytes for one chunk of three tensors and the output, or for a few rows.
CHUNKS, ROWS = (1100, 400_000), (40, 12_000)
SPLIT = {
    "slerp": ({"t": 0.3}, CHUNKS),
    "linear": ({}, CHUNKS),
    "ties": ({}, CHUNKS),
    "ties over the model": ({"trim": "model"}, CHUNKS),
    "dare_ties": ({}, CHUNKS),
    "della": ({}, CHUNKS),
    "nuslerp": ({"nuslerp_flatten": False}, ROWS),
    "nuslerp by columns": ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, ROWS),
    "model_stock": ({"filter_wise": True}, ROWS),
    "sce": (POINTWISE["sce"], CHUNKS),
    "consensus_ta": (POINTWISE["consensus_ta"], CHUNKS),
    "arcee_fusion": ({}, CHUNKS),
}


@pytest.mark.parametrize("case", SPLIT)
@pytest.mark.usefixtures("device")
def test_tensors_larger_than_the_budget_are_merged_in_pieces(case, zoo, tmp_path):
    parameters, (vocab, room) = SPLIT[case]
    given = of_wide(family(zoo, vocab), case.split()[0], parameters)
    if case == "linear":
        del given["base_model"]
    api.merge(given, tmp_path / "cpu", seed=3)
    report = api.merge(given, tmp_path / "gpu", seed=3, device="cuda", gpu_memory=room)
    assert report.backend == "triton"
    assert any("in pieces" in note and "gpu_memory" in note for note in report.notes)
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


@pytest.mark.usefixtures("device")
def test_a_merge_of_merges_in_pieces(wide, tmp_path):
    first = of_wide(wide, "ties") | {"name": "first"}
    second = {
        "merge_method": "slerp", "base_model": str(wide[0]), "parameters": {"t": 0.4},
        "dtype": "bfloat16", "models": [{"model": str(wide[0])}, {"model": "first"}],
    }  # fmt: skip
    api.merge([first, second], tmp_path / "cpu")
    report = api.merge([first, second], tmp_path / "gpu", device="cuda", gpu_memory=400_000)
    assert any("in pieces" in note for note in report.notes)
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


@pytest.mark.usefixtures("device")
def test_a_device_short_of_memory_takes_smaller_pieces_and_says_so(wide, tmp_path, monkeypatch):
    given = of_wide(wide, "ties")
    api.merge(given, tmp_path / "cpu")
    upload = lane_module.Lane.upload

    def short(lane, view):  # no room for more than one chunk
        if view.count > common.CHUNK:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return upload(lane, view)

    monkeypatch.setattr(lane_module.Lane, "upload", short)
    report = api.merge(given, tmp_path / "gpu", device="cuda")
    assert any("ran out of memory: 2 tensors" in note for note in report.notes)
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")


@pytest.mark.usefixtures("device")
def test_a_device_without_memory_is_one_line_and_the_merge_can_go_on(wide, tmp_path, monkeypatch):
    given = of_wide(wide, "slerp", {"t": 0.3})
    with monkeypatch.context() as patch:

        def exhausted(*_: object) -> None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        patch.setattr(lane_module.Lane, "upload", exhausted)
        with pytest.raises(FastmergeError, match=r"the GPU has no room.*device='cpu'"):
            api.merge(given, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    api.merge(given, tmp_path / "out", device="cpu")
    with pytest.raises(FastmergeError, match=r"gpu_memory: 90 bytes .*; give at least \d+"):
        api.merge(given, tmp_path / "other", device="cuda", gpu_memory=90)


@pytest.mark.usefixtures("device")
def test_lanes_share_the_budget_and_are_used_again(wide, tmp_path, monkeypatch):
    made, used = [], []
    init, lane = lane_module.Lane.__init__, stream.Streamer.lane

    def count(self, *given):
        made.append(self)
        init(self, *given)

    def watch(self, need):
        used.append(max(self._used.values()))
        return lane(self, need)

    monkeypatch.setattr(lane_module.Lane, "__init__", count)
    monkeypatch.setattr(stream.Streamer, "lane", watch)
    api.merge(of_wide(wide, "ties"), tmp_path / "out", device="cuda", gpu_memory=400_000)
    assert max(used) <= 400_000 and len(made) < len(used)


def test_no_gpu_is_one_clear_line(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = recipe(zoo, "slerp")
    with pytest.raises(FastmergeError, match="no usable CUDA device; use device='cpu'"):
        api.merge(given, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    report = api.merge(given, tmp_path / "out", device="auto")
    assert report.backend == "cpu" and any("device auto" in note for note in report.notes)


@pytest.mark.usefixtures("device")
def test_more_inputs_than_the_kernels_take_are_refused_before_anything(zoo, tmp_path):
    base = zoo.base(layers=1)
    models = [zoo.tune(base, f"m{i}", seed=i) for i in range(17)]
    given = {
        "merge_method": "linear", "dtype": "bfloat16",
        "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in models],
    }  # fmt: skip
    with pytest.raises(FastmergeError, match="17 inputs and the GPU kernels take 16"):
        api.merge(given, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    report = api.merge(given, tmp_path / "out", device="auto")
    assert report.backend == "cpu" and any("17 inputs" in note for note in report.notes)


def test_auto_prefers_the_cpu_when_the_files_are_on_disk(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "cuda_devices", lambda: ["cpu"])
    monkeypatch.setattr(devices, "cached_share", lambda views: 0.1)
    report = api.merge(recipe(zoo, "slerp"), tmp_path / "out", device="auto")
    assert report.backend == "cpu" and any("on disk" in note for note in report.notes)


def test_cached_share_of_files_just_written(zoo):
    from fastmerge.models.checkpoint import Checkpoint

    model = Checkpoint.open(zoo.base(layers=1))
    assert devices.cached_share([model.view(name) for name in model.tensors]) == 1.0


@pytest.mark.usefixtures("device")
def test_a_mixture_of_experts(zoo, tmp_path):
    """Copies, casts, a scale, noise and routers that are drawn."""
    base = zoo.base(layers=1)
    a, b = zoo.tune(base, "a", seed=1), zoo.tune(base, "b", seed=2, dtype="F32")
    experts = [
        {"source_model": str(a), "residual_scale": 0.7},
        {"source_model": str(b), "noise_scale": 0.1},
    ]
    given = {"base_model": str(base), "gate_mode": "random", "experts": experts, "seed": 3}
    api.merge(given, tmp_path / "cpu", device="cpu")
    api.merge(given, tmp_path / "gpu", device="cuda")
    assert weights(tmp_path / "gpu") == weights(tmp_path / "cpu")

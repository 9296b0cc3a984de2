"""Averages of checkpoints: folders, files and PyTorch's distributed checkpoints, rounded once."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import api
from fastmerge.averages import average_recipe
from fastmerge.compute.reference import round_to
from fastmerge.errors import FastmergeError, ModelError, UnsupportedError
from fastmerge.models.series import ema_weights, natural
from tests.test_bad_input_cli import refused
from tests.test_retrograde_run import invoke


@pytest.fixture
def series(zoo: Any) -> list[Path]:
    """checkpoint-5 ... checkpoint-1000 of one training, in that order."""
    base = zoo.base("start")
    return [
        zoo.tune(base, f"run/checkpoint-{step}", seed=step, size=0.03)
        for step in (5, 40, 200, 1000)
    ]


def bits(values: np.ndarray) -> bytes:
    return round_to(np.ascontiguousarray(values, np.float32).ravel(), "BF16").tobytes()


def mean(zoo: Any, models: list[Path], weights: list[float]) -> dict[str, bytes]:
    """sum w x / sum w in fp32 with fused multiply-adds, in order, as bfloat16's bits."""
    tensors = [zoo.read(model) for model in models]
    found = {}
    for name in tensors[0]:
        total = np.zeros(tensors[0][name].shape, np.float32)
        for weight, each in zip(weights, tensors, strict=True):
            exact = np.float64(np.float32(weight)) * each[name].astype(np.float64)
            total = (exact + total.astype(np.float64)).astype(np.float32)  # exact: 8 + 24 bits
        found[name] = bits(total / np.float32(sum(np.float64(weights))))
    return found


def written(zoo: Any, folder: Path) -> dict[str, bytes]:
    return {name: bits(values) for name, values in zoo.read(folder).items()}


def test_the_mean_of_some(zoo: Any, series: list[Path], tmp_path: Path) -> None:
    report = fastmerge.average(series, tmp_path / "out")
    assert written(zoo, tmp_path / "out") == mean(zoo, series, [1.0] * 4)
    assert report.tensors == len(zoo.read(series[0]))
    assert (tmp_path / "out" / "config.json").exists()


def test_weights(zoo: Any, series: list[Path], tmp_path: Path) -> None:
    fastmerge.average(series[:3], tmp_path / "out", weights=[0.25, 3, 1])
    assert written(zoo, tmp_path / "out") == mean(zoo, series[:3], [0.25, 3, 1])


def test_64_models_are_rounded_once(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("start", layers=1)
    models = [zoo.tune(base, f"m{i}", seed=i, size=0.05) for i in range(64)]
    fastmerge.average(models, tmp_path / "out")
    assert written(zoo, tmp_path / "out") == mean(zoo, models, [1.0] * 64)


def test_a_moving_average_is_the_recursion() -> None:
    rng = np.random.default_rng(0)
    models = rng.standard_normal((7, 50))
    state = models[0]
    for each in models[1:]:
        state = 0.8 * state + 0.2 * each
    weights = ema_weights(0.8, 7)
    assert np.allclose(weights @ models, state, rtol=1e-14, atol=1e-15)
    assert abs(sum(weights) - 1) < 1e-15
    assert ema_weights(0.3, 1) == [1.0]


def test_a_moving_average_of_a_folder(zoo: Any, series: list[Path], tmp_path: Path) -> None:
    run = series[0].parent
    (run / "checkpoint-notes.txt").write_text("no model")
    fastmerge.average(run, tmp_path / "out", pattern="checkpoint-*", last=3, ema=0.9)
    assert written(zoo, tmp_path / "out") == mean(zoo, series[1:], ema_weights(0.9, 3))


@pytest.mark.parametrize("how", [{"last": 2}, {"ema": 0.9}, {"weights": [1, 1, 1, 1, 2]}])
def test_a_name_without_a_number_is_not_the_last(
    series: list[Path], tmp_path: Path, how: dict[str, Any]
) -> None:
    run = series[0].parent
    shutil.copytree(series[0], run / "checkpoint-best")
    with pytest.raises(FastmergeError, match=r"'checkpoint-best' has no place .* 'checkpoint-5'"):
        fastmerge.average(run, tmp_path / "out", pattern="checkpoint-*", **how)
    # Where order does not count it is a model as the others.
    assert len(average_recipe(run, pattern="checkpoint-*")["models"]) == 5
    narrow = average_recipe(run, pattern="checkpoint-[0-9]*", last=2)["models"]
    assert [entry["model"] for entry in narrow] == [str(path) for path in series[2:]]


def test_numbers_order_the_models(series: list[Path]) -> None:
    run = series[0].parent
    found = average_recipe(run, pattern="checkpoint-*")["models"]
    assert [entry["model"] for entry in found] == [str(path) for path in series]
    names = ["a10b2", "a9b30", "a9b4", "b", "1"]
    assert sorted(names, key=natural) == ["1", "a9b4", "a9b30", "a10b2", "b"]


def test_files_and_folders(zoo: Any, series: list[Path], tmp_path: Path) -> None:
    given = [series[0], series[1] / "model.safetensors"]
    fastmerge.average(given, tmp_path / "out", dtype="float32")
    a, b = zoo.read(series[0]), zoo.read(series[1])
    made = zoo.read(tmp_path / "out")
    assert all(np.array_equal(made[name], (a[name] + b[name]) / 2) for name in a)


def test_an_optimizers_states_are_left_out(zoo: Any, tmp_path: Path) -> None:
    models = []
    for seed in (1, 2):
        tensors = zoo.read(zoo.base(f"plain{seed}", seed=seed))
        name = "model.norm.weight"
        extra = {
            f"optimizer.state.{name}.step": np.ones(1),
            f"{name}.exp_avg": tensors[name],
            f"optim_states.{name}": tensors[name] * seed,
        }
        config = json.loads((zoo.root / f"plain{seed}" / "config.json").read_text())
        models.append(zoo.write(f"trained{seed}", tensors | extra, config))
    report = fastmerge.average(models, tmp_path / "out")
    plain = [zoo.root / "plain1", zoo.root / "plain2"]
    assert written(zoo, tmp_path / "out") == mean(zoo, plain, [1.0, 1.0])
    notes = [note for note in report.notes if "an optimizer's" in note]
    assert len(notes) == 2 and all("3 tensors" in note for note in notes)


def test_the_command(zoo: Any, series: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke("average", *map(str, series[:2]), "-o", str(out), "--weights", "1,3", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["tensors"] == len(zoo.read(series[0]))
    assert written(zoo, out) == mean(zoo, series[:2], [1.0, 3.0])
    done = invoke("average", str(series[0].parent), "-o", str(out), "--overwrite", "-q",
                  "--pattern", "checkpoint-*", "--last", "2", "--ema", "0.5")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert written(zoo, out) == mean(zoo, series[2:], [0.5, 0.5])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["A", "A/../A"], "is there twice; keep one"),
        (["A", "B", "--weights", "1,2,3"], "weights: 3 for 2 models"),
        (["A", "B", "--weights", "1,zwei"], "--weights: 'zwei' is not a number"),
        (["A", "B", "--weights", "1,nan"], "weights: nan is not a finite number"),
        (["A", "B", "--weights", "1,-1"], "error: weights: [1.0, -1.0] sum to 0; change them\n"),
        (["A", "B", "--weights", "1,1e300"], "error: weights[1]: must fit into float32"),
        (["A", "B", "--last", "3"], "last: 3 of 2 models"),
        (["A", "B", "--ema", "1.5"], "ema: 1.5 is not a decay between 0 and 1"),
        (["A", "B", "--ema", "0.5", "--weights", "1,1"], "give one"),
        (["A", "nowhere/at/all"], "nowhere/at/all: no such folder or file"),
        (["A", "--pattern", "x-*"], "no model in it is called 'x-*'; it has model.safetensors"),
        ([".", "--pattern", "../*"], "no pattern of names"),
        (["c-1000", "c-200", "--last", "1"], "'c-1000' comes before 'c-200'"),
        (["c-1000", "c-200", "--ema", "0.9"], "as a shell lists them"),
        (["A", "C"], "vocabulary mismatch in 'model.embed_tokens.weight'"),
    ],
)
def test_what_does_not_fit_is_one_line(
    zoo: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    zoo.tune(zoo.base("A"), "B")
    zoo.base("C", vocab=48)
    monkeypatch.chdir(zoo.root)
    refused(capsys, ["average", *words, "-o", "out"], re.escape(said))
    assert not list(zoo.root.glob("*out*"))


def test_a_folder_and_the_file_in_it_are_one_model(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.base("A")
    monkeypatch.chdir(zoo.root)
    for words in (["A", "A/model.safetensors"], ["A/model.safetensors", "A"]):
        refused(capsys, ["average", *words, "-o", "out"], "is there twice; keep one")


def test_a_save_without_its_index_is_one_line(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (zoo.root / "step").mkdir()
    (zoo.root / "step" / "__0_0.distcp").write_bytes(b"")
    monkeypatch.chdir(zoo.root)
    said = r"step: a PyTorch distributed checkpoint without its \.metadata: either its save did not"
    refused(capsys, ["average", "step", "-o", "out"], said)


# --- PyTorch's distributed checkpoints ---


def as_torch(zoo: Any, model: Path) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {name: torch.tensor(x).bfloat16() for name, x in zoo.read(model).items()}


def save(state: dict[str, Any], folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def trained(zoo: Any, model: Path, folder: Path, wrapper: str = "model") -> Path:
    """What a training loop saves: weights, moments, a step."""
    import torch

    own = as_torch(zoo, model)
    moments = {name: {"exp_avg": x.float(), "step": torch.ones(())} for name, x in own.items()}
    state = {wrapper: own, "optimizer": {"state": moments}, "lr": 0.1}
    return save(state if wrapper else own | {"optimizer": state["optimizer"]}, folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["model", "module", ""])
def test_distributed_checkpoints(
    zoo: Any, series: list[Path], tmp_path: Path, wrapper: str
) -> None:
    models = [trained(zoo, model, tmp_path / f"step{i}", wrapper) for i, model in enumerate(series)]
    report = fastmerge.average(models, tmp_path / "out")
    assert written(zoo, tmp_path / "out") == mean(zoo, series, [1.0] * 4)
    assert any("an optimizer's" in note for note in report.notes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "fastmerge.json", "fastmerge_recipe.yml", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_plan_of_distributed_checkpoints_travels(
    zoo: Any, series: list[Path], tmp_path: Path
) -> None:
    models = [trained(zoo, model, tmp_path / f"step{i}") for i, model in enumerate(series[:2])]
    plan = api.plan(average_recipe(models))
    fastmerge.merge(pickle.loads(pickle.dumps(plan)), tmp_path / "out")
    assert written(zoo, tmp_path / "out") == mean(zoo, series[:2], [1.0] * 2)


@pytest.mark.filterwarnings("ignore")
def test_the_folder_that_accelerate_writes(zoo: Any, series: list[Path], tmp_path: Path) -> None:
    for model in series[:2]:
        trained(zoo, model, model / "pytorch_model_fsdp_0")
        save({"optimizer": {"lr": 1.0}}, model / "optimizer_0")
        (model / "model.safetensors").rename(tmp_path / f"{model.name}.safetensors")
    fastmerge.average(series[:2], tmp_path / "out")
    files = [tmp_path / f"{model.name}.safetensors" for model in series[:2]]
    fastmerge.average(files, tmp_path / "same")
    assert written(zoo, tmp_path / "out") == written(zoo, tmp_path / "same")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"


@pytest.mark.filterwarnings("ignore")
def test_pieces_of_several_ranks_are_joined(zoo: Any, tmp_path: Path) -> None:
    """Two pieces of one tensor, as FSDP's ranks write them: the index of one process, rewritten."""
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    whole = torch.arange(24.0).reshape(6, 4)
    folder = save({"first": whole[:2].clone(), "rest": whole[2:].clone()}, tmp_path / "sharded")
    index = pickle.loads((folder / ".metadata").read_bytes())
    shape = index.state_dict_metadata.pop("rest")
    first = index.state_dict_metadata.pop("first")
    shape.size = torch.Size((6, 4))
    shape.chunks = [
        *first.chunks,
        ChunkStorageMetadata(torch.Size((2, 0)), torch.Size((4, 4))),
    ]
    index.state_dict_metadata = {"w": shape}
    places = {place.fqn: info for place, info in index.storage_data.items()}
    index.storage_data = {
        MetadataIndex("w", (0, 0)): places["first"],
        MetadataIndex("w", (2, 0)): places["rest"],
    }
    index.planner_data = None
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    other = save({"w": whole * 3}, tmp_path / "other")
    fastmerge.average([folder, other], tmp_path / "out")
    assert np.array_equal(zoo.read(tmp_path / "out")["w"], whole.numpy() * 2)
    shape.chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(ModelError, match=r"tensor 'w': its pieces have 8 of 24 elements"):
        fastmerge.average([folder, other], tmp_path / "less")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.mkdir, (Path("ran"),)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("code", r"\.metadata: names 'pathlib\.Path.*', which torch writes into no index"),
        ("text", r"\.metadata: names|\.metadata: not an index of torch's"),
        ("other", r"\.metadata: not an index of torch's"),
        ("lost", r"'__0_0\.distcp' is missing; copy it again"),
        ("cut", r"tensor '.*': cannot be read \("),
        ("away", r"names a file outside the folder"),
    ],
)
def test_damaged_and_hostile_checkpoints(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = trained(zoo, zoo.base("m"), tmp_path / "step")
    index, data = folder / ".metadata", folder / "__0_0.distcp"
    if damage == "lost":
        data.unlink()
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:3000])
    elif damage == "away":
        known = pickle.loads(index.read_bytes())
        for place in known.storage_data.values():
            place.relative_path = "../secret"
        index.write_bytes(pickle.dumps(known))
    else:
        content = {"code": pickle.dumps(Evil()), "text": b"{}", "other": pickle.dumps({})}
        index.write_bytes(content[damage])
    with pytest.raises(FastmergeError, match=said) as caught:
        fastmerge.average([folder], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_adapters_alone_are_refused(zoo: Any) -> None:
    """Factors averaged one by one would add other deltas than the adapters do."""
    base, folder = zoo.base(), zoo.root / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    for models in ([folder], [base, folder]):
        with pytest.raises(UnsupportedError, match=r"lora: a LoRA adapter.*BASE\+.*lora, or merge"):
            average_recipe(models)


def test_models_in_memory_have_a_call_of_their_own(tmp_path: Path) -> None:
    import torch

    state = {"w": torch.zeros(2)}
    for models, said in (
        ([state, state], r"models\[0\]: a dict in memory; .*merge_state_dicts\(models, 'linear'\)"),
        ([torch.nn.Linear(1, 1)] * 2, r"models\[0\]: a Linear in memory; .*merge_state_dicts"),
        (state, "models: one model in memory"),
    ):
        with pytest.raises(fastmerge.FastmergeError, match=said) as caught:
            fastmerge.average(models, tmp_path / "out")  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    merged = fastmerge.merge_state_dicts([state, state], "linear", parameters={"weight": 1})
    assert merged["w"].tolist() == [0, 0]

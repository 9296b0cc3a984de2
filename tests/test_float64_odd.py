"""float64 beyond what other types hold: what is said of it, and that nothing else is."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.methods import find
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.diff import compare
from fastmerge.retrograde import open_space
from fastmerge.retrograde.schedule import load
from fastmerge.search.sweep import sweep
from tests.conftest import Zoo
from tests.tokenizer_models import TEXTS, Maker, bpe, permuted

ODD = [1.5, np.nan, np.inf, -np.inf, 1e300, -1e39, 65520.0, 5e-324]


def written(tmp_path: Path, name: str, *numbers: float) -> str:
    (tmp_path / name).mkdir()
    tensors = {"w": torch.tensor(numbers, dtype=torch.float64)}
    save_file(tensors, tmp_path / name / "model.safetensors")
    return str(tmp_path / name)


@pytest.mark.parametrize("parameters", [{}, {"scale": 1.0}])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("out_dtype", ["float64", "float32", "float16", "bfloat16"])
def test_what_a_rounding_makes_infinite_is_counted(parameters, dtype, out_dtype, tmp_path) -> None:
    odd = written(tmp_path, "odd", *ODD)
    recipe = {
        "merge_method": "passthrough", "dtype": dtype, "out_dtype": out_dtype,
        "models": [{"model": odd, "parameters": parameters}],
    }  # fmt: skip
    report = fastmerge.merge(recipe, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")["w"]
    lost = int((~torch.isfinite(made)).sum())
    assert lost == {"float64": 3, "float32": 5, "bfloat16": 5, "float16": 6}[out_dtype] or (
        (dtype, out_dtype) == ("float32", "float64") and lost == 5
    )
    # Of bytes that are copied nothing is known.
    is_copy = not parameters and out_dtype == "float64"
    assert report.nonfinite == ({} if is_copy else {"w": lost})


_DELTAS = [
    "model_stock", "task_arithmetic", "ties", "dare_linear", "della_linear", "breadcrumbs", "sce",
    "ram", "ramplus_tl", "nearswap", "arcee_fusion", "magmax", "consensus_ta",
]  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [*_DELTAS, "linear", "slerp", "nuslerp", "multislerp", "karcher", "geometric_median"],
)
def test_no_warning_of_numpys(method: str) -> None:
    """Nor what a caller makes of them: the merge itself says what is not finite."""
    base = {"w": torch.arange(1.0, 9.0, dtype=torch.float64)}
    models = {"odd": {"w": torch.tensor(ODD, dtype=torch.float64)}}
    if method not in ("nearswap", "arcee_fusion"):
        models["more"] = {"w": base["w"] + 0.5}
    known = {"weight": 0.5, "density": 0.5, "t": 0.3}
    taken = [parameter.name for parameter in find(method).parameters]
    parameters = {name: value for name, value in known.items() if name in taken}
    of = {"base": base, **models} if method in _DELTAS else models
    lead = "base" if method in _DELTAS else "odd" if method == "slerp" else None
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        made = fastmerge.merge_state_dicts(of, method, base=lead, parameters=parameters, seed=1)
    assert made["w"].shape == (8,)


def test_a_difference_whose_square_float64_cannot_say(tmp_path: Path) -> None:
    a, b = (written(tmp_path, name, 1.0, x) for name, x in (("a", 1.0), ("b", 1e300)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = compare(Checkpoint.open(Path(a)), Checkpoint.open(Path(b)), threads=1).tensors
    assert found.max_abs == 1e300 and found.relative is None and found.changed == 1


# ---------------------------------------------------------------- rounded where they are read


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, list[str]]:
    """Two models of float32 numbers whose vocabularies differ in their order, stored as each."""
    one = bpe(TEXTS[:2], 300)
    maker, found = Maker(Zoo(tmp_path / "F32")), {}
    maker.model("a", one, seed=1)
    maker.model("b", permuted(one, 4), seed=2)
    for kind, dtype in (("F32", torch.float32), ("F64", torch.float64)):
        for name in "ab":
            folder = tmp_path / kind / name
            if not folder.exists():
                shutil.copytree(tmp_path / "F32" / name, folder)
            state = load_file(folder / "model.safetensors")
            save_file({n: x.to(dtype) for n, x in state.items()}, folder / "model.safetensors")
        found[kind] = [str(tmp_path / kind / name) for name in "ab"]
    return found


def test_a_sweep_moves_rows_of_float64(pair, tmp_path) -> None:
    for kind, (a, b) in pair.items():
        recipe = {
            "merge_method": "slerp", "base_model": a, "models": [{"model": a}, {"model": b}],
            "tokenizer_source": "base", "parameters": {"t": 0.5},
        }  # fmt: skip
        sweep(recipe, tmp_path / "out" / kind, [0.2, 0.7], threads=1)
    narrow, wide = (sorted((tmp_path / "out" / k).glob("**/model.safetensors")) for k in pair)
    assert len(narrow) == 2
    for one, two in zip(narrow, wide, strict=True):
        made = load_file(two)
        for name, x in load_file(one).items():
            assert made[name].dtype == torch.float64
            torch.testing.assert_close(made[name].float(), x, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "float32", None])
@pytest.mark.parametrize("kind", ["F32", "F64"])
def test_a_sweep_makes_what_a_merge_makes(kind, dtype, pair, tmp_path) -> None:
    """Gram matrices are of the arithmetic's deltas: of float32's they would be 1e-8 off."""
    a, b = pair[kind]
    recipe = {
        "merge_method": "slerp", "base_model": a, "models": [{"model": a}, {"model": b}],
        "parameters": {"t": 0.3},
    } | ({} if dtype is None else {"dtype": dtype})  # fmt: skip
    sweep(recipe, tmp_path / "swept", [0.3], threads=1)
    (file,) = (tmp_path / "swept").glob("**/model.safetensors")
    wanted, made = dict(fastmerge.materialise(recipe, as_="torch")), load_file(file)
    for name, x in wanted.items():
        rtol = 1e-13 if x.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(made[name], x, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_trim_over_moved_rows(dtype, pair) -> None:
    made = []
    for a, b in pair.values():
        recipe = {
            "merge_method": "ties", "dtype": dtype, "base_model": a, "tokenizer_source": "base",
            "models": [{"model": b, "parameters": {"weight": 0.5, "density": 0.4}}],
            "parameters": {"trim": "model"},
        }  # fmt: skip
        made.append(dict(fastmerge.materialise(recipe, threads=1)))
    for name, x in made[0].items():
        np.testing.assert_array_equal(made[1][name], x)


def test_a_schedule_moves_rows_of_float64(pair) -> None:
    steps = {"steps": [{"degrade": {"partner": "b", "method": "slerp", "t": 0.3}}]}
    grams = []
    for a, b in pair.values():
        asked = {"baseline": a, "pool": [b], "schedule": steps, "tokenizer_source": "base"}
        grams.append(open_space(load(asked), threads=1).grams)
    np.testing.assert_array_equal(*grams)


def test_a_document_over_a_trim_of_rounded_models(pair) -> None:
    """The trees that a later document reads are those that the trim was found for."""
    a, b = pair["F64"]
    first = {
        "name": "first", "merge_method": "ties", "dtype": "float32", "base_model": a,
        "models": [{"model": b, "parameters": {"weight": 0.5, "density": 0.4}}],
        "parameters": {"trim": "model"},
    }  # fmt: skip
    last = {
        "merge_method": "linear", "dtype": "float32",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in ("first", a)],
    }  # fmt: skip
    alone = dict(fastmerge.materialise({k: v for k, v in first.items() if k != "name"}))
    text = "\n---\n".join(json.dumps(document) for document in (first, last))
    base = load_file(Path(a) / "model.safetensors")
    for name, x in fastmerge.materialise(text):
        np.testing.assert_allclose(x, (alone[name] + base[name].numpy()) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_one_model_of_several_is_written_in_float64(zoo: Zoo, tmp_path: Path, dtype: str) -> None:
    base = zoo.base("base", layers=1, dtype=dtype)
    models = [base, zoo.tune(base, "other", dtype=dtype)]
    recipe = {
        "merge_method": "linear", "out_dtype": "float64",
        "models": [
            {"model": str(model), "parameters": {"weight": weight}}
            for model, weight in zip(models, (1, 0), strict=True)
        ],
    }  # fmt: skip
    fastmerge.merge(recipe, tmp_path / "out", threads=1)
    swept = sweep(recipe, tmp_path / "swept", [0.0, 1.0], threads=1)
    for folder, model in (
        (tmp_path / "out", base),
        *((p.out, m) for p, m in zip(swept, models, strict=True)),
    ):
        made = load_file(folder / "model.safetensors")
        for name, stored in zoo.read(model).items():
            assert made[name].dtype == torch.float64 and (made[name].numpy() == stored).all()

"""`fastmerge.compare` against a plain float64 computation of the same figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastmerge.errors import FastmergeError
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.diff import Comparison, TensorDifference, compare

torch.set_num_threads(1)

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
FLOATS = list(BITS)


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint.open(folder)


def compared(
    tmp_path: Path, a: torch.Tensor, b: torch.Tensor, *, threads: int = 2
) -> TensorDifference:
    found = compare(
        store(tmp_path / "a", {"w": a}), store(tmp_path / "b", {"w": b}), threads=threads
    )
    assert len(found.tensors) == 1
    return found.tensors[0]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two float32 matrices, near each other; one tile and a partial one."""
    random = torch.Generator().manual_seed(11)
    a = torch.randn((1027, 515), generator=random)
    return a, a + 0.01 * torch.randn(a.shape, generator=random)


@pytest.mark.parametrize("type_a", FLOATS, ids=lambda t: str(t)[6:])
@pytest.mark.parametrize("type_b", FLOATS, ids=lambda t: str(t)[6:])
def test_figures_match_float64(tmp_path, pair, type_a, type_b):
    a, b = pair[0].to(type_a), pair[1].to(type_b)
    found = compared(tmp_path, a, b)
    x, y = a.double(), b.double()
    gap = (x - y).abs()
    assert found.shape == (1027, 515) and found.count == a.numel()
    assert found.changed == int((x != y).sum())
    assert found.max_abs == pytest.approx(gap.max().item(), rel=1e-6)
    assert found.mean_abs == pytest.approx(gap.mean().item(), rel=1e-6)
    cosine = (x * y).sum() / (x.norm() * y.norm())
    assert found.cosine == pytest.approx(cosine.item(), abs=1e-6)
    assert found.nonfinite == 0
    assert (found.max_ulps is None) == (type_a is not type_b)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda t: str(t)[6:])
def test_ulps_count_representable_steps(tmp_path, dtype):
    """Walked one representable value at a time through zero, 7 steps are 7 ulps."""
    bits = BITS[dtype]
    tiny = torch.tensor([3], dtype=bits).view(dtype)  # the third smallest positive number
    minus = torch.tensor([4], dtype=bits).view(dtype).neg()
    assert compared(tmp_path, tiny, minus).max_ulps == 7


def test_signed_zeros_change_bits_not_value(tmp_path):
    found = compared(tmp_path, torch.zeros(5), -torch.zeros(5))
    assert (found.changed, found.max_abs, found.max_ulps, found.cosine) == (5, 0.0, 0, None)


def test_nan_and_infinity_are_counted_apart(tmp_path):
    a = torch.tensor([1.0, float("nan"), float("inf"), 2.0, float("nan"), 3e38])
    b = torch.tensor([1.5, float("nan"), 1.0, float("nan"), 7.0, -3e38])
    found = compared(tmp_path, a, b)
    assert found.changed == 5 and found.nonfinite == 3
    assert found.max_abs == pytest.approx(6e38)  # beyond float32
    assert found.cosine is None


def test_infinities_are_no_warning_of_numpy_s(tmp_path, recwarn):
    a = torch.tensor([math.inf, 1.0, -math.inf])
    found = compared(tmp_path, a, torch.tensor([math.inf, 3.0, math.inf]))
    assert (found.changed, found.nonfinite, found.max_abs, found.cosine) == (2, 1, 2.0, None)
    (tmp_path / "zero").mkdir()
    assert compared(tmp_path / "zero", a, torch.zeros(3)).cosine is None
    assert not recwarn.list


def test_equal_nans_are_no_difference(tmp_path):
    nan = float("nan")
    found = compared(
        tmp_path, torch.tensor([1.0, nan, nan, nan]), torch.tensor([2.0, nan, nan, nan])
    )
    assert (found.changed, found.mean_abs, found.nonfinite) == (1, 0.25, 0)


@pytest.mark.parametrize(
    "size", [0, 1, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, 1 << 20, (1 << 20) + 1]
)
def test_last_element_is_seen(tmp_path, size):
    a = torch.ones(size)
    b = a.clone()
    b[-1:] = 3.0
    found = compared(tmp_path, a, b)
    assert found.changed == min(size, 1) and found.max_abs == (2.0 if size else 0.0)
    assert found.mean_abs == pytest.approx(2.0 / size if size else 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int8, torch.bool])
def test_other_numbers(tmp_path, dtype):
    a = torch.tensor([0, 1, 1, 0]).to(dtype)
    b = torch.tensor([0, 1, 0, 1]).to(dtype)
    found = compared(tmp_path, a, b)
    assert (found.changed, found.max_abs, found.mean_abs) == (2, 1.0, 0.5)
    assert found.max_ulps is None
    if dtype == torch.float64:
        assert found.cosine == pytest.approx(0.5)
    else:
        assert found.cosine is None


def test_8_bit_floats_compare_as_bytes(tmp_path):
    a = torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn)
    b = torch.tensor([1.0, 2.5, 3.0]).to(torch.float8_e4m3fn)
    found = compared(tmp_path, a, b)
    assert (found.changed, found.max_abs) == (1, None)


def test_8_bit_floats_of_another_type_are_not_said_to_differ(tmp_path, capsys):
    from fastmerge.cli import main

    a = torch.tensor([1.0, 2.0, 3.0])
    found = compared(tmp_path, a.to(torch.float8_e4m3fn), a.bfloat16())
    assert not found.counted and found.max_abs is None
    with pytest.raises(SystemExit):
        main(["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    out = capsys.readouterr().out
    assert out.count("100.00%") == 1 and "1 of them, of types that are not compared" in out


def test_threads_do_not_matter(tmp_path, pair):
    a = store(tmp_path / "a", {"w": pair[0], "v": pair[0][:3].bfloat16()})
    b = store(tmp_path / "b", {"w": pair[1], "v": pair[1][:3].bfloat16()})
    assert compare(a, b, threads=1) == compare(a, b, threads=7)


def whole(tmp_path: Path) -> tuple[Comparison, Comparison]:
    one, two = torch.ones(2, 3), torch.full((4,), 2.0)
    a = store(tmp_path / "a", {"x": one, "y": two, "z": two + 1})
    b = store(tmp_path / "b", {"x": one, "y": two.reshape(2, 2).clone(), "w": two})
    return compare(a, a, threads=1), compare(a, b, threads=1)


def test_names_and_shapes(tmp_path):
    same, other = whole(tmp_path)
    assert same.same and not other.same
    assert same.verdict() == "the same: 3 tensors, every bit"
    assert (other.only_in_a, other.only_in_b) == (("z",), ("w",))
    assert other.reshaped == (("y", (4,), (2, 2)),)
    assert [tensor.name for tensor in other.tensors] == ["x"]
    assert other.verdict().endswith("3 more are in one model only or have another shape")


def test_a_cast_alone_is_not_the_same(tmp_path):
    a = store(tmp_path / "a", {"x": torch.ones(3)})
    b = store(tmp_path / "b", {"x": torch.ones(3).bfloat16()})
    found = compare(a, b, threads=1)
    assert found.tensors[0].changed == 0 and not found.same


def test_largest_first(tmp_path):
    random = torch.Generator().manual_seed(3)
    tensors = {f"t{i}": torch.randn(50, generator=random) for i in range(6)}
    moved = {name: value + 10.0 ** -int(name[1:]) for name, value in tensors.items()}
    moved["t5"][0] = math.inf
    found = compare(store(tmp_path / "a", tensors), store(tmp_path / "b", moved), threads=1)
    assert [tensor.name for tensor in found.largest(3)] == ["t5", "t0", "t1"]


def test_complex_and_packed_types_are_counted_by_element(zoo):
    one = np.arange(20, dtype=np.uint64)
    other = one.copy()
    other[3] += 1 << 40
    packed, changed = np.arange(5, dtype=np.uint8), np.arange(5, dtype=np.uint8)
    changed[0], changed[4] = 0x11, 0x54  # both halves of the first, one of the last
    a = zoo.raw("a", {"c": ("C64", one), "p": ("F4", packed.reshape(1, 5))})
    b = zoo.raw("b", {"c": ("C64", other), "p": ("F4", changed.reshape(1, 5))})
    for folder in (a, b):  # two to a byte: ten elements
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"shape": [1, 5]', b'"shape":[1, 10]'))
    found = compare(Checkpoint.open(a), Checkpoint.open(b), threads=1)
    assert {tensor.name: tensor.changed for tensor in found.tensors} == {"c": 1, "p": 3}


def test_a_map_of_names_that_somebody_chose(tmp_path: Path, recwarn) -> None:
    pytest.importorskip("matplotlib")
    from fastmerge.cli.change_map import change_map, write_change_map

    tensor = compared(tmp_path, torch.ones(4), torch.full((4,), 2.0))
    odd = ["$\\frac{", "\x1b[31m\n\x07", "_x", "x" * 500, "\u202e$a$"]
    named = [replace(tensor, name=f"model.layers.{i}.{name}") for i, name in enumerate(odd)]
    write_change_map(named, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0 and not recwarn.list
    for kinds, layers in ((2001, 1), (1, 2001), (320, 320)):
        count = max(kinds, layers)
        many = [
            replace(tensor, name=f"model.layers.{i % layers}.{i % kinds}") for i in range(count)
        ]
        with pytest.raises(FastmergeError, match=r"plot: .* are more than a picture shows"):
            change_map(many)

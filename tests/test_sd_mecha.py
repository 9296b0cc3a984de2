"""fastmerge's methods in recipes of sd-mecha, and sd-mecha's own on fastmerge's kernels."""

from __future__ import annotations

import pytest

from fastmerge import ops
from fastmerge.integrations import sd_mecha as ours
from fastmerge.methods import METHODS

torch = pytest.importorskip("torch")
sd_mecha = pytest.importorskip("sd_mecha")


def drawn(count: int, *shape: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(5)
    return [torch.randn(*shape, generator=made) for _ in range(count)]


def merged(recipe, dtype=torch.float32) -> torch.Tensor:
    return sd_mecha.merge(
        recipe, merge_device="cpu", merge_dtype=dtype, output_dtype=torch.float32,
        strict_merge_space=None, check_finite_output=False, threads=0,
    )["key"]  # fmt: skip


def nodes(tensors, space="weight"):
    return [sd_mecha.literal({"key": t}, "singleton-mecha", space)
            for t in tensors]  # fmt: skip


def test_every_method_of_the_table_is_one_of_sd_mecha_s():
    found = ours.methods()
    assert found.keys() == {row.name for row in METHODS.values()}
    assert ours.methods() is found
    assert sd_mecha.extensions.merge_methods.resolve("fastmerge_ties") is found["ties"]


def test_deltas_are_merged_in_a_recipe():
    base, a, b = drawn(3, 40, 8)
    at, x, y = nodes([base, a, b])
    ties = ours.methods()["ties"]
    delta = ties(sd_mecha.subtract(x, at), sd_mecha.subtract(y, at), density=0.5, votes="plain")
    wanted = ops.ties(None, [a - base, b - base], [1, 1], density=0.5, votes="plain")
    assert torch.equal(merged(delta), wanted)


def test_draws_follow_seed_and_key():
    deltas = drawn(2, 40, 8)
    dare = ours.methods()["dare_linear"]
    made = [merged(dare(*nodes(deltas, "delta"), density=0.5, seed=s)) for s in (1, 1, 2)]
    wanted = ops.dare_linear(None, deltas, [1, 1], density=0.5, seed=1, name="key")
    assert torch.equal(made[0], wanted)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_methods_with_a_base_and_words():
    base, a, b = drawn(3, 12, 8)
    found = ours.methods()
    made = merged(found["model_stock"](*nodes([a, b, base])))
    assert torch.equal(made, ops.model_stock(base, [a, b]))
    made = merged(found["nearswap"](*nodes([a, base]), t=0.1))
    assert torch.equal(made, ops.nearswap(base, a, 0.1))
    made = merged(found["slerp"](*nodes([a, b]), t=0.3))
    assert torch.equal(made, ops.slerp(a, b, 0.3))


TAKEN = {
    "slerp": lambda a, b, c: sd_mecha.slerp(a, b, alpha=0.3),
    "n_average": lambda a, b, c: sd_mecha.n_average(a, b, c),
    "geometric_median": lambda a, b, c: sd_mecha.geometric_median(a, b, c),
}


@pytest.mark.parametrize("call", TAKEN.values(), ids=TAKEN)
def test_values_are_sd_mecha_s(call, monkeypatch):
    tensors = drawn(3, 40, 8)
    tensors[1] *= 3
    wanted = merged(call(*nodes(tensors)), torch.float64)
    asked = []
    for name in ("linear", "combine"):
        own = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, own=own: asked.append(1) or own(*a))
    with ours.installed():
        made = merged(call(*nodes(tensors)))
    assert asked
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


def test_slerp_of_parallel_and_empty_directions_is_linear():
    a, _ = drawn(2, 6, 4)
    for b in (2 * a, 0 * a):
        wanted = sd_mecha.slerp.__wrapped__(a, b, torch.tensor(0.3))
        torch.testing.assert_close(
            ours.slerp(a, b, torch.tensor(0.3)), wanted, rtol=1e-3, atol=1e-5
        )


def test_what_has_no_kernels_is_sd_mecha_s():
    a, b = (tensor.double() for tensor in drawn(2, 6, 4))
    t = torch.full((6, 1), 0.3).double()
    with ours.installed():
        made = sd_mecha.slerp.__wrapped__(a, b, t)
    assert torch.equal(made, sd_mecha.slerp.__wrapped__(a, b, t))
    assert made.dtype == torch.float64


def test_sd_mecha_s_functions_come_back():
    before = sd_mecha.slerp.__wrapped__
    ours.install()
    assert sd_mecha.slerp.__wrapped__ is ours.slerp
    ours.uninstall()
    assert sd_mecha.slerp.__wrapped__ is before

"""The retrograde experiment: its splits, its tokenizer, its walks and its statistics."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "retrograde"))

import data  # noqa: E402
import merging  # noqa: E402
import protocol  # noqa: E402
import scoring  # noqa: E402
import stats  # noqa: E402
import train  # noqa: E402
from run import pack, unpack  # noqa: E402

SHAPES = {"embed": (11, 8), "proj": (8, 24), "norm": (8,)}


def states(count: int, seed: int = 0) -> dict[str, merging.State]:
    """A base and fine-tunes of it: small random deltas around one random model."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    models = {"base": base}
    for index in range(count):
        models[f"m{index}"] = {
            name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in base.items()
        }
    return models


def test_splits_share_no_prompt():
    for skill in data.SKILLS:
        drawn = {
            split: set(data.draw(skill, split, 150, 3, distinct=True).prompts)
            for split in (*data.SPLITS, "train")
        }
        assert all(len(prompts) == 150 for prompts in drawn.values())
        for one, other in itertools.combinations(drawn.values(), 2):
            assert not one & other


def test_lines_are_right_and_scored_from_the_answer_on():
    letters = {index: character for character, index in data.VOCABULARY.items()}
    for skill, check in {
        "add": lambda p, a: sum(map(int, p.split("+"))) == int(a[::-1]),
        "sub": lambda p, a: int(p.split("D")[0]) - int(p.split("D")[1]) == int(a[::-1]),
        "srt7": lambda p, a: sorted(p[2:]) == list(a),
        "rev": lambda p, a: p[2:] == a[::-1],
        "cnt": lambda p, a: p[2:-2].count(p[-1]) == int(a),
        "brk": lambda p, a: all(b in ("()", "[]", "{}", "<>", "/\\") for b in pairs(p[2:], a)),
    }.items():
        lines = data.draw(skill, "val", 40, 0, distinct=True)
        for row, prompt in zip(lines.ids, lines.prompts, strict=True):
            text = "".join(letters[i] for i in row)
            shown, answer = text[: -lines.answer], text[-lines.answer :]
            assert shown == f"{prompt}="
            assert answer.endswith("\n")
            assert check(prompt, answer[:-1])


def pairs(opened: str, closed: str) -> list[str]:
    return [a + b for a, b in zip(opened, reversed(closed), strict=True)]


def test_too_few_prompts_is_an_error(monkeypatch):
    monkeypatch.setitem(data.SKILLS, "tiny", lambda rng: (str(rng.integers(30)), "1"))
    with pytest.raises(ValueError, match="'tiny' has too few prompts in split 'test'"):
        data.draw("tiny", "test", 20, 0, distinct=True)


def test_tokenizer_round_trip():
    tokenizer = data.tokenizer()
    text = "12+7=910\nx:([{</=\\>}])\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == data.encode(text)
    assert tokenizer.decode(ids) == text


def test_teacher_forced_exact_match_is_greedy_decoding():
    model = train.build(5).eval()
    run = train.Run(None, {"max": 1.0}, 25, 3e-3, "constant", 10)
    train.train(model, run, train.Corpus(5, lines_per_skill=400), [5])
    items = scoring.Items.draw(["max"], "val", 60, 5)
    lines = items.skills["max"]
    right = scoring.score(model, items).right[0]
    prompts = torch.from_numpy(lines.ids[:, : -lines.answer])
    decoded = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=lines.answer,
        do_sample=False,
        eos_token_id=None,
    )
    greedy = (decoded.numpy()[:, -lines.answer :] == lines.ids[:, -lines.answer :]).all(1)
    assert 0 < right.mean() < 1  # both kinds of items occur
    np.testing.assert_array_equal(right, greedy)


def test_linear_walk_is_one_linear_merge():
    models = states(2)
    steps = (merging.Step("m1", 0.3, 0.6), merging.Step("base", 0.5, 0.2))
    walk = merging.Walk("linear", "m0", steps)
    assert sum(walk.weights.values()) == pytest.approx(1)
    assert walk.weights["m1"] == pytest.approx(0.3 * 0.4 * 0.5 * 0.8)
    one = merging.merge(merging.OneShot("linear", walk.weights), models, "base")
    stepped = merging.merge(walk, models, "base")
    for name in SHAPES:
        torch.testing.assert_close(stepped[name], one[name], rtol=1e-5, atol=1e-6)


def test_merges_equal_float64_formulas():
    models = states(2)
    base, a, b = ({n: t.double() for n, t in models[k].items()} for k in ("base", "m0", "m1"))
    weights = {"m0": 0.7, "m1": 0.6}

    def slerp(x, y, t):
        angle = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
        return (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)

    def ties(x, y, z):
        kept = []
        for delta in (x - z, y - z):
            count = max(1, int(0.5 * delta.numel()))
            least = delta.abs().flatten().sort(descending=True).values[count - 1]
            kept.append(torch.where(delta.abs() >= least, delta, 0))
        deltas = torch.stack([0.7 * kept[0], 0.6 * kept[1]])
        agreed = torch.where(deltas.sign() == deltas.sum(0).sign(), deltas, 0)
        return z + 1.2 * agreed.sum(0)

    expected = {
        "linear": lambda n: 0.7 * a[n] + 0.6 * b[n],
        "slerp": lambda n: slerp(a[n], b[n], 0.6 / 1.3),
        "task_arithmetic": lambda n: base[n] + 0.7 * (a[n] - base[n]) + 0.6 * (b[n] - base[n]),
        "ties": lambda n: ties(a[n], b[n], base[n]),
    }
    for method, formula in expected.items():
        scale, density = (1.2, 0.5) if method == "ties" else (1.0, 1.0)
        one = merging.OneShot(method, weights, density=density, scale=scale)
        merged = merging.merge(one, models, "base")
        for name in SHAPES:
            torch.testing.assert_close(merged[name].double(), formula(name), rtol=1e-5, atol=1e-6)


def test_moving_base_step_goes_toward_the_partner():
    models = states(2)
    walk = merging.Walk("ties", "m0", (merging.Step("m1", 0.25, 0.5),), moving_base=True)
    merged = merging.merge(walk, models, "base")
    for name in SHAPES:  # density 1: nothing trimmed, so two plain interpolations
        expected = models["m0"][name] + 0.125 * (models["m1"][name] - models["m0"][name])
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_decoy_is_as_far_as_the_partner():
    models = states(1)
    decoy = merging.decoy(models["base"], models["m0"], seed=4)
    for name in SHAPES:
        far = (models["m0"][name] - models["base"][name]).norm()
        assert (decoy[name] - models["base"][name]).norm() == pytest.approx(float(far), rel=1e-5)
        assert not torch.equal(decoy[name], models["m0"][name])


def test_schedules_share_their_fractions_and_budget():
    class Bench:
        regime = train.REGIMES["acquired"]
        rng = protocol.Bench.rng
        seed = 1

    found = {family.name: family.candidates for family in protocol.families(Bench(), "add")}
    for method in ("slerp", "ties", "dare_ties"):
        pairs_ = zip(found[f"walk_{method}"], found["walk_linear"], strict=True)
        assert all(w.steps == linear.steps and w.method == method for w, linear in pairs_)
    for name, candidates in found.items():
        assert len(candidates) == (11 if name == "model_stock" else protocol.CANDIDATES)
    for walk, one in zip(found["walk_ties"], found["collapsed_ties"], strict=True):
        assert one.weights == walk.weights
        assert one.density == walk.density


def test_hits_survive_packing(tmp_path):
    rng = np.random.default_rng(0)
    hits = {"linear": rng.random((7, 500)) < 0.5, "dare": rng.integers(0, 9, (7, 500), np.uint8)}
    np.savez_compressed(tmp_path / "x.npz", **pack(hits))
    back = unpack(tmp_path / "x.npz", 500)
    for family, array in hits.items():
        assert back[family].dtype == array.dtype
        np.testing.assert_array_equal(back[family], array)


def test_paired_bootstrap_against_the_normal_interval():
    rng = np.random.default_rng(1)
    ours, theirs = rng.random((4, 800)) < 0.7, rng.random((4, 800)) < 0.6
    found = stats.paired_bootstrap(ours, theirs, 0)
    gap = 100 * (ours.astype(float) - theirs)
    error = np.sqrt((gap.var(axis=1) / 800).sum()) / 4
    assert found.mean == pytest.approx(gap.mean())
    assert found.low == pytest.approx(gap.mean() - 1.96 * error, abs=0.25)
    assert found.high == pytest.approx(gap.mean() + 1.96 * error, abs=0.25)
    same = stats.paired_bootstrap(ours, ours, 0)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize(
    "df, quantile", [(1, 12.706205), (4, 2.776445), (7, 2.364624), (30, 2.042272)]
)
def test_t_quantiles_are_the_tables(df, quantile):
    assert stats.t_quantile(0.025, df) == pytest.approx(quantile, abs=1e-5)
    assert stats.t_tail(0.0, df) == pytest.approx(0.5, abs=1e-12)


def test_across_seeds():
    found = stats.across_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * np.sqrt(2.5 / 5)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), abs=1e-4)
    assert found.p == pytest.approx(0.0132356, abs=1e-7)  # t = 4.2426, df = 4
    assert stats.across_seeds([0.0, 0.0]).p == 1
    with pytest.raises(ValueError, match="two seeds"):
        stats.across_seeds([1.0])


def test_holm_steps_down():
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert stats.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}

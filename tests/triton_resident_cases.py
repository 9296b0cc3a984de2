"""Whole small models merged in place by the batched kernels, against the CPU engine, bit for bit.

Run by test_triton.py under Triton's interpreter; on a GPU, run it there directly.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("yaml")  # recipes are read with it; the kernels' own tests need none

import fastmerge
from fastmerge import _C, api, live, llama, state_dicts
from fastmerge.compute import cpu
from fastmerge.compute.batch import Batch, Job
from fastmerge.compute.tensor import Computation
from fastmerge.engine.products import grams
from fastmerge.errors import FastmergeError
from fastmerge.kernels import combine, common, consensus, gram, pointwise, select
from fastmerge.methods import Combination, Function, Parameter, find
from fastmerge.methods.shapes import Factors
from fastmerge.models.memory import view_of
from fastmerge.recipe.settings import constant
from fastmerge.search import expressions as search
from fastmerge.search.space import Space
from fastmerge.tree import nodes
from fastmerge.tree.nodes import Merge
from fastmerge.tree.nodes import Stored as Source

DEVICE = "cpu" if common.interpreted() else "cuda"
BF16, F32 = torch.bfloat16, torch.float32
SHAPES = [(40, 32), (32,), (32, 48), (33, 5), (32,)]


def models(count):
    rng = np.random.default_rng(5)
    base = [rng.normal(size=shape) * 0.05 for shape in SHAPES]
    return [
        [
            torch.from_numpy((x + 0.01 * rng.normal(size=x.shape)).astype(np.float32))
            .to(torch.bfloat16)
            .to(DEVICE)
            for x in base
        ]
        for _ in range(count)
    ]


def _largest(base, tensors, values):
    start = np.zeros_like(tensors[0]) if base is None else base
    each = [x * scale for x, scale in zip(tensors, values["scale"], strict=True)]
    return np.maximum(np.maximum.reduce(each), start + np.float32(values["floor"]))


LARGEST = Function(
    "largest", "", "-",
    (Parameter("floor", float, 0.0, ""), Parameter("scale", float, 1.0, "", per_model=True)),
    "optional", 1, None, function=_largest,
)  # fmt: skip


def merge(method, count, base, values, per_model=None, seed=None):
    """For each tensor the tree of one merge of ``count`` models (the last one the base, if any)."""
    per_model = per_model or [{}] * count
    return [
        Merge(
            find(method) if isinstance(method, str) else method,
            tuple(Source(m, str(t)) for m in range(count)),
            Source(count, str(t)) if base else None,
            values,
            tuple(per_model),
            seed,
        )
        for t in range(len(SHAPES))
    ]


def weighted(*weights, **more):
    return [{"weight": w, **more} for w in weights]


CASES = {
    "slerp": merge("slerp", 2, False, {"t": 0.3}),
    "linear": merge("linear", 3, False, {"normalize": True}, weighted(0.2, 0.5, 0.7)),
    "karcher": merge("karcher", 3, False, {"max_iter": 10, "tol": 1e-5}),
    "model_stock": merge("model_stock", 2, True, {"filter_wise": False}),
    "nuslerp rows": merge(
        "nuslerp", 2, True, {"nuslerp_flatten": False, "nuslerp_row_wise": False},
        weighted(0.4, 0.6),
    ),
    "ties": merge(
        "ties", 2, True, {"normalize": True, "lambda": 0.9, "rescale": False},
        weighted(0.5, 0.8, density=0.4),
    ),
    "dare_ties": merge(
        "dare_ties", 2, True, {"normalize": False, "lambda": 1.0, "rescale": True},
        weighted(0.5, 0.8, density=0.5), seed=7,
    ),
    "della": merge(
        "della", 2, True, {"normalize": True, "lambda": 0.9, "rescale": True},
        weighted(0.5, 0.8, density=0.5, epsilon=0.2), seed=7,
    ),
    "della_linear": merge(
        "della_linear", 3, True, {"normalize": False, "lambda": 1.0, "rescale": "density"},
        [*weighted(0.5, 0.8, density=0.4, epsilon=0.1), {"weight": 1.0, "density": 1.0}], seed=3,
    ),
    "slerp of slerp": [
        Merge(find("slerp"), (a, Source(2, a.operands[0].name)), None, {"t": 0.6}, ({}, {}))
        for a in merge("slerp", 2, False, {"t": 0.3})
    ],
    "slerp of ties": [
        Merge(find("slerp"), (a, Source(2, a.operands[0].name)), None, {"t": 0.6}, ({}, {}))
        for a in merge("ties", 2, True, {"normalize": True, "lambda": 1.0, "rescale": False},
                       weighted(0.5, 0.8, density=0.4))
    ],
    "slerp of function": [
        Merge(find("slerp"), (a, Source(2, a.operands[0].name)), None, {"t": 0.6}, ({}, {}))
        for a in merge(LARGEST, 2, False, {"floor": -0.01}, [{"scale": 1.0}, {"scale": 0.5}])
    ],
    "function": merge(LARGEST, 2, True, {"floor": 0.0}, [{"scale": 1.0}, {"scale": 2.0}]),
    "nearswap": merge("nearswap", 1, True, {"t": 0.002}),
    "ram": merge("ram", 3, True, {"epsilon": 0.005}),
    "ramplus_tl": merge("ramplus_tl", 2, True, {"epsilon": 0.005, "r": 0.1, "alpha": 0.2}),
    "sce": merge("sce", 3, True, {"select_topk": 0.3}),
    "magmax": merge("magmax", 3, True, {"lambda": 0.5}),
    "consensus_ta": merge(
        "consensus_ta", 2, True, {"agree": 1, "lambda": 0.9}, weighted(1.0, 0.5, mask_lambda=0.4)
    ),
    "arcee_fusion": merge("arcee_fusion", 1, True, {}),
    "copies": [Source(1, str(t)) for t in range(len(SHAPES))],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_resident_equals_cpu(case):
    sources = models(4)
    outs = [torch.full(shape, 7, dtype=torch.bfloat16, device=DEVICE) for shape in SHAPES]
    jobs = [Job(str(t), root, outs[t]) for t, root in enumerate(CASES[case])]
    resident = Batch(jobs, lambda source: sources[source.model][int(source.name)])
    for _ in range(2):  # prepared once, run twice
        outcomes = resident.run()
    backend = cpu.cpu(2)
    on_cpu = [[tensor.cpu() for tensor in model] for model in sources]
    for t, (root, shape) in enumerate(zip(CASES[case], SHAPES, strict=True)):
        expected = torch.full(shape, 7, dtype=torch.bfloat16)
        wanted = Computation(
            backend,
            lambda source: view_of(on_cpu[source.model][int(source.name)], "source"),
            str(t),
            shape,
        ).run(root, _C.MemorySink(view_of(expected, "out", writable=True)))
        assert torch.equal(outs[t].cpu(), expected)
        assert (outcomes[t].nonfinite, outcomes[t].kept) == (wanted.nonfinite, wanted.kept)
        for source, value in (wanted.coefficients or {}).items():
            assert outcomes[t].coefficients[source] == pytest.approx(value, rel=1e-12)


# Of a whole model of tensors alike, whatever their number. A search has up to nine levels, twice.
MOST_LAUNCHES = {
    "linear": {"combine_kernel": 1},
    "slerp": {"gram_kernel": 1, "reduce_kernel": 1, "combine_kernel": 1},
    "ties": {"rank_kernel": 2, "nth_kernel": 18, "consensus_kernel": 1},
    "dare_ties": {"measure_kernel": 1, "reduce_kernel": 1, "consensus_kernel": 1},
    "nearswap": {"pointwise_kernel": 1},
}


@pytest.mark.parametrize("case", MOST_LAUNCHES)
def test_launches_and_tables_of_a_merge(case, monkeypatch):
    """What it costs besides its kernels: launches, and no table of addresses after the first."""
    launched, grouped = Counter(), Counter()
    launch, group = common.launch, common.group

    def counting(kernel, programs, *arguments, **meta):
        launched[kernel.fn.__name__] += programs > 0
        launch(kernel, programs, *arguments, **meta)

    def grouping(*arguments, **options):
        grouped[case] += 1
        return group(*arguments, **options)

    for module in (combine, consensus, gram, pointwise, select):
        monkeypatch.setattr(module, "launch", counting)
        if hasattr(module, "group"):
            monkeypatch.setattr(module, "group", grouping)
    monkeypatch.setattr(common, "group", grouping)
    sources = models(4)
    shapes = [tensor.shape for tensor in sources[0]]
    outs = [torch.empty(shape, dtype=BF16, device=DEVICE) for shape in shapes]
    jobs = [Job(str(t), root, outs[t]) for t, root in enumerate(CASES[case])]
    resident = Batch(jobs, lambda source: sources[source.model][int(source.name)])
    resident.run()
    assert grouped[case]
    launched.clear(), grouped.clear()
    resident.run()
    print(case, dict(launched))
    assert not grouped
    assert launched.keys() == MOST_LAUNCHES[case].keys()
    assert all(launched[name] <= most for name, most in MOST_LAUNCHES[case].items()), launched


@pytest.mark.parametrize("case", ["slerp", "ties"])
def test_the_tensor_that_does_not_fit_is_named(case):
    sources = models(3)
    outs = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for shape in SHAPES]
    sources[1][3] = sources[1][3][1:]
    jobs = [Job(f"layer.{t}", root, outs[t]) for t, root in enumerate(CASES[case])]
    with pytest.raises(FastmergeError, match=r"layer\.3: input [12] has 160 elements"):
        Batch(jobs, lambda source: sources[source.model][int(source.name)])


def fresh(roots, sources):
    """What a Batch made for these trees alone computes."""
    outs = [torch.empty(shape, dtype=BF16, device=DEVICE) for shape in SHAPES]
    jobs = [Job(str(t), root, outs[t]) for t, root in enumerate(roots)]
    outcomes = Batch(jobs, lambda source: sources[source.model][int(source.name)]).run()
    return outs, outcomes


def trimmed(density):
    own = weighted(0.5, 0.8, density=density)
    return merge("ties", 2, True, {"normalize": True, "lambda": 0.5, "rescale": False}, own)


OTHERS = {
    "slerp": [
        *(merge("slerp", 2, False, {"t": t}) for t in (0.8, 0.0, 0.1)),
        merge("linear", 2, False, {"normalize": False}, weighted(0.25, 0.5)),
    ],
    "linear": [
        merge("linear", 3, False, {"normalize": False}, weighted(0.5, 0.25, 2.0)),
        merge("linear", 3, False, {"normalize": True}, weighted(0.0, 0.25, 2.0)),
        merge("linear", 2, False, {"normalize": False}, weighted(0.25, 0.75)),  # of fewer
        CASES["copies"],
    ],
    "karcher": [merge("karcher", 3, False, {"max_iter": 2, "tol": 1e-5})],
    "ties": [trimmed(0.7), trimmed(1.0)],
    "della": [
        merge(
            "della",
            2,
            True,
            {"normalize": True, "lambda": 1.0, "rescale": rescale},
            weighted(0.5, 0.3, density=density, epsilon=epsilon),
            seed=8,
        )
        for rescale, density, epsilon in ((True, 0.3, 0.25), (False, 0.5, 0.0), (True, 1.0, 0.1))
    ],
    "magmax": [merge("magmax", 3, True, {"lambda": 2.0})],
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_values_of_one_form_need_nothing_new(case):
    sources = models(4)
    fetched = []

    def fetch(source):
        fetched.append(source)
        return sources[source.model][int(source.name)]

    outs = [torch.empty(shape, dtype=BF16, device=DEVICE) for shape in SHAPES]
    batch = Batch([Job(str(t), root, outs[t]) for t, root in enumerate(CASES[case])], fetch)
    fetched.clear()
    for roots in OTHERS[case]:
        assert batch.adopt(roots)
        outcomes = batch.run()
        expected, wanted = fresh(roots, sources)
        assert all(torch.equal(out, x) for out, x in zip(outs, expected, strict=True))
        assert [o.kept for o in outcomes] == [o.kept for o in wanted]
        assert [o.coefficients for o in outcomes] == [o.coefficients for o in wanted]
    assert not fetched


@pytest.mark.parametrize(
    "case, other",
    [
        ("linear", CASES["slerp"]),
        ("linear", merge("linear", 4, False, {"normalize": False}, weighted(1, 1, 1, 1))),
        ("linear", [  # sums start with the first source: in another order, the last bit is another
            Merge(root.method, root.operands[::-1], None, root.values, root.operand_values)
            for root in CASES["linear"]
        ]),
    ],
)  # fmt: skip
def test_another_form_is_not_adopted(case, other):
    sources = models(4)
    outs = [torch.empty(shape, dtype=BF16, device=DEVICE) for shape in SHAPES]
    jobs = [Job(str(t), root, outs[t]) for t, root in enumerate(CASES[case])]
    batch = Batch(jobs, lambda source: sources[source.model][int(source.name)])
    batch.run()
    before = [out.clone() for out in outs]
    assert not batch.adopt(other)
    batch.run()
    assert all(torch.equal(out, x) for out, x in zip(outs, before, strict=True))


def test_a_rule_that_takes_no_stack_and_is_nobodys():
    """A row that says nothing of stacks gets one Gram matrix at a time, as many models as tensors
    or not.
    """

    def rule(gram, _values, operands, _has_base):
        assert gram.shape == (len(operands), len(operands))
        return Factors(1.0 / gram.diagonal(), float((1.0 / gram.diagonal()).sum()))

    row = Combination("by_energy", "", "-", (), "operand", 1, None, rule=rule)
    sources = models(len(SHAPES))
    count = len(sources)
    roots = [
        Merge(row, tuple(Source(m, str(t)) for m in range(count)), None, {}, ({},) * count)
        for t in range(len(SHAPES))
    ]
    outs, outcomes = fresh(roots, sources)
    for t, out in enumerate(outs):
        x = torch.stack([model[t].double() for model in sources])
        energy = 1.0 / (x * x).flatten(1).sum(1)
        weights = energy / energy.sum()
        expected = (x * weights.reshape(-1, *[1] * len(SHAPES[t]))).sum(0)
        torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
        assert list(outcomes[t].coefficients.values()) == pytest.approx(weights.tolist())


def test_a_walk_prepares_once(zoo, monkeypatch):
    """Ten candidates of three models: copies, subsets, zeros, SLERPs of states; one preparation."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(live, "_uses_gpu", lambda targets: True)
    made = []
    monkeypatch.setattr(live, "Batch", lambda *given: made.append(given) or Batch(*given))
    a = zoo.base("a", layers=1)
    others = [zoo.tune(a, name, seed=i) for i, name in enumerate("bc")]
    template = api.plan({
        "merge_method": "linear", "dtype": "bfloat16", "parameters": {"normalize": False},
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (a, *others)],
    })  # fmt: skip
    wanted = {i.name: i.root.operands for i in template.tensors if isinstance(i.root, Merge)}
    found = grams(template.models, wanted)
    space = Space(template, np.stack([found[n] for n in wanted]), [0.0] * len(wanted))
    state = search.Model(0)
    model = llama.load(a, dtype=BF16).to(DEVICE)
    for step in range(10):
        if step % 3 == 1:
            state = search.average((state, search.Model(1 + step % 2)), (0.75, 0.25))
        elif step % 3 == 2:
            t = {"t": constant(step / 20)}
            state = search.blend("slerp", (state, search.Model(1 + step % 2)), parameters=t)
        plan = space.plan(state if step != 6 else search.Model(2))
        live.merge_into(model, plan, keep="device")
        expected = dict(fastmerge.materialise(plan))
        for name, tensor in model.state_dict().items():
            assert (tensor.cpu().view(torch.uint16).numpy() == expected[name]).all()
    assert len(made) == 1


@pytest.mark.parametrize("keep, dtype", [("device", BF16), ("pinned", BF16), ("device", F32)])
def test_merge_into_a_live_model(keep, dtype, zoo, monkeypatch):
    """The GPU's way of `llama.merge_into`, sources kept between calls, against the CPU engine's."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(live, "_uses_gpu", lambda targets: True)
    a = zoo.base("a", layers=1)
    b = zoo.tune(a, "b")
    model = llama.load(a, dtype=dtype).to(DEVICE)
    for t in (0.3, 0.8, 0.8):
        recipe = {
            "merge_method": "slerp", "base_model": str(a), "dtype": "bfloat16",
            "parameters": {"t": t}, "models": [{"model": str(a)}, {"model": str(b)}],
        }  # fmt: skip
        plan = api.plan(recipe)
        outcomes = live.merge_into(model, plan, keep=keep, gpu_memory=20_000)
        assert set(outcomes) == {item.name for item in plan.tensors}
        expected = llama.load_merged(recipe, threads=1).state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.cpu(), expected[name].to(dtype))
    assert len(live._HELD[model].tensors) == 2 * len(plan.tensors)
    live.forget(model)
    assert model not in live._HELD


def exhausted_above(nbytes: int):
    """A lane's upload, or a group of sources, for a device with room for ``nbytes`` only."""
    whole = live._groups

    def groups(plan, targets, limit):
        for group in whole(plan, targets, limit):
            sources = nodes.leaves([item.root for item in group])
            size = sum(plan.models[s.model].tensors[s.name].nbytes for s in sources)
            if size > nbytes:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            yield group

    return groups


def two_models(zoo):
    pytest.importorskip("transformers")
    a = zoo.base("a", layers=1)
    recipe = {
        "merge_method": "slerp", "base_model": str(a), "dtype": "bfloat16",
        "parameters": {"t": 0.4}, "models": [{"model": str(a)}, {"model": str(zoo.tune(a, "b"))}],
    }  # fmt: skip
    return llama.load(a, dtype=BF16).to(DEVICE), recipe


def test_a_device_too_small_for_the_sources_pins_them_and_says_so(zoo, monkeypatch):
    monkeypatch.setattr(live, "_uses_gpu", lambda targets: True)
    monkeypatch.setattr(live, "_LEAST_BYTES", 1 << 10)
    model, recipe = two_models(zoo)
    expected = llama.load_merged(recipe, threads=1).state_dict()
    monkeypatch.setattr(live, "_room", lambda device: 1000)
    with pytest.warns(UserWarning, match=r"0.0 GB free.*stay in pinned memory"):
        live.merge_into(model, api.plan(recipe))
    assert all(torch.equal(x.cpu(), expected[n]) for n, x in model.state_dict().items())

    monkeypatch.setattr(live, "_room", lambda device: None)
    monkeypatch.setattr(live, "_groups", exhausted_above(20_000))  # the largest tensor's sources
    with pytest.warns(UserWarning, match="ran out of memory; sources now pass through"):
        live.merge_into(model, api.plan(recipe), gpu_memory=1 << 16)
    assert all(torch.equal(x.cpu(), expected[n]) for n, x in model.state_dict().items())
    assert all(key[3] == "pinned" for key in live._HELD[model].tensors)


def test_a_device_kept_to_is_refused_in_one_line(zoo, monkeypatch):
    monkeypatch.setattr(live, "_uses_gpu", lambda targets: True)
    model, recipe = two_models(zoo)
    monkeypatch.setattr(live, "_groups", exhausted_above(100))
    with pytest.raises(FastmergeError, match=r"no room to merge the model.*keep='pinned'"):
        live.merge_into(model, api.plan(recipe), keep="device")
    with pytest.raises(FastmergeError, match="keep: unknown 'gpu'; use auto, device, pinned"):
        live.merge_into(model, api.plan(recipe), keep="gpu")


def test_a_model_that_is_not_whole_is_refused_before_anything_changes(zoo):
    model, recipe = two_models(zoo)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.lm_head.to("meta")
    with pytest.raises(FastmergeError, match=r"lm_head.weight on meta.*without offloading"):
        live.merge_into(model, api.plan(recipe))
    after = model.state_dict()
    assert all(torch.equal(after[n], x) for n, x in before.items() if n != "lm_head.weight")


def test_a_trim_over_the_model_is_refused_by_name():
    x = torch.zeros(8, dtype=torch.bfloat16, device=DEVICE)
    values = {"normalize": True, "lambda": 1.0, "rescale": False, "trim": "model", "ties": "mixed"}
    own = {"weight": 1.0, "density": 0.5}
    root = Merge(find("ties"), (Source(1, "x"),), Source(0, "x"), values, (own,))
    with pytest.raises(FastmergeError, match="x: trim: model is not for models on a GPU"):
        Batch([Job("x", root, x.clone())], lambda _: x)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "della", "model_stock"])
def test_state_dicts_on_the_device_equal_those_of_the_cpu(method):
    named = [{str(t): x for t, x in enumerate(own)} for own in models(3)]
    for own in named:
        own["n"] = torch.tensor([3], device=DEVICE)
    base = {"slerp": 0, "ties": 2, "della": 2, "model_stock": 2}.get(method)
    given = named[:2] if method == "slerp" else named
    rows = {
        "slerp": {"t": 0.3},
        "model_stock": {},
        "ties": {"weight": [0.4, 0.7], "density": 0.5},
        "della": {"weight": [0.4, 0.7], "density": 0.5},
    }
    options = {"base": base, "parameters": rows.get(method, {"weight": 1.0})}
    on_cpu = [{name: x.cpu() for name, x in own.items()} for own in given]
    wanted = fastmerge.merge_state_dicts(on_cpu, method, **options)
    plan = of_state_dicts_plan(given, method, options)
    wide = {name: torch.empty_like(x, dtype=F32) for name, x in given[0].items() if name != "n"}
    wide["n"] = torch.zeros_like(given[0]["n"])
    for targets in (None, {name: torch.empty_like(x) for name, x in given[0].items()}, wide):
        made = state_dicts.merged_on_gpu(plan, targets, DEVICE)
        for name, tensor in (made if targets is None else targets).items():
            assert torch.equal(tensor.to(wanted[name].dtype).cpu(), wanted[name])


def of_state_dicts_plan(given, method, options):
    """What merge_state_dicts plans, caught on its way."""
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_dicts, "_run", lambda plan, *_: caught.append(plan) or names(plan))
        fastmerge.merge_state_dicts(given, method, **options)
    return caught[0]


def names(plan):
    return {item.name: None for item in plan.tensors}

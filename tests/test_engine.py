"""The engine end to end: values, bits, memory, lineage, and what a killed merge leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import fastmerge
from fastmerge import _C, api
from fastmerge.compute.cpu import cpu
from fastmerge.engine.in_memory import materialise_plan
from fastmerge.engine.inputs import Inputs, write_tensor
from fastmerge.errors import FastmergeError
from fastmerge.output.lineage import LINEAGE_FILE
from fastmerge.output.sink import array_sink


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def slerp_recipe(a, b, **more):
    return {
        "merge_method": "slerp",
        "base_model": str(a),
        "models": [{"model": str(a)}, {"model": str(b)}],
        "parameters": {"t": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.5}]},
        "dtype": "bfloat16",
        **more,
    }


def ties_recipe(base, *models, method="ties", **more):
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [
            {"model": str(m), "parameters": {"density": 0.5, "weight": 0.5}} for m in models
        ],
        "dtype": "bfloat16",
        **more,
    }


def bf16(x):
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


@pytest.fixture
def models(zoo):
    base = zoo.base(layers=3)
    return base, zoo.tune(base, "one", seed=1, shards=3), zoo.tune(base, "two", seed=2)


def test_linear_merge_has_the_right_values(zoo, models, tmp_path):
    _, one, two = models
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(one), "parameters": {"weight": 0.25}},
            {"model": str(two), "parameters": {"weight": 0.5}},
        ],
        "dtype": "bfloat16",
    }
    report = fastmerge.merge(recipe, tmp_path / "out", threads=2)
    x, y, out = zoo.read(one), zoo.read(two), zoo.read(tmp_path / "out")
    assert list(out) and set(out) == set(x)
    for name in x:
        exact = (0.25 * x[name].astype(np.float64) + 0.5 * y[name].astype(np.float64)) / 0.75
        # One rounding of an fp32 result: half a bf16 ulp and a little.
        np.testing.assert_allclose(out[name], exact, rtol=2**-8 * 1.001)
    assert report.tensors == len(out) and report.resumed == 0 and not report.nonfinite
    assert report.bytes_written > 0 and report.bytes_read == 2 * sum(2 * v.size for v in x.values())


def test_lineage_lies_beside_the_weights(models, tmp_path):
    base, one, _ = models
    fastmerge.merge(slerp_recipe(base, one), tmp_path / "out", seed=5)
    lineage = json.loads((tmp_path / "out" / LINEAGE_FILE).read_text())
    assert set(lineage["fastmerge_inputs"]) == {base.name, one.name}
    tensors = lineage["tensors"]
    c = tensors["model.layers.0.mlp.up_proj.weight"]["coefficients"]
    assert set(c) == {base.name, one.name} and 0 < c[one.name] < c[base.name]
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["fastmerge_inputs"]) == lineage["fastmerge_inputs"]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp"])
def test_the_same_bytes_for_every_thread_count_and_instruction_set(models, tmp_path, method):
    base, one, two = models
    recipe = (
        slerp_recipe(base, one)
        if method == "slerp"
        else ties_recipe(base, one, two, method=method, seed=3)
    )
    before = _C.isa()
    seen = set()
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            for threads in (1, 2, 7):
                out = tmp_path / f"{isa}{threads}"
                fastmerge.merge(recipe, out, threads=threads)
                seen.add((out / "model.safetensors").read_bytes())
                (out / "model.safetensors").unlink()
    finally:
        _C.set_isa(before)
    assert len(seen) == 1


def test_another_seed_drops_others(models, tmp_path):
    base, one, two = models
    recipe = ties_recipe(base, one, two, method="dare_ties")
    outs = []
    for number, seed in enumerate((1, 1, 2)):
        report = fastmerge.merge(recipe, tmp_path / str(number), seed=seed)
        assert report.seed == seed
        outs.append((tmp_path / str(number) / "model.safetensors").read_bytes()[4096:])
    assert outs[0] == outs[1] != outs[2]


def test_a_drawn_seed_is_recorded_and_repeats(zoo, models, tmp_path):
    base, one, two = models
    recipe = ties_recipe(base, one, two, method="dare_linear")
    first = fastmerge.merge(recipe, tmp_path / "first")
    assert first.seed is not None
    fastmerge.merge(recipe, tmp_path / "again", seed=first.seed)
    a, b = zoo.read(tmp_path / "first"), zoo.read(tmp_path / "again")
    assert all(np.array_equal(a[n], b[n]) for n in a)


def test_ties_keeps_half_of_each_delta(models, tmp_path):
    base, one, two = models
    fastmerge.merge(ties_recipe(base, one, two), tmp_path / "out")
    lineage = json.loads((tmp_path / "out" / LINEAGE_FILE).read_text())["tensors"]
    assert lineage["model.norm.weight"]["kept"] == [16, 16]
    assert lineage["model.embed_tokens.weight"]["kept"] == [640, 640]


def test_an_intermediate_consensus_keeps_fp32(zoo, models, tmp_path):
    """TIES feeding a SLERP: no folder, no rounding in between, no coefficients in the lineage."""
    base, one, two = models
    stage = ties_recipe(base, one, two, name="stage")
    final = slerp_recipe("stage", one)
    fastmerge.merge([stage, final], tmp_path / "chain")
    fastmerge.merge({**stage, "dtype": "float32"}, tmp_path / "stage")
    fastmerge.merge(slerp_recipe(tmp_path / "stage", one), tmp_path / "two_steps")
    a, b = zoo.read(tmp_path / "chain"), zoo.read(tmp_path / "two_steps")
    assert all(np.array_equal(a[n], b[n]) for n in a)
    assert not (tmp_path / "stage-1").exists()
    lineage = json.loads((tmp_path / "chain" / LINEAGE_FILE).read_text())["tensors"]
    assert all("coefficients" not in line for line in lineage.values())


def test_large_intermediates_leave_memory(models, tmp_path, monkeypatch):
    """Below the scratch limit and above it (an unlinked file): the same bytes."""
    monkeypatch.setattr("fastmerge.engine.merge.LEAST_MEMORY_BYTES", 1)
    base, one, two = models
    chain = [ties_recipe(base, one, two, name="stage"), slerp_recipe("stage", one)]
    for folder, limit in (("memory", 512 << 20), ("file", 4096)):
        (tmp_path / folder).mkdir()
        fastmerge.merge(chain, tmp_path / folder / "out", memory_limit=limit)
    assert digest(tmp_path / "memory" / "out") == digest(tmp_path / "file" / "out")


def test_nan_and_inf_are_counted_and_stay(zoo, models, tmp_path):
    base, one, _ = models
    tensors = zoo.read(one)
    tensors["model.norm.weight"][3] = np.nan
    tensors["model.norm.weight"][5] = np.inf
    bad = zoo.write("bad", tensors, json.loads((one / "config.json").read_text()))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (base, bad)],
    }
    report = fastmerge.merge(recipe, tmp_path / "out")
    assert report.nonfinite == {"model.norm.weight": 2}
    norm = zoo.read(tmp_path / "out")["model.norm.weight"]
    assert np.isnan(norm[3]) and np.isinf(norm[5]) and np.isfinite(np.delete(norm, [3, 5])).all()


def test_materialise_gives_what_is_written(zoo, models, tmp_path):
    base, one, two = models
    recipe = ties_recipe(base, one, two)
    fastmerge.merge(recipe, tmp_path / "out")
    made = dict(fastmerge.materialise(recipe))
    out = zoo.read(tmp_path / "out")
    assert set(made) == set(out)
    for name, array in made.items():
        assert array.dtype == np.uint16 and array.shape == out[name].shape
        np.testing.assert_array_equal((array.astype(np.uint32) << 16).view(np.float32), out[name])


def test_shards_hold_the_same_tensors(zoo, models, tmp_path):
    base, one, _ = models
    fastmerge.merge(slerp_recipe(base, one), tmp_path / "whole")
    fastmerge.merge(slerp_recipe(base, one), tmp_path / "cut", max_shard_bytes=20_000)
    assert len(list((tmp_path / "cut").glob("model-0*-of-0*.safetensors"))) > 2
    a, b = zoo.read(tmp_path / "whole"), zoo.read(tmp_path / "cut")
    assert a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def test_progress_reaches_the_total(models, tmp_path):
    base, one, _ = models
    seen = []
    fastmerge.merge(slerp_recipe(base, one), tmp_path / "out", progress=lambda *a: seen.append(a))
    assert [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] and len(seen) == len({name for _, _, name in seen})


def test_an_error_in_the_middle_leaves_no_target_and_can_go_on(models, tmp_path, monkeypatch):
    base, one, _ = models
    recipe = slerp_recipe(base, one)
    calls = []
    real = _C.combine

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 9:
            raise RuntimeError("cosmic ray")
        return real(*args, **kwargs)

    monkeypatch.setattr(_C, "combine", failing)
    with pytest.raises(RuntimeError, match="cosmic ray"):
        fastmerge.merge(recipe, tmp_path / "out", threads=1)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    fastmerge.merge(recipe, tmp_path / "out", threads=1)
    (tmp_path / "plain").mkdir()
    fastmerge.merge(recipe, tmp_path / "plain" / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "plain" / "out")


# --- killed ---------------------------------------------------------------------------------------


def start(recipe: Path, out: Path, *more: str) -> subprocess.Popen:
    """One thread and scalar kernels: half a second to be killed in, without gigabytes."""
    command = [sys.executable, "-m", "fastmerge", "merge", str(recipe), str(out)]
    return subprocess.Popen(
        [*command, "--threads", "1", *more],
        env={**os.environ, "FASTMERGE_ISA": "scalar"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_tensors(process: subprocess.Popen, out: Path, count: int) -> None:
    """Until the running merge has journalled ``count`` tensors."""
    journal = out.with_name(f".{out.name}.fastmerge-journal")
    while process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") > count:
            return
        time.sleep(0.001)
    raise AssertionError(f"ended before {count} tensors: {process.stderr.read().decode()}")


@pytest.fixture
def killable(zoo, tmp_path):
    """A DARE-TIES merge of 3 x 25 MB in 200 tensors."""
    rng = np.random.default_rng(4)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(200)]
    table = rng.normal(size=(256, 256)).astype(np.float32)
    models = [
        zoo.write(
            f"big-{which}", {n: np.roll(table, i + which, axis=1) for i, n in enumerate(names)}
        )
        for which in range(3)
    ]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(ties_recipe(*models, method="dare_ties", seed=9)))
    return recipe


def test_killed_at_thirty_random_moments(killable, tmp_path):
    """SIGKILL: the target is absent or whole, and the same command ends byte for byte the same.

    The moments: 5 on the way to the first tensor, 25 a little after a random number of tensors.
    """
    (tmp_path / "clean").mkdir()
    began = time.perf_counter()
    process = start(killable, tmp_path / "clean" / "out")
    wait_for_tensors(process, tmp_path / "clean" / "out", 0)
    first = time.perf_counter() - began
    assert process.wait() == 0
    expected = digest(tmp_path / "clean" / "out")
    rng = random.Random(20)
    killed = resumed = 0
    for number in range(30):
        out = tmp_path / f"run{number}" / "out"
        out.parent.mkdir()
        process = start(killable, out)
        if number < 5:
            time.sleep(rng.uniform(0.3, 1.0) * first)
        else:
            wait_for_tensors(process, out, rng.randrange(180))
            time.sleep(rng.expovariate(1 / 0.005))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if out.exists():
            assert digest(out) == expected
            continue
        report = fastmerge.merge(killable, out)
        resumed += report.resumed > 0
        assert digest(out) == expected
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert killed >= 20 and resumed >= 20


def test_finished_tensors_are_not_computed_again(killable, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real = _C.consensus
    done = []

    def failing(*args, **kwargs):
        if len(done) == 150:
            raise RuntimeError("stop")
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(_C, "consensus", failing)
    with pytest.raises(RuntimeError, match="stop"):
        fastmerge.merge(killable, out, threads=1)
    monkeypatch.undo()
    report = fastmerge.merge(killable, out)
    # 32 of these tensors share a 4 MiB buffer: two may not be full, and one not be on the disk yet;
    # 4 are under way.
    assert report.resumed >= 150 - 3 * 32 - 4
    lineage = json.loads((out / LINEAGE_FILE).read_text())["tensors"]
    assert len(lineage) == 200 and all(line["kept"] for line in lineage.values())


def test_changed_inputs_are_noticed(killable, tmp_path):
    out = tmp_path / "out"
    process = start(killable, out)
    wait_for_tensors(process, out, 40)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not out.exists()
    weights = tmp_path / "big-0" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(FastmergeError, match=r"other inputs or another recipe.*fresh=True"):
        fastmerge.merge(killable, out)
    assert not out.exists()
    report = fastmerge.merge(killable, out, fresh=True)
    assert report.resumed == 0


def test_overwrite_keeps_the_old_model_until_the_new_one_is_whole(killable, models, tmp_path):
    out = tmp_path / "out"
    base, one, _ = models
    fastmerge.merge(slerp_recipe(base, one), out)
    before = digest(out)
    with pytest.raises(FastmergeError, match="exists"):
        fastmerge.merge(killable, out)
    process = start(killable, out, "--overwrite")
    wait_for_tensors(process, out, 40)
    process.kill()
    assert process.wait() == -signal.SIGKILL and digest(out) == before
    assert start(killable, out, "--overwrite").wait() == 0
    assert digest(out) != before


def test_a_document_is_drawn_once_whatever_uses_it(zoo, models, tmp_path):
    """DARE keys its masks by the tensor's name in its own document: stacked twice, the layers are
    the same; so is a run of the two documents one after the other."""
    base, one, two = models
    drawn = {**ties_recipe(base, one, two, name="drawn"), "merge_method": "dare_ties", "seed": 5}
    layers = [{"sources": [{"model": "drawn", "layer_range": [0, 2]}]}] * 2
    stacked = {"merge_method": "passthrough", "slices": layers, "dtype": "bfloat16"}
    fastmerge.merge([drawn, stacked], tmp_path / "out")
    found = zoo.read(tmp_path / "out")
    for name, value in found.items():
        if ".layers.0." in name:
            np.testing.assert_array_equal(found[name.replace(".0.", ".2.")], value)


def chain_of_ties(models, depth):
    """The plan of so many documents, each merged from the one before."""
    base, one, two = models
    chain = [ties_recipe(base, one, two, name="s0")]
    chain += [ties_recipe(base, f"s{i - 1}", two, name=f"s{i}") for i in range(1, depth)]
    del chain[-1]["name"]
    return api.plan(chain)


def test_intermediates_share_one_budget_and_end_with_their_last_reader(models, tmp_path):
    """Ten documents deep: two intermediates at a time, wherever they lie."""
    from fastmerge.compute.cpu import CpuBackend
    from fastmerge.compute.tensor import Computation

    plan = chain_of_ties(models, 10)
    item = max(plan.tensors, key=lambda tensor: tensor.count)
    backend = CpuBackend(1, scratch_folder=tmp_path, scratch_bytes=9 * item.count)
    living, most, taken = [0], [0], backend._take_scratch

    def counted(nbytes: int) -> bool:
        living[0] += nbytes // (4 * item.count)
        most[0] = max(most[0], living[0])
        return taken(nbytes)

    backend._take_scratch = counted
    array, sink = array_sink(item)
    fetch = Inputs(plan.models).fetch
    Computation(backend, fetch, item.name, item.shape).run(item.root, sink)
    assert most == [2] and backend._scratch_left == 9 * item.count
    made = {tensor.name: values for tensor, values in materialise_plan(plan)}
    np.testing.assert_array_equal(array, made[item.name])


def test_a_chain_of_a_thousand_documents_is_no_deeper_than_one(models):
    plan = chain_of_ties(models, 1000)
    item = min(plan.tensors, key=lambda tensor: tensor.count)
    array, sink = array_sink(item)
    backend = cpu(1)
    write_tensor(backend, Inputs(plan.models), item, [sink])
    assert array.any()


def test_no_room_for_an_intermediate_is_one_line(models, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    base, one, two = models
    chain = [ties_recipe(base, one, two, name="stage"), slerp_recipe("stage", one)]
    monkeypatch.setattr("fastmerge.engine.merge.LEAST_MEMORY_BYTES", 1)
    monkeypatch.setattr("fastmerge.compute.cpu.os.posix_fallocate", full)
    with pytest.raises(FastmergeError, match="no room for an intermediate tensor"):
        fastmerge.merge(chain, tmp_path / "out", memory_limit=4096)


def test_an_input_that_changes_during_the_merge_is_noticed(models, tmp_path):
    base, one, _ = models
    weights = next(Path(one).glob("*.safetensors"))

    def rewrite(*_: object) -> None:
        with weights.open("r+b") as file:  # in place: a mapped file that shrinks is a SIGBUS
            file.write(weights.read_bytes())

    with pytest.raises(FastmergeError, match="changed while it was being read"):
        fastmerge.merge(slerp_recipe(base, one), tmp_path / "out", progress=rewrite)
    assert not (tmp_path / "out").exists()
    fastmerge.merge(slerp_recipe(base, one), tmp_path / "out")  # nothing stale is in its way


def test_what_python_callers_get_wrong_is_one_line(models, tmp_path):
    recipe = slerp_recipe(*models[:2])
    for wrong, message in (
        ({"io": "mmap"}, "io: unknown 'mmap'"),
        ({"memory_limit": 0}, "memory_limit: 0 is not"),
        ({"max_shard_bytes": -1}, "max_shard_bytes: -1 is not"),
        ({"gpu_memory": "2GiB"}, "gpu_memory: '2GiB' is not"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ):
        with pytest.raises(FastmergeError, match=message):
            fastmerge.merge(recipe, tmp_path / "out", **wrong)
    drawn = {**ties_recipe(*models), "merge_method": "dare_ties"}
    with pytest.raises(FastmergeError, match="this plan has 5 already"):
        fastmerge.merge(api.plan(drawn, seed=5), tmp_path / "out", seed=3)
    whole = {"threads": np.int64(2), "memory_limit": np.int64(64 << 20), "seed": np.int64(4)}
    fastmerge.merge(api.plan(recipe), tmp_path / "out", **whole)  # a seed that nothing draws from

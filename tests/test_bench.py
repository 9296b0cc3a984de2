"""`fastmerge bench`: figures only of what was seen to be right, in a state of the cache that was
seen to be so; what stands in the way is said before anything is written.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmerge import _C, api
from fastmerge.bench import check, kernels, pagecache, peers, process, recipes, request, tensors
from fastmerge.bench import run as runs
from fastmerge.bench import wholes as processes
from fastmerge.bench.checkpoints import SHAPES, write_adapter, write_set
from fastmerge.bench.plots import _lines, report_png
from fastmerge.bench.report import markdown
from fastmerge.bench.request import Request
from fastmerge.bench.rows import WrongResultError, ratios, spread
from fastmerge.errors import FastmergeError

TINY = ("--size", "tiny", "--repeat", "1", "--threads", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_set(tmp_path_factory.mktemp("set"), "tiny", 3)


def silent(_: str) -> None:
    pass


# ---------------------------------------------------------------- figures


def test_a_spread_is_a_median_with_quartiles() -> None:
    assert spread([3, 1, 2, 5, 4]) == {"median": 3, "low": 2, "high": 4, "best": 1}
    assert spread([2.0]) == {"median": 2, "low": 2, "high": 2, "best": 2}
    assert spread([1, 2]) == {"median": 1.5, "low": 1, "high": 2, "best": 1}
    assert ratios([2, 9], [1, 3])["median"] == 2.5  # within each repetition


def test_merges_to_json_plot_and_text(bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = tmp_path / "found.json", tmp_path / "found.png"
    code, out, err = bench(
        "merge", *TINY, "--methods", "linear,ties", "--json", files[0], "--plot", files[1]
    )
    assert code == 0, err
    report = json.loads(files[0].read_text())
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert {"processor", "cores", "instruction set", "memory", "disk", "GPU", "fastmerge"} <= set(
        report["machine"]
    )
    names = [ceiling["name"] for ceiling in report["ceilings"]]
    assert names == [
        "memory copy", "memory read", "page-cache read", "cold read", "direct write",
        "device copy", "pinned copy to the device", "pinned copy from the device",
    ]  # fmt: skip
    for ceiling in report["ceilings"]:
        assert "absent" in ceiling or ceiling["gigabytes_per_second"]["median"] > 0
    warm = [row for row in report["jobs"] if row["cache"] == "warm"]
    assert [row["job"] for row in warm] == ["linear, 2 models", "ties, 3 models, density 0.5"]
    nbytes = 2 * SHAPES["tiny"].parameters
    for row in warm:
        assert row["bytes"] == pytest.approx((row["models"] + 1) * nbytes, rel=0.01)
        assert row["seconds"]["median"] > 0 and row["peak_anonymous_bytes"] > 0
        expected = row["ceiling_seconds"]["median"] / row["seconds"]["median"]
        assert row["share_of_ceiling"]["median"] == pytest.approx(expected)
        assert "by checksum, 3 against NumPy" in row["checked"]
        assert set(row["runs"]) == {"floor", "fastmerge"}
        assert f"| {row['job']} | tiny | warm |" in out
    # Cold figures are there, or why not.
    cold = [row for row in report["jobs"] if row["cache"] == "cold"]
    assert len(cold) + len(report["notes"]) == 2
    assert "bench: " in err and "bench: " not in out
    assert not list((tmp_path / "here").iterdir())


def test_the_text_is_markdown(bench) -> None:
    code, out, _ = bench("fold", *TINY)
    assert code == 0
    assert (
        out.startswith("# fastmerge bench\n\n```sh\nfastmerge bench fold ")
        and "\n\nprocessor " in out
    )
    tables = [part for part in out.split("\n\n") if part.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        lines = table.strip().splitlines()
        assert lines[1].startswith("| ---")
        assert len({line.count("|") for line in lines}) == 1


def test_a_walk_of_several_lengths(bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "walk.json"
    code, _, err = bench("walk", *TINY, "--steps", "1,3", "--json", file)
    assert code == 0, err
    report = json.loads(file.read_text())
    assert [row["steps"] for row in report["jobs"]] == [1, 3]
    assert all("step by step" in row["checked"] for row in report["jobs"])
    assert all(row["peers"]["one-shot"]["times"]["median"] > 0 for row in report["jobs"])
    ((_, line),) = _lines(report["jobs"], "steps")
    assert [row["steps"] for row in line] == [1, 3]
    assert not _lines(report["jobs"], "models")
    assert report_png(report).startswith(b"\x89PNG")


def test_kernels_and_ops_stay_in_memory(bench, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    code, out, err = bench("kernels", *TINY, "--json", file)
    assert code == 0, err
    rows = json.loads(file.read_text())["jobs"]
    assert len(rows) == 11 and {row["isa"] for row in rows} == {_C.isa()}
    assert all(row["gigabytes_per_second"] > 0 and row["checked"] for row in rows)
    assert "cold read" not in out  # no disk took part


def test_ops_are_checked_in_every_type() -> None:
    for dtype, torch in (("F32", False), ("F16", False), ("BF16", True)):
        if torch:
            pytest.importorskip("torch")
        for op, case in tensors.cases(1 << 14, dtype, threads=1, torch=torch).items():
            made = tensors._bits(case.ours(), dtype).ravel()
            assert case.check(made)
            off = made.copy()
            off[: 1 << 13] = 0
            with pytest.raises(WrongResultError, match=op):
                case.check(off)


def test_the_users_own_models_are_only_read(bench, zoo, tmp_path: Path) -> None:
    base = zoo.base("base")
    tune = zoo.tune(base, "tune")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in zoo.root.glob("*/*")}
    file = tmp_path / "own.json"
    code, out, err = bench(
        "--models", base, tune, "--repeat", "1", "--methods", "linear,slerp", "--cache", "warm",
        "--json", file,
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(file.read_text())
    assert [row["job"] for row in report["jobs"]] == ["linear, 2 models", "slerp, 2 models"]
    assert report["jobs"][0]["names"] == ["base", "tune"]
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in zoo.root.glob("*/*")}
    assert after == before
    assert "against NumPy" in report["jobs"][0]["checked"] and "| base" not in out


@pytest.mark.parametrize("name", ["torch", "mergekit"])
def test_peers_merge_the_same(name: str, models, tmp_path: Path) -> None:
    pytest.importorskip(name)
    recipe = tmp_path / "linear.yml"
    recipe.write_text(json.dumps(recipes.JOBS["linear"].recipe(models, "bfloat16")))
    done = peers.run_peer(name, recipe, tmp_path / "out")
    assert done.seconds > 0 and done.detail["import"] > 0
    api.merge(str(recipe), tmp_path / "ours")
    for item in api.plan(str(recipe)).tensors:
        ours, theirs = (
            check.array_of(check.Checkpoint.open(tmp_path / folder).view(item.name))
            for folder in ("ours", "out")
        )
        right = check.widen(ours).astype(np.float64)
        # mergekit adds in bf16.
        assert np.abs(check.widen(theirs) - right).max() < 2**-7 * np.abs(right).max()


# ---------------------------------------------------------------- wrong results


def test_a_wrong_kernel_has_no_figure(bench, monkeypatch) -> None:
    right = _C.combine

    def wrong(pool, inputs, coefficients, out, **rest):
        return right(pool, inputs, coefficients * 1.01, out, **rest)

    monkeypatch.setattr(_C, "combine", wrong)
    code, out, err = bench("kernels", *TINY)
    assert code == 2 and not out
    assert "error: combine, 2 on " in err and "no figure is given" in err


@pytest.mark.parametrize("name", ["gram, 2", "select, trim 2", "consensus, TIES 2", "copy"])
def test_each_kind_of_kernel_is_checked(name: str) -> None:
    made, out = kernels.cases(1 << 12, "BF16")
    kernel, right = made[name], made[name].right()
    kernels.check(name, kernel, out, right)
    if kernel.writes:
        wrong = right.copy()
        wrong[-1] ^= 1
    elif isinstance(right, np.ndarray):
        wrong = right * (1 + 1e-6)
    else:
        wrong = [right[0], right[1]._replace(kept=right[1].kept - 1)]
    with pytest.raises(WrongResultError, match=name):
        kernels.check(name, kernel, out, wrong)


@pytest.fixture
def linear(models, tmp_path: Path):
    """A merge to be measured, and its request and place."""
    asked = Request(kinds=("merge",), methods=("linear",), repeat=1, caches=("warm",))
    (whole,) = processes.merges(models, asked, tmp_path, "bfloat16", {"size": "tiny"})
    return whole, tmp_path, asked


def test_another_merge_than_asked_for_has_no_figure(linear, models) -> None:
    whole, place, asked = linear
    job = replace(recipes.JOBS["linear"], per_model={"weight": 0.5})
    unequal = job.recipe(models, "bfloat16")
    unequal["models"][0]["parameters"] = {"weight": 0.6}
    (place / "other.yml").write_text(json.dumps(unequal))
    planted = replace(whole, command=processes.fastmerge("merge", place / "other.yml"))
    with pytest.raises(WrongResultError, match="differ from NumPy's"):
        processes.run(planted, place, asked, silent)
    rows, notes = processes.run(whole, place, asked, silent)
    assert len(rows) == 1 and not notes


def test_damaged_output_has_no_figure(linear, monkeypatch) -> None:
    whole, place, asked = linear

    def damaged(command, **how):
        done = process.measure(command, **how)
        file = place / "out" / "model.safetensors"
        with open(file, "r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last[0] ^ 1]))
        return done

    monkeypatch.setattr(processes, "measure", damaged)
    with pytest.raises(WrongResultError, match="not what was merged"):
        processes.run(whole, place, asked, silent)


def test_runs_that_differ_have_no_figure(linear, monkeypatch) -> None:
    whole, place, asked = linear
    found = iter(["a", "b"])
    monkeypatch.setattr(check, "checksums", lambda folder: {"x": next(found)})
    with pytest.raises(WrongResultError, match="another run wrote other bits"):
        processes.run(whole, place, replace(asked, repeat=2), silent)


def test_another_walk_has_no_figure(models, tmp_path: Path, monkeypatch) -> None:
    asked = Request(kinds=("walk",), steps=(3,), repeat=1, caches=("warm",))
    (whole,) = processes.walks(models, asked, tmp_path, "bfloat16", {"size": "tiny"})
    monkeypatch.setattr(recipes, "DEGRADE", 0.5)  # after the schedule was written
    with pytest.raises(WrongResultError, match="differ from NumPy's"):
        processes.run(whole, tmp_path, asked, silent)


def test_another_adapter_has_no_figure(models, tmp_path: Path) -> None:
    asked = Request(kinds=("fold",), repeat=1, caches=("warm",))
    (whole,) = processes.folds(models[:1], asked, tmp_path, {"size": "tiny"})
    write_adapter(tmp_path / "other", models[0], 4)
    planted = replace(whole, command=processes.fastmerge("fold", models[0], tmp_path / "other"))
    with pytest.raises(WrongResultError, match="differ from NumPy's"):
        processes.run(planted, tmp_path, asked, silent)


@pytest.mark.parametrize("method", ["della", "ram", "arcee_fusion", "nearswap", "breadcrumbs"])
def test_numpy_knows_every_kind_of_method(method: str, models, tmp_path: Path) -> None:
    recipe = recipes.JOBS[method].recipe(models, "bfloat16")
    api.merge(recipe, tmp_path / "out")
    assert "3 against NumPy" in check.written(tmp_path / "out", recipe)


# ---------------------------------------------------------------- warm and cold


def test_warm_is_in_memory_and_cold_is_not(models) -> None:
    files = [file for model in models for file in pagecache.files_of(model)]
    assert pagecache.warm(models).share == 1
    state = pagecache.evict(files)
    if not state.is_cold:  # tmpfs
        assert state.share > 0.01 and "stayed in memory" in state.why_not_cold
    assert pagecache.warm(models).is_warm


def test_what_another_process_maps_is_not_called_cold(models, linear) -> None:
    whole, place, asked = linear
    held = [np.memmap(pagecache.files_of(model)[0], np.uint8, "r") for model in models]
    assert sum(int(each.sum(dtype=np.uint64)) for each in held)
    rows, notes = processes.run(whole, place, replace(asked, caches=("cold",)), silent)
    assert not rows
    assert len(notes) == 1 and "cannot be made cold" in notes[0]


def test_what_the_kernel_does_not_tell_is_not_called_cold(linear, monkeypatch) -> None:
    whole, place, asked = linear
    monkeypatch.setattr(pagecache, "_tells", lambda path: False)
    rows, notes = processes.run(whole, place, replace(asked, caches=("cold",)), silent)
    assert not rows and "another user's" in notes[0]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "words, said",
    [
        (["--size", "2b"], "--size: unknown '2b'; "),
        (["--methods", "linear,tees"], "--methods: unknown 'tees'; did you mean 'ties'"),
        (["--against", "numpy"], "--against: unknown 'numpy'; known: mergekit, peft, torch"),
        (["fold", "--against", "mergekit"], "fold cannot be compared with it; merge and walk can"),
        (["merge", "--methods", "ram", "--against", "torch"], "no plain torch for ram"),
        (["merge", "--count", "1"], "--count: '1' is not a whole number from 2 to 64"),
        (["walk", "--count", "3"], "--count: of walk the number of models is fixed"),
        (["merge", "--steps", "3"], "--steps: says nothing about merge; it is for walk"),
        (["kernels", "--cache", "cold"], "--cache: says nothing about kernels; it is for merge"),
        (["walk", "--methods", "ties"], "--methods: says nothing about walk; it is for merge"),
        (["--steps", "ten"], "--steps: 'ten' is not a whole number from 1"),
        (["kernels", "--models", "./a", "b"], "a: no such"),
        (["--folder", "gone"], "gone: no such folder"),
        (["--json", "."], "--json: .: is a folder"),
        (["--json", "gone/x.json"], "--json: gone/x.json: no folder gone"),
        (["--plot", "gone/x.png"], "--plot: gone/x.png: no folder gone"),
        (["--json", "x", "--plot", "./x"], "--json and --plot: both are x"),
        (["--threads", "0"], "--threads: 0 threads"),
        (["--repeat", "0"], "0 is less than 1"),
        (["knerels"], "'knerels' is not one of"),
    ],
)  # fmt: skip
def test_bad_words_are_one_line_at_once(words: list[str], said: str, bench, tmp_path: Path) -> None:
    code, out, err = bench(*words)
    assert code == 2 and not out
    assert said in err.splitlines()[-1]
    assert not list((tmp_path / "here").iterdir())


def test_models_that_cannot_be_measured(bench, zoo) -> None:
    base = zoo.base("base")
    tune = zoo.tune(base, "tune")
    other = zoo.base("other", hidden=64)
    write_adapter(zoo.root / "lora", base, 2)
    for words, said in (
        (["kernels", "--models", base, tune], "kernels measure tensors in memory"),
        (["merge", "--models", base], "give two or more"),
        (["merge", "--count", "2", "--models", base, tune], "follows from --models"),
        (["merge", "--size", "7b", "--models", base, tune], "--models are yours; leave one"),
        (["merge", "--models", base, zoo.root / "lora"], "an adapter; merge takes models"),
        (["merge", "--models", base, other], "other"),
        (["walk", "--models", base, "s3://bucket/model"], "download it first"),
    ):
        code, out, err = bench(*words, "--repeat", "1")
        assert (code, out) == (2, ""), words
        assert said in err.splitlines()[-1]


def test_an_adapter_beside_its_base_is_folded(bench, models, tmp_path: Path) -> None:
    adapter = tmp_path / "lora $\\frac |<b>*x*\n| y"  # a downloaded folder may have any name
    write_adapter(adapter, models[0], 2)
    words = ("--models", models[0], adapter, "--repeat", "1", "--plot", tmp_path / "figures.png")
    code, out, err = bench(*words)
    assert code == 0, err
    assert r"| fold, lora &#36;\\frac \|\<b\>\*x\*\\n\| y |" in out
    assert (tmp_path / "figures.png").stat().st_size


def test_a_missing_package_is_said_before_the_start(bench, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(request, "find_spec", lambda name: None)
    code, _, err = bench("merge", *TINY, "--against", "mergekit")
    assert code == 2
    assert "error: --against mergekit: mergekit is not installed; pip install" in err
    _, _, err = bench("fold", *TINY, "--against", "peft")
    assert err.endswith("[llama]' peft\n")  # one command for both packages
    assert not list((tmp_path / "here").iterdir())


def test_no_room_is_said_before_the_start(bench, monkeypatch, tmp_path: Path) -> None:
    found = os.statvfs(tmp_path)
    little = os.statvfs_result([*found[:4], 10, *found[5:10]])
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    code, _, err = bench("merge", "--size", "7b")
    assert code == 2
    assert "no space left: needs 58.9" in err or "no space left: needs" in err
    assert not list((tmp_path / "here").iterdir())


# ---------------------------------------------------------------- nothing stays


@pytest.mark.parametrize(
    "number, said", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_stopped_benchmark_leaves_nothing(number: int, said: str, tmp_path: Path) -> None:
    words = ["merge", "--size", "tiny", "--repeat", "500", "--threads", "1", "--folder", tmp_path]
    child = subprocess.Popen(
        [sys.executable, "-m", "fastmerge", "bench", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background job ignores Ctrl-C, and what it starts does.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    assert child.stderr is not None
    for line in child.stderr:
        if " of 500" in line:
            break
    assert list(tmp_path.glob("fastmerge-bench-*"))
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + number and not out
    assert f"error: {said}" in err
    assert not list(tmp_path.iterdir())


def test_a_failed_process_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FastmergeError, match=r"ended with 3: no such luck$"):
        process.measure(
            [sys.executable, "-c", "import sys; sys.stderr.write('no such luck\\n'); sys.exit(3)"]
        )
    ours = np.ones(1 << 28, np.uint8)  # a child's memory is its own, not what it was copied from
    began = time.perf_counter()
    used = process.measure(
        [sys.executable, "-c", "import time; print('x' * 100_000); time.sleep(0.2)"],
        folder=tmp_path,
    )
    assert 0 < used.seconds <= time.perf_counter() - began
    assert len(used.stdout) == 100_001
    assert 0 < used.peak_anonymous_bytes <= used.peak_rss_bytes < ours.nbytes


def test_no_other_command_loads_it() -> None:
    code = (
        "import sys\nfrom fastmerge.cli import main\n"
        "try:\n    main(['methods', 'slerp'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in sys.modules if name.startswith('fastmerge.bench')])"
    )
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.splitlines()[-1] == "[]"


def test_a_size_that_has_several_figures_in_a_plot() -> None:
    found = [
        {"kind": "merge", "method": m, "cache": "warm", "parameters": n, "models": 2, "steps": None}
        for m in ("linear", "ties")
        for n in (7e9, 2e8, 1.1e9)
    ]
    lines = _lines(found, "parameters")
    assert [name for name, _ in lines] == ["linear, warm", "ties, warm"]
    assert [row["parameters"] for row in lines[0][1]] == [2e8, 1.1e9, 7e9]
    assert not _lines(found, "models")
    found[-1]["cache"] = "94% warm"  # of more than memory holds: of the same line
    assert [len(line) for _, line in _lines(found, "parameters")] == [3, 3]


def test_a_set_is_made_for_the_most_models() -> None:
    asked = Request(kinds=("merge",), methods=("linear", "slerp"), counts=(2, 4, 16))
    assert asked.most_models == 16
    assert [job.models for job in asked.merges] == [2, 4, 16, 2]
    assert Request(kinds=("walk",)).most_models == 3
    assert runs.FORMAT == 1 and markdown.__doc__


def test_holes_are_for_memory_alone(tmp_path: Path) -> None:
    asked = Request(
        kinds=("merge",), sizes=("tiny",), methods=("linear",), sparse=True, repeat=1,
        folder=tmp_path,
    )  # fmt: skip
    report = runs.run(asked)
    (row,) = report["jobs"]
    assert row["cache"] == "holes" and "share_of_ceiling" not in row
    assert row["peak_anonymous_bytes"] > 0 and "against NumPy" in row["checked"]
    assert "their seconds say nothing" in markdown(report)

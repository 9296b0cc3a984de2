"""The command line where all goes well, and Ctrl-C."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import pytest

from fastmerge import units
from fastmerge.cli import console, main, options
from fastmerge.errors import FastmergeError
from fastmerge.methods import METHODS

SLERP = """\
merge_method: slerp
base_model: {base}
models: [{{model: {base}}}, {{model: {tune}}}]
parameters: {{t: 0.25}}
"""
DARE = """\
merge_method: dare_ties
base_model: {base}
models: [{{model: {tune}, parameters: {{weight: 1.0, density: 0.5}}}}]
"""


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(capsys):
    """Runs a command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def recipe(zoo) -> Path:
    """SLERP of a base and a fine-tune of 20 tensors; beside it dare.yml, which draws at random."""
    base = zoo.base()
    models = {"base": base, "tune": zoo.tune(base, "tune")}
    (zoo.root / "dare.yml").write_text(DARE.format(**models))
    path = zoo.root / "recipe.yml"
    path.write_text(SLERP.format(**models))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- merge


def test_merge(run, recipe, zoo):
    code, out, err = run("merge", recipe, zoo.root / "out", "--threads", 2)
    assert code == 0
    assert re.search(r"out: 21 tensors, 4\d\.\d KB in ", out) and "on 2 threads" in out
    tenths = [int(text) for text in re.findall(r"^merging to out: +(\d+) %", err, re.MULTILINE)]
    assert tenths[-1] == 100 and tenths == sorted(set(tenths)) and 2 <= len(tenths) <= 10
    merged, a, b = (zoo.read(zoo.root / name) for name in ("out", "base", "tune"))
    for name in a:
        x, y = a[name].ravel().astype(float), b[name].ravel().astype(float)
        theta = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        expected = (np.sin(0.75 * theta) * x + np.sin(0.25 * theta) * y) / np.sin(theta)
        np.testing.assert_allclose(merged[name].ravel(), expected, rtol=2**-8, atol=1e-6)


def test_quiet(run, recipe):
    assert run("merge", recipe, recipe.parent / "out", "--quiet") == (0, "", "")
    assert (recipe.parent / "out" / "model.safetensors").exists()


def test_json_is_all_there_is(run, recipe):
    out_folder = recipe.parent / "out"
    code, out, err = run("merge", recipe, out_folder, "--json", "--threads", 1, "--io", "buffered")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["out"] == str(out_folder)
    assert (report["threads"], report["io"], report["tensors"]) == (1, "buffered", 21)
    written = sum(path.stat().st_size for path in out_folder.glob("*.safetensors"))
    assert 0 < report["bytes_written"] <= written


def test_options_reach_the_engine(run, recipe):
    root = recipe.parent
    code, out, _ = run(
        "merge", root / "dare.yml", root / "out", "--seed", 9, "--max-shard-size", "1M",
        "--memory-limit", "300 MiB", "--fresh", "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["seed"] == 9
    code, out, err = run("merge", root / "dare.yml", root / "x", "--max-shard-size", "12KB")
    assert (code, out) == (2, "") and "'12KB' is 12000 bytes" in err


def test_derived_seed_is_told_and_repeats(run, recipe):
    root = recipe.parent
    _, out, _ = run("merge", root / "dare.yml", root / "one")
    (seed,) = re.findall(r"^seed (\d+)$", out, re.MULTILINE)
    run("merge", root / "dare.yml", root / "two", "--seed", seed, "-q")
    one, two = (files(root / name)["model.safetensors"] for name in ("one", "two"))
    assert one[-1000:] == two[-1000:]


def test_nan_is_told(run, recipe, zoo):
    tensors = zoo.read(zoo.root / "tune")
    tensors["model.norm.weight"][3] = np.nan
    config = json.loads((zoo.root / "base" / "config.json").read_text())
    zoo.write("tune", tensors, config)
    _, _, err = run("merge", recipe, zoo.root / "out")
    assert re.search(
        r"^warning: model\.norm\.weight: \d+ NaN or infinite values$", err, re.MULTILINE
    )
    _, out, err = run("merge", recipe, zoo.root / "quiet", "-q")
    assert not out and re.fullmatch(r"(warning: .* NaN or infinite values\n)+", err)


def test_overwrite(run, recipe):
    out = recipe.parent / "out"
    run("merge", recipe, out, "-q")
    first = files(out)
    assert run("merge", recipe, out, "-q")[0] == 2
    assert run("merge", recipe, out, "-q", "--overwrite") == (0, "", "")
    assert files(out) == first


# ---------------------------------------------------------------- plan, info, diff, methods


def test_plan_writes_nothing(run, recipe, zoo):
    before = sorted(zoo.root.rglob("*"))
    code, out, err = run("plan", recipe, zoo.root / "out")
    assert (code, err) == (0, "") and sorted(zoo.root.rglob("*")) == before
    assert re.search(r"^tensors +21 \(21 slerp\)$", out, re.MULTILINE)
    assert re.search(r"^read +\S+ KB, each tensor up to 2 times$", out, re.MULTILINE)
    assert re.search(r"^write +\S+ KB in 1 file$", out, re.MULTILINE)


def test_plan_tells_what_merge_does(run, recipe):
    root = recipe.parent
    for name in ("recipe.yml", "dare.yml"):
        planned = json.loads(run("plan", root / name, "--seed", 3, "--json")[1])
        report = json.loads(
            run("merge", root / name, root / f"{name}-out", "--seed", 3, "--json")[1]
        )
        assert planned["tensors"] == report["tensors"]
        assert planned["bytes_in"] == report["bytes_read"]
        assert planned["bytes_out"] <= report["bytes_written"]
        assert planned["notes"] == report["notes"]
        assert planned["seed"] == report["seed"]


def test_info(run, zoo):
    base = zoo.base(tied=True, shards=2)
    code, out, _ = run("info", base)
    assert code == 0
    parameters = sum(tensor.size for tensor in zoo.read(base).values())
    assert re.search(r"^architecture +LlamaForCausalLM \(llama\)$", out, re.MULTILINE)
    assert re.search(rf"^parameters +{parameters} \({parameters}\)$", out, re.MULTILINE)
    assert re.search(r"^tied embeddings +yes; lm_head not stored$", out, re.MULTILINE)
    assert re.search(r"^  BF16 +20 tensors", out, re.MULTILINE)
    found = json.loads(run("info", base, "--json")[1])
    assert found["parameters"] == parameters
    assert found["bytes"] == 2 * parameters
    assert found["types"] == [
        {"dtype": "BF16", "tensors": 20, "parameters": parameters, "bytes": 2 * parameters}
    ]
    assert found["files"] == {p.name: p.stat().st_size for p in base.glob("*.safetensors")}
    assert found["sizes"]["num_hidden_layers"] == 2 and found["side_files"] == ["config.json"]


def test_fingerprint_follows_the_weights(run, zoo):
    base = zoo.base()

    def fingerprint(path: Path) -> str:
        return json.loads(run("info", path, "--json")[1])["fingerprint"]

    copy = shutil.copytree(base, zoo.root / "copy")
    assert fingerprint(copy) == fingerprint(base) != fingerprint(zoo.tune(base, "tune"))


def test_diff(run, zoo):
    base = zoo.base()
    tune = zoo.tune(base, "tune", dtype="F32", size=0.01)
    code, out, _ = run("diff", base, tune)
    assert code == 0
    row = re.search(r"lm_head\.weight +40x32 +BF16/F32 +(\S+) +(\S+) +\S+% +0\.9\d+ ", out)
    assert row is not None
    gap = np.abs(zoo.read(base)["lm_head.weight"] - zoo.read(tune)["lm_head.weight"])
    assert float(row[1]) == pytest.approx(gap.max(), rel=0.01)
    assert float(row[2]) == pytest.approx(gap.mean(), rel=0.01)
    assert out.splitlines()[-1].startswith("21 of 21 shared tensors differ")
    found = json.loads(run("diff", base, tune, "--json", "--limit", 2)[1])
    assert len(found["tensors"]) == 2 and found["same"] is False
    same = run("diff", base, base)
    assert same[0] == 0 and same[1].splitlines()[-1] == "the same: 21 tensors, every bit"


def test_diff_json_knows_no_nan(run, zoo):
    """NaN and infinity are not JSON; strict readers refuse them."""
    base = zoo.write("a", {"w": np.array([1.0, np.inf])}, dtype="F32")
    other = zoo.write("b", {"w": np.array([1.0, np.nan])}, dtype="F32")
    out = run("diff", base, other, "--json")[1]
    json.loads(out, parse_constant=lambda text: pytest.fail(text))


def test_methods_lists_every_row(run):
    code, out, _ = run("methods")
    assert code == 0
    for method in METHODS.values():
        line = next(line for line in out.splitlines() if line.split()[:1] == [method.name])
        assert method.paper in line and method.summary in line
    rows = json.loads(run("methods", "--json")[1])
    assert [row["name"] for row in rows] == list(METHODS)


def test_one_method(run):
    _, out, _ = run("methods", "ties")
    assert re.search(r"^ ?density +float +per model +1\.0 +in \[0, 1\]", out, re.MULTILINE)
    assert re.search(r"^ ?weight +float +per model +required +any number", out, re.MULTILINE)
    (row,) = json.loads(run("methods", "ties", "--json")[1])
    weight = next(item for item in row["parameters"] if item["name"] == "weight")
    assert weight["required"] is True and weight["default"] is None


def test_version(run):
    from importlib.metadata import version

    assert run("--version") == (0, f"fastmerge {version('fastmerge')}\n", "")


def test_a_caller_s_garbage_is_still_collected(run):
    run("--version")
    assert gc.get_freeze_count() == 0


def test_a_command_that_used_triton_ends_in_silence():
    pytest.importorskip("triton")
    code = (
        "import torch, triton; from triton._C.libtriton import ir; kept = [ir.context()]; "
        "kept.append(kept); from fastmerge.cli import main; main(['--version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_wrong_usage_is_2(run):
    assert run("merge")[0] == 2
    assert run("merge", "a", "b", "--device", "tpu")[0] == 2
    assert run("mergee")[0] == 2


# ---------------------------------------------------------------- start, progress, units


def test_start_is_light():
    """--version meets none of the packages that take longer to import than a small plan."""
    heavy = {"numpy", "yaml", "torch", "transformers", "triton", "fastmerge._C"}
    code = (
        "import sys; from fastmerge.cli import main\n"
        "try: main(['--version'])\n"
        f"except SystemExit: print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with console.Progress("merging", stream=stream) as progress:
        for done in range(1, 11):
            progress(done * 10**8, 10**9, f"tensor.{done}")
            time.sleep(0.02)
    shown = stream.getvalue()
    assert "1.0 GB" in shown and "GB/s" in shown and "tensor.10" in shown


def test_lines_elsewhere():
    stream = io.StringIO()
    with console.Progress("merging", stream=stream) as progress:
        for done in range(1, 1001):
            progress(done * 10**6, 10**9, "tensor")
    lines = stream.getvalue().splitlines()
    assert [line[:14] for line in lines] == [f"merging: {n:3d} %" for n in range(10, 101, 10)]
    assert re.fullmatch(r"merging:  50 %  500 MB of 1\.00 GB, \S+ \SB/s, \S+( s)? left", lines[4])


def test_quiet_progress():
    stream = Terminal()
    with console.Progress("merging", quiet=True, stream=stream) as progress:
        progress(1, 1, "tensor")
    assert stream.getvalue() == ""


def test_resumed_bytes_are_no_speed(monkeypatch):
    """A merge that finds 90 % done does not claim to have been ten times as fast."""
    clock = iter([0.0, 10.0, 10.0, 11.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stream = io.StringIO()
    with console.Progress("merging", stream=stream) as progress:
        progress(900, 1000, "a")
        progress(1000, 1000, "b")
    assert stream.getvalue().splitlines()[-1].endswith(", 100 B/s")


@pytest.mark.parametrize(
    ("text", "size"),
    {
        "512MiB": 512 << 20, "5GB": 5 * 10**9, "1.5 kb": 1500, " 2 gib ": 2 << 30,
        "7": 7, "1TiB": 1 << 40, "12B": 12,
    }.items(),
)  # fmt: skip
def test_sizes(text, size):
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-5MB", "5 M B", "1e9", "5PB", "0", "0.1B", "٣MB"])
def test_no_sizes(text):
    with pytest.raises(FastmergeError, match=r"^--limit: "):
        units.parse_size(text, "--limit")


def test_words():
    assert [units.format_bytes(n) for n in (0, 999, 1000, 2_199_000_000, 99_960_000, 5e15)] == [
        "0 B", "999 B", "1.00 KB", "2.20 GB", "100 MB", "5000 TB",
    ]  # fmt: skip
    assert [units.format_seconds(s) for s in (0.04, 9.94, 9.96, 59.4, 185, 3725)] == [
        "0.0 s", "9.9 s", "10 s", "59 s", "3:05", "1:02:05",
    ]  # fmt: skip
    assert [units.format_count(n) for n in (12345, 1_100_048_384, 596_049_920)] == [
        "12345", "1.10 B", "596 M",
    ]  # fmt: skip


# ---------------------------------------------------------------- Ctrl-C


def test_interrupted_merge_continues(run, recipe, monkeypatch):
    out = recipe.parent / "out"
    shown = console.Progress.__call__

    def interrupt(self, done_bytes, total_bytes, tensor):
        if 2 * done_bytes > total_bytes:
            raise KeyboardInterrupt
        shown(self, done_bytes, total_bytes, tensor)

    with monkeypatch.context() as patched:
        patched.setattr(console.Progress, "__call__", interrupt)
        code, text, err = run("merge", recipe, out, "--io", "buffered")
    assert (code, text) == (130, "")
    assert err.splitlines()[-1].startswith("error: interrupted; ") and not out.exists()
    report = json.loads(run("merge", recipe, out, "--json")[1])
    assert report["tensors"] == 21
    whole = recipe.parent / "again" / "out"  # of the same name, which is the card's title
    whole.parent.mkdir()
    run("merge", recipe, whole, "-q")
    assert files(out) == files(whole)


def test_an_interrupted_merge_that_draws_goes_on(run, recipe, monkeypatch):
    """No seed given: it follows from the recipe, so the same command draws the same."""

    def interrupt(*_):
        raise KeyboardInterrupt

    root = recipe.parent
    with monkeypatch.context() as patched:
        patched.setattr(console.Progress, "__call__", interrupt)
        assert run("merge", root / "dare.yml", root / "out", "--io", "buffered")[0] == 130
    assert run("merge", root / "dare.yml", root / "out", "-q") == (0, "", "")


def test_sigint(recipe, tmp_path):
    """A real process, held up midway by a pipe that nobody reads, and a real signal."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b" " * 4096)
    os.set_blocking(write_end, True)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmerge", "merge", recipe, out],
        stdout=subprocess.PIPE, stderr=write_end, env={**os.environ, "PYTHONSAFEPATH": "1"},
        # A shell's background job ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(write_end)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tmp_path.glob(".out.*partial")), "the merge never began"
    process.send_signal(signal.SIGINT)
    with os.fdopen(read_end) as stream:
        errors = stream.read().strip()
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and stdout == b""
    assert errors.splitlines()[-1].startswith("error: interrupted") and "Traceback" not in errors
    assert not out.exists()


def test_an_option_is_read_whether_or_not_its_hint_is_made_optional():
    """Python 3.10's get_type_hints does that to every parameter with the default None."""
    form = options.Option(help="of the pool")
    hint = Annotated[int | None, form]
    assert options._kind_and_form(hint) == options._kind_and_form(Optional[hint])  # noqa: UP045
    assert options._kind_and_form(Optional[hint])[1] is form  # noqa: UP045

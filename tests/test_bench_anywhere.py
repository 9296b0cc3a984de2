"""`fastmerge bench` on anyone's machine and models: what is counted, said and kept there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmerge.bench import machine, pagecache, peers
from fastmerge.bench import run as runs
from fastmerge.bench import wholes as processes
from fastmerge.bench.checkpoints import SHAPES, write_adapter, write_set
from fastmerge.bench.report import rate
from fastmerge.bench.request import Request
from fastmerge.bench.rows import spread
from fastmerge.errors import OutputError, ResourceError
from fastmerge.models.checkpoint import Checkpoint
from tests.conftest import write_checkpoint

TINY = ("--size", "tiny", "--repeat", "1", "--threads", "1")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_set(tmp_path_factory.mktemp("set"), "tiny", 3)


def test_only_the_files_that_a_merge_reads_count(models, tmp_path: Path) -> None:
    folder, lora = tmp_path / "downloaded", tmp_path / "lora"
    shutil.copytree(models[0], folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    write_adapter(lora, models[0], 2)
    shutil.copy(folder / "model.safetensors", lora / "optimizer.safetensors")
    assert pagecache.files_of(folder) == [folder / "model.safetensors"]
    assert pagecache.files_of(lora) == [lora / "adapter_model.safetensors"]


def test_every_run_and_every_key_is_in_the_json(bench, tmp_path: Path) -> None:
    documented = (Path(__file__).parents[1] / "docs" / "bench.md").read_text()
    file = tmp_path / "all.json"
    code, _, err = bench(*TINY, "--json", file)
    assert code == 0, err
    report = json.loads(file.read_text())
    found = set(report)
    for ceiling in report["ceilings"]:
        found |= set(ceiling)
        assert "absent" in ceiling or len(ceiling["runs"]) == 1
    for row in report["jobs"]:
        found |= set(row)
        assert all(row["runs"].values())
        assert min(_seconds(row["runs"]["fastmerge"])) == row["seconds"]["best"]
        for peer in row.get("peers", {}).values():
            found |= set(peer)
    assert not [key for key in sorted(found) if f"`{key}`" not in documented]


def _seconds(runs: list) -> list[float]:
    return [run if isinstance(run, float) else run["seconds"] for run in runs]


def test_ones_own_models_have_a_size_in_the_table(bench, models) -> None:
    code, out, err = bench("merge", "--models", *models[:2], "--methods", "linear", *TINY[2:])
    assert code == 0, err
    assert f"| linear, 2 models | {SHAPES['tiny'].parameters} | warm |" in out
    assert " 1 threads" not in out  # TINY's, of the ceilings and of the whole


def test_a_slow_rate_has_figures() -> None:
    assert rate(0.00034, 2) == "0.00034" and rate(0.05, 1) == "0.050"
    assert rate(7.6, 1) == "7.6" and rate(1.254, 2) == "1.25" and rate(0.996, 1) == "1.0"
    assert rate(spread([0.02, 0.0204]), 1) == "0.020 (0.020-0.020)"
    assert rate(0.0, 1) == "0.000000"


def test_what_no_figure_is_of_is_said(bench, models) -> None:
    code, out, err = bench("merge", *TINY, "--methods", "slerp", "--count", "3,4")
    assert (code, out) == (2, "")
    assert err.endswith("error: --count: slerp: takes 2 models, not 3 or 4\n")
    asked = Request(kinds=("merge",), methods=("linear", "slerp"), counts=(2, 4))
    assert asked.unfit == ["slerp: takes 2 models, not 4"]
    sizes = Request(sizes=("tiny", "0.2b"), counts=(2, 4), steps=(1, 8))
    assert sizes.notes == ["--count 2,4 and --steps 1,8: of tiny alone, the first size"]
    assert (sizes.of_further_sizes.counts, sizes.of_further_sizes.steps) == ((), (1,))
    one = replace(sizes, counts=(4,), steps=(8,))  # which was not asked of the second size
    assert (one.notes, one.of_further_sizes.counts, one.of_further_sizes.steps) == ([], (4,), (8,))
    several = Request(kinds=("walk",), models=tuple(models) * 2)
    assert several.unfit == ["walk: of the 6 models the first 3 are used"]
    code, out, err = bench("fold", "--models", *models[:2])
    assert (code, out) == (2, "")
    assert "a fold is of a base and one adapter" in err
    code, out, err = bench("fold", "--models", models[0], *TINY[2:])
    assert code == 0 and "| fold, rank 16 |" in out
    for option in ("--size", "--methods", "--steps"):
        kind = "walk" if option == "--steps" else "merge"
        code, _, err = bench(kind, option, "")
        assert code == 2 and f"error: {option}: " in err  # the default was taken for it


def test_no_picture_of_nothing(bench, monkeypatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(processes, "evict", lambda files: pagecache.Residency(1.0, seen=True))
    plot = tmp_path / "x.png"
    code, out, err = bench("merge", *TINY, "--cache", "cold", "--plot", plot)
    assert code == 2 and "Note: linear, 2 models: no cold figure" in out
    assert "not written: no figure to draw" in err and not plot.exists()


def test_a_lost_terminal_costs_no_file(bench, monkeypatch, tmp_path: Path) -> None:
    def full(*_: str) -> None:
        raise OutputError("standard output: cannot be written (No space left on device)")

    monkeypatch.setattr("fastmerge.cli.bench.put", full)
    file = tmp_path / "x.json"
    code, _, err = bench("kernels", *TINY, "--json", file)
    assert code == 2 and "standard output" in err
    assert json.loads(file.read_text())["jobs"]


def test_a_disk_that_fills_meanwhile_is_named(bench, monkeypatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as os.pwrite says it

    monkeypatch.setattr(runs, "write_set", no_room)
    code, _, err = bench("merge", *TINY)
    assert code == 2
    last = err.splitlines()[-1]
    assert last == f"error: {Path.cwd()}: no space left on the device; free some and run again"
    assert not list(Path.cwd().iterdir())


def test_the_report_says_what_made_it(bench, models, tmp_path: Path) -> None:
    own = tmp_path / "my model"
    shutil.copytree(models[1], own)
    file = tmp_path / "x.json"
    words = ("--methods", "linear", "--cache", "warm", *TINY[2:], "--json", file, "-q")
    code, out, err = bench("--models", models[0], own, "--folder", tmp_path, *words)
    assert code == 0, err
    command = (
        "fastmerge bench --models base 'my model' --methods linear --cache warm --repeat 1 "
        "--threads 1"
    )
    assert f"\n\n```sh\n{command}\n```\n\n" in out
    assert json.loads(file.read_text())["command"] == command
    code, out, _ = bench("kernels", "--size", "tiny")
    assert code == 0 and "```sh\nfastmerge bench kernels --size tiny\n```" in out


def test_another_program_that_fails_costs_its_own_figures(bench, monkeypatch) -> None:
    pytest.importorskip("torch")

    def fails(name: str, *_: Path) -> None:
        raise ResourceError(f"{name}: ended with 1: KeyError: 'w'")

    monkeypatch.setattr(processes, "run_peer", fails)
    code, out, err = bench("merge", *TINY, "--methods", "linear", "--against", "torch")
    assert code == 0, err
    assert "| linear, 2 models | tiny | warm |" in out and "torch s" not in out
    assert "Note: linear, 2 models: no figure of torch: torch: ended with 1: KeyError: 'w'." in out


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_run_is_cold_as_its_floor_is(models, tmp_path: Path, monkeypatch, left: int) -> None:
    """Another process may begin to use the files at any time."""
    states = iter([pagecache.Residency(0.0, seen=True)] * left)
    used = pagecache.Residency(0.5, seen=True)
    monkeypatch.setattr(processes, "evict", lambda files: next(states, used))
    asked = Request(kinds=("merge",), methods=("linear",), repeat=2, caches=("cold",))
    (whole,) = processes.merges(models, asked, tmp_path, "bfloat16", {"size": "tiny"})
    rows, (note,) = processes.run(whole, tmp_path, asked, lambda text: None)
    assert [len(row["runs"]["floor"]) for row in rows] == [1] * (left > 1)
    assert [len(row["runs"]["fastmerge"]) for row in rows] == [1] * (left > 1)
    assert ("1 of 2 cold runs" if left > 1 else "no cold figure") in note


def test_peft_folds_in_the_base_s_own_type(tmp_path: Path) -> None:
    for package in ("peft", "transformers"):
        pytest.importorskip(package)
    (base,) = write_set(tmp_path, "tiny", 1)
    config = json.loads((base / "config.json").read_text())
    shapes = {name: info.shape for name, info in Checkpoint.open(base).tensors.items()}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    full = write_checkpoint(tmp_path / "full", tensors, config | {"dtype": "float32"}, dtype="F32")
    write_adapter(tmp_path / "lora", full, 2)
    peers.peft(str(full), str(tmp_path / "lora"), str(tmp_path / "out"))()
    made = Checkpoint.open(tmp_path / "out").tensors
    assert {info.dtype.code for info in made.values()} == {"F32"}


def test_the_machine_is_described_where_names_have_blanks(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "my disk").mkdir()
    place = str(tmp_path / "my disk").replace(" ", "\\040")
    real = Path.read_text
    mounts = f"none / ext4 rw 0 0\nnone {place} tmpfs rw 0 0\n"
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda p, **how: mounts if str(p) == "/proc/self/mounts" else real(p, **how),
    )
    assert machine.file_system(tmp_path / "my disk") == "tmpfs"
    assert machine.file_system(tmp_path) == "ext4"
    assert {"peft", "mergekit"} <= set(machine.machine(tmp_path, ["peft", "mergekit"]))

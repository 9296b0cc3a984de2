"""A stranger's schedule and the folder of a run out of an archive: files that are anything."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import FastmergeError
from fastmerge.evaluation import journal
from fastmerge.evaluation.harness import _Sources
from fastmerge.evaluation.perplexity import Perplexity
from fastmerge.evaluation.settings import load_evaluate
from fastmerge.retrograde import run

# Each mapping takes the one before over twice.
BOMB = "b0: &b0 {k: 1}\n" + "".join(
    f"b{i}: &b{i} {{<<: [*b{i - 1}, *b{i - 1}]}}\n" for i in range(1, 40)
)


def refusal(work: Callable[[], Any]) -> str:
    begun = time.process_time()
    with pytest.raises(FastmergeError) as caught:
        work()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1700
    assert time.process_time() - begun < 20
    return str(caught.value)


# --- what a schedule names ---

TEXTS = {
    "not UTF-8": (b"\xff", "can't decode"),
    "bool": (b"task: x\na: !!bool 7", "not valid YAML"),
    "timestamp": (b"task: x\na: !!timestamp x", "not valid YAML"),
    "date": (b"task: x\na: 2001-99-99", "not valid YAML"),
    "int": (b"task: x\na: !!int ''", "not valid YAML"),
    "base 60": (b"task: x\na: " + b"1:" * 400_000 + b"1", "a number of 800001 letters"),
    "base 60, by a key": (b"task: x\na: !!int {=: '" + b"1:" * 9000 + b"1'}", "of 18001 letters"),
    "float of base 60": (b"task: x\na: " + b"1:" * 300 + b"1.0", "not valid YAML"),
    "a letter's number": (b'task: x\na: "\\UFFFFFFFF"', "not valid YAML"),
    "deep": (b"task: x\na: " + b"[" * 100_000, "not valid YAML"),
    "merges": (b"task: x\n" + BOMB.encode(), "more than 1000000 values"),
    "python": (b"task: x\na: !!python/object/apply:os.system [x]", "not valid YAML"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_task_files_that_are_none(tmp_path: Path, case: str) -> None:
    text, words = TEXTS[case]
    (tmp_path / "y.yaml").write_bytes(text)
    asked = load_evaluate({"tasks": ["x"], "include_path": [str(tmp_path)]})
    said = refusal(lambda: _Sources(asked, tmp_path))
    assert "y.yaml" in said and words in said


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling", "large"])
def test_only_regular_files_of_some_size_are_task_files(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "y.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "large":
        file.touch()
        os.truncate(file, 200 << 30)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "nothing")
    for asked in ({"include_path": [str(tmp_path)], "tasks": ["x"]}, {"tasks": [str(file)]}):
        settings = load_evaluate(asked)
        assert "y.yaml" in refusal(lambda settings=settings: _Sources(settings, tmp_path))
    text = load_evaluate({"perplexity": str(file)})
    if kind != "large":
        assert "y.yaml" in refusal(lambda: Perplexity(text, tmp_path, tmp_path))


def test_paths_with_a_nul_are_none(tmp_path: Path) -> None:
    for key in ("include_path", "tasks", "data"):
        own = "a\0b.yaml" if key == "tasks" else "a\0b"
        said = {"tasks": ["arc_easy"]} | {key: own if key == "data" else [own]}
        settings = load_evaluate(said)
        assert "a\\x00b" in refusal(lambda settings=settings: _Sources(settings, tmp_path))
    settings = load_evaluate({"perplexity": "a\0b"})
    assert "a\\x00b" in refusal(lambda: Perplexity(settings, tmp_path, tmp_path))


def test_mappings_that_take_over_one_another() -> None:
    wide = "a: &a {" + ",".join(f"k{i}: 1" for i in range(2000)) + "}\n"
    wide += "".join(f"b{i}: {{<<: [{','.join(['*a'] * 500)}]}}\n" for i in range(20))
    for text in (BOMB, wide):
        assert "'<<' makes more than 1000000 values" in refusal(
            lambda text=text: fastmerge.plan(text)
        )
    few = "parameters: &p {weight: 1}\nmerge_method: linear\nmodels:\n"
    few += "- {model: ./none, parameters: {<<: *p}}\n" * 3
    assert "./none: no such folder" in refusal(lambda: fastmerge.plan(few))


@pytest.mark.parametrize("url", ["https://[::1", "s3://[x/y", "https://[v1.a]b/c"])
def test_urls_that_are_none(url: str) -> None:
    pytest.importorskip("obstore")
    asked = {"merge_method": "linear", "models": [{"model": url}], "parameters": {"weight": 1}}
    said = refusal(lambda: fastmerge.plan(asked))
    # What cannot be taken apart is not shown: it may hold a password.
    assert f"{url.partition(':')[0]}://...: not a URL" in said or f"{url}: cannot be opened" in said


# --- the folder of a run ---


@pytest.fixture
def schedule(zoo: Any, tmp_path: Path) -> dict[str, Any]:
    zoo.tune(zoo.base("m0"), "m1", seed=1, size=0.05)
    return {
        "baseline": str(tmp_path / "m0"),
        "pool": [{"model": str(tmp_path / "m1")}],
        "schedule": {
            "cycles": 1,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.4},
            "retrace": {"toward": "baseline", "method": "linear", "t": 0.3},
        },
        "evaluate": {"callable": "own:score"},
    }


@pytest.fixture
def begun(schedule: dict[str, Any], tmp_path: Path) -> Path:
    scores = iter([50.0])

    def score(_: Any) -> float:
        for one in scores:
            return one
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(schedule, tmp_path / "out", score=score)
    return tmp_path / "out"


def npy(array: Any, *, shape: tuple[int, ...] | None = None) -> bytes:
    file = io.BytesIO()
    if shape is None:
        np.save(file, array)
    else:
        said = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, said)
    return file.getvalue()


def test_inner_products_that_no_run_keeps(schedule: dict[str, Any], begun: Path) -> None:
    """Other shapes and types, NumPy's other files, and zips that numpy.load raises anything for."""
    path = begun / "grams.npz"
    good = path.read_bytes()
    with np.load(path) as file:
        kept = dict(file)
    names, grams = kept["names"], kept["grams"]

    def packed(method: int = zipfile.ZIP_STORED, **parts: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as made:
            for name, data in ({k: npy(v) for k, v in kept.items()} | parts).items():
                made.writestr(f"{name}.npy", data)
        return file.getvalue()

    locked, odd = bytearray(good), bytearray(good)
    for mark, flag in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = -1
        while (at := good.find(mark, at + 1)) >= 0:
            locked[at + flag] |= 1
            odd[at + flag + 2] = 99  # how it is packed
    evil = b"\x93NUMPY\x01\x00v\x00" + (b"{'descr': " + b"(" * 90 + b"}").ljust(118)
    bad = {
        "npy": npy(np.zeros(3)),
        "locked": bytes(locked),
        "method": bytes(odd),
        "deflated": packed(zipfile.ZIP_DEFLATED),
        "header": packed(key=evil),
        "huge": packed(grams=npy(None, shape=(len(names), 1 << 25, 1 << 25))),
        "flat": packed(grams=npy(np.zeros(len(names)))),
        "bigger": packed(grams=npy(np.zeros((len(names), 5, 5)))),
        "complex": packed(grams=npy(grams.astype(np.complex128))),
        "integers": packed(grams=npy(grams.astype(np.int8))),
        "text": packed(grams=npy(np.full(grams.shape, "x"))),
        "fewer": packed(names=npy(names[:1])),
        "one": packed(names=npy(names[:1]), grams=npy(np.zeros((1, 7, 7)))),
    }
    for case, data in bad.items():
        path.write_bytes(data)
        said = refusal(lambda: run(schedule, begun, score=lambda _: 50.0, resume=True))
        assert "grams.npz: is damaged" in said, case
    path.write_bytes(packed())
    run(schedule, begun, score=lambda _: 50.0, resume=True)


def test_headers_that_no_run_writes(schedule: dict[str, Any], begun: Path) -> None:
    path = begun / "run.json"
    said = json.loads(path.read_text())
    odd: list[Any] = [float("inf"), 1.5, True, "7", None, [], -1, 1 << 64]
    texts = [json.dumps(said | {"seed": seed}) for seed in odd]
    texts += [json.dumps(said | {"more": 1}), json.dumps(said | {"more": None}), "[" * 200, "{}"]
    for text in texts:
        path.write_text(text)
        found = refusal(lambda: run(schedule, begun, score=lambda _: 50.0, resume=True))
        assert "run.json: is damaged" in found, text
    path.write_text(json.dumps(said | {"inputs": None}))
    assert "other 'inputs'" in refusal(lambda: run(schedule, begun, score=lambda _: 1, resume=True))


def test_values_in_a_journal_that_no_run_writes(schedule: dict[str, Any], tmp_path: Path) -> None:
    """A third of what was forged came out as Python's own error."""

    def score(_: Any) -> float:
        return 50.0

    out = tmp_path / "out"
    run(schedule, out, score=score)
    path = out / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scores = next(line for line in lines if line["key"].startswith("score:"))
    (task,) = scores["value"].values()
    odd = [1, "x", [], {"a": 1}, {"a": {}}, {"a": [1]}]
    for key in ("value", "metric", "count", "items", "detail"):
        odd += [{"a": {name: value for name, value in task.items() if name != key}}]
        odd += [{"a": task | {key: value}} for value in (True, [[]], {"b": None}, 10**400)]
    for value in odd:
        path.write_text(json.dumps(scores | {"value": value}) + "\n")
        said = refusal(lambda: run(schedule, out, score=score, resume=True))
        assert "journal.jsonl: the value of 'score:" in said and "delete its line" in said, value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(schedule, out, score=score, resume=True)


def test_a_journal_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.touch(0o600)
    os.truncate(path, 20 << 30)
    assert "not a run's" in refusal(lambda: journal.Journal(path))

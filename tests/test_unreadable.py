"""What may not be read: one line that names it, from every entry."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import fastmerge
from fastmerge import adapters, api
from fastmerge.errors import FastmergeError
from fastmerge.models.adapter import is_adapter
from tests.test_shared_folders import MALLORY, as_user

PLACES = {
    "folder": (".", 0), "not searchable": (".", 0o400), "not listed": (".", 0o100),
    "config": ("config.json", 0), "weights": ("model.safetensors", 0),
    "tokenizer": ("tokenizer.json", 0), "card": ("README.md", 0), "inner": ("code", 0),
    "side file": ("code/more.py", 0),
}  # fmt: skip


@pytest.fixture
def model(zoo) -> Path:
    folder = zoo.base("a")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    (folder / "code").mkdir()
    (folder / "code" / "more.py").write_text("")
    return folder


def by_somebody(work: Callable[[], None]) -> None:
    """As a user whom modes bind."""
    as_user(MALLORY, work) if os.geteuid() == 0 else work()


def refused(work: Callable[[], object], name: Path) -> None:
    with pytest.raises(FastmergeError) as caught:
        work()
    text = str(caught.value)
    assert str(name) in text and "cannot be read (Permission denied)" in text


@pytest.mark.parametrize("place", PLACES)
def test_what_may_not_be_read_is_named(place, model, zoo):
    name, mode = PLACES[place]
    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders are closed to others
        root = Path(shared)
        root.chmod(0o777)
        a = root / "a"
        model.rename(a)
        b = zoo.base("b", seed=1).rename(root / "b")
        recipe = {
            "merge_method": "linear",
            "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (a, b)],
        }
        (a / name).chmod(mode)
        whole = "" if name == "." else name

        def work() -> None:
            if place != "card":
                refused(lambda: api.plan(recipe), a / whole)
            if name == ".":
                refused(lambda: is_adapter(a), a)
                refused(lambda: api.plan(_given(recipe), models={"a": a, "b": b}), a)
                refused(lambda: adapters.extract_lora(a, b, root / "lora", max_rank=1), a)
            refused(lambda: fastmerge.merge(recipe, root / "out", threads=1), a / whole)
            assert not [file for file in root.iterdir() if "out" in file.name]

        try:
            by_somebody(work)
        finally:
            (a / name).chmod(0o700)


def _given(recipe: dict) -> dict:
    entries = [entry | {"model": Path(entry["model"]).name} for entry in recipe["models"]]
    return json.loads(json.dumps(recipe | {"models": entries}))

"""What the documentation names is there after `import fastmerge`, and says what it is in help()."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

import fastmerge
from fastmerge import api, ops
from fastmerge.compute.devices import DEVICES
from fastmerge.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]


def named() -> set[str]:
    """Every dotted name of fastmerge's on the pages."""
    found = set()
    for page in PAGES:
        text = page.read_text()
        found |= set(re.findall(r"^::: (fastmerge\.[\w.]+)", text, re.MULTILINE))
        found |= set(re.findall(r"`(fastmerge(?:\.\w+)+)(?:\(|`)", text))
    return {name for name in found if not name.endswith((".yml", ".json", ".safetensors"))}


FORKED = """
import os, sys
import numpy, fastmerge
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            thing = fastmerge
            for part in name.split(".")[1:]:
                thing = getattr(thing, part)
        except AttributeError as error:
            print(f"{name}: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_what_the_pages_name_is_there_after_the_import() -> None:
    names = named()
    assert {"fastmerge.search.run", "fastmerge.evaluation.scorers.register"} <= names
    also = {f"fastmerge.{path.stem}" for path in (ROOT / "fastmerge").glob("[a-z]*.py")}
    also |= {f"fastmerge.{path.parent.name}" for path in (ROOT / "fastmerge").glob("*/__init__.py")}
    also |= {"fastmerge.methods.registry.register", "fastmerge.integrations.peft.installed"}
    wanted = sorted(names | also)
    done = subprocess.run(
        [sys.executable, "-c", FORKED, *wanted], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


def test_a_name_that_is_not_there_is_told() -> None:
    for package in (fastmerge, fastmerge.search, fastmerge.evaluation, fastmerge.methods):
        with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'averag'"):
            package.averag  # noqa: B018
    assert not hasattr(fastmerge, "__wrapped__")


def test_a_module_whose_needs_are_missing_says_so(tmp_path, monkeypatch) -> None:
    package = tmp_path / "lazy_things"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from fastmerge.lazily import loading\n__getattr__ = loading(__name__)\n"
    )
    (package / "needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        import_module("lazy_things").needy  # noqa: B018


def test_the_words_of_types_are_those_of_the_table() -> None:
    choices = {p.name: p.choices for row in METHODS.values() for p in row.parameters if p.choices}
    assert choices["votes"] == get_args(ops.Votes)
    assert choices["divisor"] == get_args(ops.Divisor)
    assert choices["ties"] == get_args(ops.EqualMagnitudes)
    words = {w for row in METHODS.values() for p in row.parameters for w, _ in p.words}
    assert words | set(choices["rescale"]) == set(get_args(get_args(ops.Rescale)[1]))
    assert DEVICES == ("cpu", "cuda", "auto")


def test_options_that_are_passed_on_are_those_of_merge() -> None:
    own = inspect.signature(api.merge).parameters
    keywords = {name for name, p in own.items() if p.kind is p.KEYWORD_ONLY}
    # `models` is average's own list, and a base with an adapter is a reference of its own.
    assert set(api.MergeOptions.__annotations__) == keywords - {"models"}


@pytest.mark.parametrize("name", [n for n in fastmerge.__all__ if n != "__version__"])
def test_every_public_function_stands_by_itself(name: str) -> None:
    thing = getattr(fastmerge, name)
    text = inspect.getdoc(thing) or ""
    assert len(text) > 20
    if not inspect.isfunction(thing):
        return
    assert not re.search(r":\s+as (in )?`", text), "explain it here, too"
    missing = [
        p.name
        for p in inspect.signature(thing).parameters.values()
        if not re.search(rf"\b{p.name}\b", text)
    ]
    assert missing == []


def test_a_recipe_of_adapters_alone_is_told_what_to_call(zoo) -> None:
    from tests.test_merge_adapters import write_adapter

    for seed, name in enumerate(("one", "two")):
        write_adapter(zoo.root / name, seed=seed)
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(zoo.root / n), "parameters": {"weight": 0.5}} for n in ("one", "two")
        ],
    }
    with pytest.raises(fastmerge.UnsupportedError, match=r"fastmerge\.api\.decide\(recipe\)"):
        fastmerge.plan(recipe)
    decided = api.decide(recipe)
    assert repr(decided).startswith("AdapterMerge(") and len(repr(decided)) < 400
    fastmerge.merge(decided, zoo.root / "merged")
    assert os.path.exists(zoo.root / "merged" / "adapter_config.json")


def test_what_is_public_is_shown_in_a_line(zoo) -> None:
    base = zoo.base("base")
    tuned = [zoo.tune(base, f"tuned{i}", seed=i) for i in range(2)]
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in tuned],
    }
    plan = fastmerge.plan(recipe)
    out = zoo.root / "merged"
    report = fastmerge.merge(plan, out)
    fastmerge.merge(plan, zoo.root / "joined", part=(1, 1))
    joined = fastmerge.finish(zoo.root / "joined")
    found = fastmerge.extract_lora(tuned[0], base, zoo.root / "lora", rank=2)
    things = [plan, *plan.tensors, report, joined, fastmerge.verify(out), found, *plan.models]
    for thing in things:
        assert type(thing).__name__ in repr(thing)
        assert len(repr(thing)) < 400 and "\n" not in repr(thing)
    assert f"tensors=<{len(plan.tensors)}>" in repr(plan)
    assert f"{out.name}'" in repr(report)


def test_the_module_that_trl_lacks_is_named(monkeypatch) -> None:
    from importlib.abc import MetaPathFinder

    from fastmerge.integrations import trl

    class Missing(MetaPathFinder):
        lacks = "immutables"

        def find_spec(self, name, *_):
            if name.startswith("trl"):
                raise ModuleNotFoundError(f"No module named '{self.lacks}'", name=self.lacks)

    finder = Missing()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(fastmerge.ResourceError, match="the module 'immutables' is missing"):
        trl.install()
    finder.lacks = "trl"
    with pytest.raises(fastmerge.ResourceError, match="pip install trl mergekit"):
        trl.install()


def test_the_python_of_the_page_for_callers_is_the_page_s_own() -> None:
    """What `make check` gives to mypy: every line where it is on the page."""
    from tests.test_docs import examples

    page = (ROOT / "docs" / "callers.md").read_text().splitlines()
    made = examples.python("\n".join(page) + "\n").splitlines()
    assert len([line for line in made if line]) > 40
    assert all(line in ("", page[number]) for number, line in enumerate(made))
    compile("\n".join(made), "callers.md", "exec")

"""What a mistake raises: the tree of classes, which of them each kind of fault is, and that it
travels between processes.
"""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest

import fastmerge
from fastmerge import errors, ops
from fastmerge.errors import FastmergeError, ModelError, RecipeError

_KINDS = (FastmergeError, *FastmergeError.__subclasses__())  # integrations have more of their own
TREE = {kind.__name__: kind for kind in _KINDS if kind.__module__ == errors.__name__}


def test_the_tree_drawn_is_the_tree() -> None:
    assert sorted(TREE) == sorted(re.findall(r"\b[A-Z]\w*Error(?=\n|  )", errors.__doc__ or ""))
    assert all(getattr(fastmerge, name) is kind for name, kind in TREE.items())
    assert set(TREE) < set(fastmerge.__all__)


@pytest.mark.parametrize("kind", TREE.values())
def test_an_error_survives_pickling_and_copying(kind) -> None:
    error = kind("model\x1b[2J.safetensors: a\nbroken name \udcff; mend it")
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(other) is kind
        assert (
            str(other) == str(error) == r"model\x1b[2J.safetensors: a\nbroken name \udcff; mend it"
        )


def _recipe(*models: object, **keys: object) -> dict[str, object]:
    entries = [{"model": str(model)} for model in models]
    return {"merge_method": "linear", "parameters": {"weight": 1}, "models": entries, **keys}


def test_each_kind_of_fault_has_its_class(zoo, tmp_path) -> None:
    a, wide = zoo.base("a"), zoo.base("wide", hidden=48)
    config = {"quantization_config": {"quant_method": "gptq"}}
    quantised = zoo.write("quantised", zoo.read(a), config)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for wanted, recipe, target in [
        ("RecipeError", _recipe(a, merge_method="lineer"), "new"),
        ("RecipeError", _recipe(a, parameters={"weight": "much"}), "new"),
        ("RecipeError", _recipe(a, dtype="bloat16"), "new"),
        ("RecipeError", tmp_path / "none.yml", "new"),
        ("RecipeError", "a: [1\n", "new"),
        ("ModelError", _recipe(a, tmp_path / "missing"), "new"),
        ("ModelError", _recipe(a, wide), "new"),
        ("UnsupportedError", _recipe(a, quantised), "new"),
        ("UnsupportedError", _recipe(a, gate_mode="hidden"), "new"),
        ("OutputError", _recipe(a), "out"),
        ("OutputError", _recipe(a), "no/such/folder"),
    ]:
        with pytest.raises(FastmergeError) as raised:
            fastmerge.merge(recipe, tmp_path / target)
        assert type(raised.value).__name__ == wanted, raised.value


def test_what_the_machine_lacks_has_its_class(zoo, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.statvfs", lambda _: type("", (), {"f_bavail": 0, "f_frsize": 4096})())
    with pytest.raises(fastmerge.ResourceError, match="no space left"):
        fastmerge.merge(_recipe(zoo.base("a")), tmp_path / "out")


def test_where_a_fault_is_named_twice_it_stays_what_it_was(tmp_path) -> None:
    # The planner puts the recipe's place before what the model's folder said.
    with pytest.raises(ModelError, match=r"recipe.*: .*no such folder or file"):
        fastmerge.merge(_recipe(tmp_path / "missing"), tmp_path / "out")


def test_a_method_parameter_is_one_class_wherever_it_is_given() -> None:
    x = np.ones(4, np.float32)
    with pytest.raises(RecipeError, match="'density' must be"):
        ops.ties(x, [x, x], [1, 1], density=2)

"""The reference: what each public name takes, returns and raises, held against the code.

A docstring defines an argument as "``name``: what it is", several as "``a``, ``b``: ...", and says
"Returns ..." and "Raises SomeError ...". A definition of what is no argument, a class that nothing
raises, bounds and papers that are not the method table's are faults like missing ones.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import errors, ops
from fastmerge.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
LISTED = re.findall(
    r"^::: (fastmerge\.[\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE
)
DEFINED = re.compile(r"((?:``\*{0,2}\w+``(?:, | and )?)+): ")
RAISES = re.compile(r"Raises,? ((?:[^.]|\.\w)+)")
ERROR = re.compile(r"\b[A-Z]\w+Error\b")
KNOWN = {n: c for n, c in vars(errors).items() if n.endswith("Error") and inspect.isclass(c)}


def found(name: str) -> Any:
    """What a dotted name of fastmerge's is."""
    thing: Any = fastmerge
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    return thing


def reference() -> Iterator[tuple[str, Any]]:
    """Every function and class of the page, those of its modules, too."""
    for name in LISTED:
        thing = found(name)
        if not inspect.ismodule(thing):
            yield name, thing
            continue
        for own in thing.__all__:
            yield f"{name}.{own}", getattr(thing, own)


NAMES = dict(reference())
FUNCTIONS = {name: thing for name, thing in NAMES.items() if inspect.isroutine(thing)}
CLASSES = {
    name: thing
    for name, thing in NAMES.items()
    if inspect.isclass(thing) and not issubclass(thing, (Exception, dict))
}


class Text:
    """A docstring, taken apart."""

    def __init__(self, thing: Any) -> None:
        self.whole = " ".join((inspect.getdoc(thing) or "").split())

    @cached_property
    def defined(self) -> dict[str, str]:
        """What is said of each argument."""
        parts = DEFINED.split(self.whole.split(" Returns ")[0].split(" Raises ")[0])[1:]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return {name: said for names, said in pairs for name in re.findall(r"(\w+)``", names)}

    @cached_property
    def raised(self) -> set[str]:
        return {name for said in RAISES.findall(self.whole) for name in ERROR.findall(said)}


def faults(function: Callable[..., Any], *, raises: bool) -> list[str]:
    """What the docstring of a function lacks, and what it makes up."""
    text, signature = Text(function), inspect.signature(function)
    wanted = [name for name in signature.parameters if name not in ("self", "cls")]
    lines = [f"does not define {name}" for name in wanted if name not in text.defined]
    lines += [f"defines {name}, no argument" for name in text.defined if name not in wanted]
    lines += [
        f"says of {name}: {said!r}" for name, said in text.defined.items() if len(said.split()) < 2
    ]
    gives = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    if gives and not re.search(r"\b(Returns|Yields) \S+ \S+", text.whole):
        lines.append("does not say what it returns")
    if raises and not text.raised:
        lines.append("does not say what it raises")
    lines += [f"raises {name}, no class" for name in text.raised - KNOWN.keys()]
    return lines


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    assert faults(FUNCTIONS[name], raises=name not in HARMLESS) == []


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_holds_and_its_methods_what_they_take(name: str) -> None:
    kind = CLASSES[name]
    text = Text(kind)
    named = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    held = [field for field in [*named, *getattr(kind, "_fields", ())] if field[0] != "_"]
    assert [field for field in held if len(text.defined.get(field, "").split()) < 2] == []
    for own, member in inspect.getmembers_static(kind):
        if own.startswith("_") or own in held:
            continue
        member = getattr(member, "__func__", member)
        if inspect.isfunction(member) and member.__module__.startswith("fastmerge"):
            assert faults(member, raises=False) == [], f"{name}.{own}"
        elif isinstance(member, property) or hasattr(member, "func"):
            assert len((inspect.getdoc(member) or "").split()) > 3, f"{name}.{own}"


# ---------------------------------------------------------------- what it says is so

HARMLESS = {f"fastmerge.integrations.{m}.uninstall" for m in
            ("fusion_bench", "mergekit_methods", "peft", "sd_mecha", "trl")}  # fmt: skip
A, B = (np.full((2, 3), number, np.float32) for number in (1, 2))
WRONG = {"merge_method": "no_such_method"}
GONE = {"merge_method": "passthrough", "models": [{"model": "./no-such-folder"}]}


class NoStudy:
    """An empty study: nothing was scored."""

    best = None


def entry() -> Any:
    from fastmerge.methods.entries import Entry

    return Entry("input", 0)


# A call of each function that is refused; those of a module share theirs. {out} is a new folder.
REFUSED: dict[str, list[Callable[[Path], object]]] = {
    "api.merge": [
        lambda out: fastmerge.merge(WRONG, out), lambda out: fastmerge.merge(GONE, out),
        lambda out: fastmerge.merge(GONE, out, part="3/2"),
        lambda out: fastmerge.merge(GONE, 5),
    ],
    "api.plan": [
        lambda _: fastmerge.plan(WRONG), lambda _: fastmerge.plan(GONE),
        lambda _: fastmerge.plan(GONE, seed=-1),
    ],
    "api.decide": [lambda _: fastmerge.api.decide(WRONG), lambda _: fastmerge.api.decide(GONE)],
    "api.check": [lambda _: fastmerge.api.check(WRONG), lambda _: fastmerge.api.check(GONE)],
    "api.materialise": [
        lambda _: next(fastmerge.materialise(WRONG)), lambda _: next(fastmerge.materialise(GONE)),
        lambda _: next(fastmerge.materialise(GONE, as_="x")),
    ],
    "api.verify": [
        lambda out: fastmerge.verify(out), lambda _: fastmerge.verify("s3://bucket/model"),
        lambda out: fastmerge.verify(out, sample=-1),
    ],
    "api.finish": [lambda out: fastmerge.finish(out), lambda _: fastmerge.finish("")],
    "api.fold": [
        lambda out: fastmerge.fold(out, out, out), lambda out: fastmerge.fold("", "", out),
    ],
    "averages.average": [
        lambda out: fastmerge.average([], out), lambda out: fastmerge.average([out], out),
    ],
    "state_dicts.merge_state_dicts": [
        lambda _: fastmerge.merge_state_dicts([{"w": A}], "x"),
        lambda _: fastmerge.merge_state_dicts([{"w": A}, {"v": A}], "linear"),
        lambda _: fastmerge.merge_state_dicts([], "linear"),
    ],
    "adapters.merge_adapters": [
        lambda out: fastmerge.merge_adapters([out], out, weights=[1, 2]),
        lambda out: fastmerge.merge_adapters([out], out, weights=[1]),
        lambda out: fastmerge.merge_adapters([out], out, weights=[1], method="x"),
    ],
    "adapters.extract_lora": [
        lambda out: fastmerge.extract_lora(out, out, out),
        lambda out: fastmerge.extract_lora(out, out, out, rank=4),
    ],
    "live.merge_into": [lambda _: fastmerge.live.merge_into(5, None)],
    "live.forget": [lambda _: fastmerge.live.forget(5)],
    "llama.load": [lambda out: fastmerge.llama.load(out), lambda _: fastmerge.llama.load("")],
    "llama.load_merged": [
        lambda _: fastmerge.llama.load_merged(WRONG), lambda _: fastmerge.llama.load_merged(GONE),
    ],
    "llama.load_tokenizer": [
        lambda out: fastmerge.llama.load_tokenizer(out.parent),
        lambda _: fastmerge.llama.load_tokenizer(WRONG),
    ],
    "llama.merge_into": [lambda _: fastmerge.llama.merge_into(5, WRONG)],
    "methods.plugins.method": [lambda _: fastmerge.method(version="1")(lambda weights: weights)],
    "methods.registry.register": [
        lambda _: fastmerge.methods.register(METHODS["linear"])
    ],
    "methods.registry.unregister": [lambda _: fastmerge.methods.unregister("linear")],
    "methods.entries": [lambda _: found("fastmerge.methods.entries.minimum")(entry(), "text")],
    "retrograde.run": [lambda out: fastmerge.retrograde.run({"pool": 5}, out)],
    "retrograde.load": [lambda _: fastmerge.retrograde.load({"pool": 5})],
    "search.sweep.sweep": [
        lambda out: fastmerge.search.sweep.sweep(WRONG, out, [0.5]),
        lambda out: fastmerge.search.sweep.sweep(GONE, out, [0.5]),
    ],
    "search.run": [lambda out: fastmerge.search.run({"space": 5}, out)],
    "search.open_study": [lambda out: fastmerge.search.open_study({"space": 5}, out)],
    "search.finish": [lambda out: fastmerge.search.finish(NoStudy(), out)],
    "search.load": [lambda _: fastmerge.search.load({"space": 5})],
    "search.describe": [lambda _: fastmerge.search.describe({"space": 5})],
    "evaluation.scorers.register": [
        lambda _: fastmerge.evaluation.scorers.register("tasks", lambda *_: None)
    ],
    "integrations.mergekit.run_merge": [
        lambda out: fastmerge.integrations.mergekit.run_merge(WRONG, out),
        lambda out: fastmerge.integrations.mergekit.run_merge(GONE, out),
    ],
}  # fmt: skip


def error_of(call: Callable[..., object], *given: Any, **named: Any) -> str:
    """The class of the library's own that a call ends in."""
    with pytest.raises(errors.FastmergeError) as caught:
        call(*given, **named)
    return next(k.__name__ for k in type(caught.value).__mro__ if k.__name__ in KNOWN)


REFUSING = {name: key for name in FUNCTIONS for key in REFUSED
            if name.removeprefix("fastmerge.").removesuffix(f".{name.split('.')[-1]}") == key
            or name == f"fastmerge.{key}"}  # fmt: skip
OF_TENSORS = [
    n for n in FUNCTIONS if n.startswith(("fastmerge.ops.", "fastmerge.integrations.torch_ops."))
]
INSTALLS = [n for n in FUNCTIONS if n.endswith((".install", ".installed", "sd_mecha.methods"))]


def test_every_function_is_called_wrongly_here() -> None:
    untested = FUNCTIONS.keys() - REFUSING - set(OF_TENSORS) - set(INSTALLS) - HARMLESS
    assert untested == {"fastmerge.search.search.drive"}  # which calls its arguments, and no more


@pytest.mark.parametrize("name", REFUSING)
def test_what_is_raised_is_what_the_docstring_says(name: str, tmp_path: Path) -> None:
    if ".live." in name or ".llama." in name:
        pytest.importorskip("transformers")
    text = Text(FUNCTIONS[name])
    for number, call in enumerate(REFUSED[REFUSING[name]]):
        assert error_of(call, tmp_path / f"out{number}") in text.raised, number


@pytest.mark.parametrize("name", INSTALLS)
def test_a_package_that_is_missing_is_a_resource_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, call = name.split(".")[-2:]
    package = module.removesuffix("_methods")
    # Imported before, perhaps, with all that is below it.
    below = [own for own in sys.modules if own.partition(".")[0] == package]
    for own in {package, *below}:
        monkeypatch.setitem(sys.modules, own, None)
    home = import_module(f"fastmerge.integrations.{module}")
    if call == "installed":
        with pytest.raises(errors.ResourceError), home.installed():
            pass
    else:
        assert error_of(getattr(home, call)) == "ResourceError"
    assert "ResourceError" in Text(FUNCTIONS[name]).raised


GIVEN: dict[str, Any] = {
    "base": A, "a": A, "b": B, "x": B, "tensor": A, "tensors": [A, B], "weights": [0.5, 0.5],
    "t": 0.5, "density": 0.5, "seed": 1, "coefficients": [0.5, 0.5], "method": "linear",
    "parameters": {"weight": [0.5, 0.5]}, "grads": {"w": A}, "models": [{"w": A}],
}  # fmt: skip
# Arguments of which at most one is made wrong, and how.
WRONG_VALUES = {
    "t": "x", "density": "x", "weights": ["x", 1], "coefficients": ["x", 1], "lambda_": "x",
    "epsilon": "x", "max_iter": "x", "select_topk": "x", "filter_wise": "x", "scale": "x",
    "method": "no such method",
}  # fmt: skip


def as_it_is(value: Any) -> Any:
    return value


def as_torch(value: Any) -> Any:
    """Arrays as tensors, in a list too."""
    import torch

    if isinstance(value, list):
        return [as_torch(own) for own in value]
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Some that it takes."""
    needed = [
        name
        for name, own in inspect.signature(function).parameters.items()
        if own.default is own.empty or (name == "parameters" and function is ops.merge)
    ]
    return {name: GIVEN[name] for name in needed}


def wrongly(given: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The arguments with the last of their tensors changed."""
    if "grads" in given:
        return given | {"models": [{"w": change(A)}]}
    name = next(n for n in ("tensors", "x", "b", "tensor") if n in given)
    value = given[name]
    return given | {name: [*value[:-1], change(value[-1])] if name == "tensors" else change(value)}


@pytest.mark.parametrize("name", OF_TENSORS)
def test_calls_of_tensors_raise_what_they_say_and_no_more_is_said(name: str) -> None:
    function, text = FUNCTIONS[name], Text(FUNCTIONS[name])
    given = arguments(function)
    if "torch_ops" in name:
        pytest.importorskip("torch")
    as_given = as_torch if "torch_ops" in name else as_it_is
    given = {key: as_given(value) for key, value in given.items()}
    made = function(**given)
    if "grads" not in given and not name.endswith("gram"):
        assert tuple(made.shape) == (2, 3) and type(made) is type(as_given(A))
    calls = [wrongly(given, lambda _: as_given(np.zeros((2, 3)))),
             wrongly(given, lambda _: as_given(np.zeros(5, np.float32)))]  # fmt: skip
    if "tensor" in given:  # which has no other to differ from
        calls[1] = given | {"out": np.zeros(5, np.float32)}
    wrong = next((n for n in WRONG_VALUES if n in inspect.signature(function).parameters), None)
    if wrong is not None:
        calls.append(given | {wrong: WRONG_VALUES[wrong]})
    assert {error_of(function, **own) for own in calls} == text.raised


# Of numbers and switches by a name that is not a recipe's: what no function of them takes.
NO_VALUES: dict[str, list[Any]] = {
    "weights": [["x", 1], [1, 2, 3], None], "coefficients": [["x", 1], [1, 2, 3]],
    "lambda_": ["x"], "flatten": ["perhaps"], "row_wise": ["perhaps"],
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in OF_TENSORS if n != "fastmerge.ops.merge"])
def test_an_error_calls_an_argument_as_the_function_does(name: str) -> None:
    function, as_given = FUNCTIONS[name], as_it_is
    if "torch_ops" in name:
        pytest.importorskip("torch")
        as_given = as_torch
    given = {key: as_given(value) for key, value in arguments(function).items()}
    for argument in inspect.signature(function).parameters.keys() & NO_VALUES:
        for value in NO_VALUES[argument]:
            with pytest.raises(errors.FastmergeError) as caught:
                function(**given | {argument: value})
            said = str(caught.value)
            assert re.search(rf"(?<!\w){argument}(?!\w)", said), said
            assert said.startswith(f"{name.split('.')[-1]}: "), said


@pytest.mark.parametrize("name", METHODS)
def test_a_method_s_function_has_the_table_s_bounds_defaults_and_paper(name: str) -> None:
    row, function = METHODS[name], getattr(ops, name)
    text, signature = Text(function), inspect.signature(function).parameters
    sources = re.findall(r"arXiv:[\d.]+\d|doi:\S+\d|mergekit 0\.1\.5", row.paper)
    assert [source for source in sources if source not in text.whole] == []
    called = {"weight": "weights", "nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"}
    for own in row.parameters:
        argument = called.get(own.name, own.argument)
        if argument not in signature:
            assert own.name in ("int8_mask", "trim")  # of recipes alone
            continue
        said = text.defined[argument]
        if own.choices and own.kind is str:
            assert [word for word in own.choices if f'"{word}"' not in said] == [], argument
        elif own.kind in (int, float) and own.bounds() != "any number":
            assert own.bounds() in said, f"{argument}: {own.bounds()}"
        default = signature[argument].default
        assert default is inspect.Parameter.empty or default == own.default, argument

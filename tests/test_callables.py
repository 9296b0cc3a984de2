"""Scorers that users write: what runs is what is hashed, and in what form they get the weights."""

from __future__ import annotations

import os
import py_compile
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge import api
from fastmerge.errors import FastmergeError
from fastmerge.evaluation import scorers
from fastmerge.evaluation import settings as settings_module
from fastmerge.evaluation.as_read import AsRead
from fastmerge.evaluation.callables import in_user_code, scores_of
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.settings import load_evaluate
from fastmerge.evaluation.weights import Merged, Weights
from fastmerge.retrograde import run
from fastmerge.search.sweep import sweep


@pytest.mark.parametrize("edited", ["keyed/scoring.py", "keyed/parts.py", "beside.py", "lazy.py"])
def test_what_runs_is_the_text_that_was_hashed(
    tmp_path: Path, edited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit that leaves a file's time and length as they were, with bytecode of the old text."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    scoring = (
        "from beside import B\nfrom keyed import parts\nA = 1\n"
        "def score(model):\n    from lazy import L\n    return {'a': A + B + parts.P + L}\n"
    )
    files = {
        "keyed/__init__.py": "", "keyed/scoring.py": scoring, "keyed/parts.py": "P = 1\n",
        "beside.py": "B = 1\n", "lazy.py": "L = 1\n",
    }  # fmt: skip
    (tmp_path / "keyed").mkdir()

    def write(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (1e9, 1e9))

    def forget() -> None:
        for name in ("keyed", "keyed.scoring", "keyed.parts", "beside", "lazy"):
            sys.modules.pop(name, None)

    for name, text in files.items():
        write(name, text)
        py_compile.compile(str(tmp_path / name), doraise=True)
    settings = load_evaluate({"callable": "keyed.scoring:score"})
    keys = set()
    for value, is_known in ((1, True), (2, True), (3, False)):
        if not is_known:
            forget()  # as in another process
        write(edited, files[edited].replace(" = 1", f" = {value}"))
        scorer = make_scorer(settings, tmp_path, tmp_path)
        keys.add(scorer.key)
        assert scorer.score(None, "steer").value == 3 + value
    assert len(keys) == (1 if edited == "lazy.py" else 3)  # what runs later is not in the key
    assert not any(isinstance(finder, AsRead) for finder in sys.meta_path)
    forget()


def test_a_helper_of_another_schedule_is_not_taken_for_one_s_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"of_{name}.py").write_text(
            "from fm_helper import A\nimport json\ndef score(model): return {'a': A}\n"
        )
        (tmp_path / name / "fm_helper.py").write_text(f"A = {len(name)}\n")
        (tmp_path / name / "json.py").write_text("1 / 0\n")  # the library's comes first
    settings = load_evaluate({"callable": "of_first:score"})
    scorer = make_scorer(settings, tmp_path / "first", tmp_path)
    assert scorer.score(None, "steer").value == 5.0
    settings = load_evaluate({"callable": "of_second:score"})
    with pytest.raises(FastmergeError, match="'fm_helper' lies beside the schedule, and another"):
        make_scorer(settings, tmp_path / "second", tmp_path)


def test_a_function_that_asks_for_a_folder_gets_the_model_as_files(
    zoo: Any, tmp_path: Path
) -> None:
    """Both ways of one state, a state that is no combination, and nothing left behind."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    base = zoo.base("m0")
    schedule = {
        "baseline": str(base),
        "pool": [str(zoo.tune(base, "m1", size=0.05))],
        "seed": 1,
        "schedule": {
            "steps": [
                {"degrade": {"partner": "m1", "method": "slerp", "t": 0.3}},
                {"degrade": {"partner": "m1", "method": "ties", "t": 0.3, "density": 0.5}},
            ]
        },
        "evaluate": {"callable": "stand:in"},
    }
    seen: list[Path] = []

    def from_model(model: Any) -> dict[str, float]:
        return {"norm": float(model.lm_head.weight.double().norm())}

    def from_folder(folder: Path) -> dict[str, float]:
        seen.append(folder)
        tensors = load_file(folder / "model.safetensors")
        assert AutoConfig.from_pretrained(folder).hidden_size == 32
        return {"norm": float(tensors["lm_head.weight"].double().norm())}

    def from_both(model: Any, folder: Path) -> dict[str, float]:
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        assert all((model.state_dict()[n] == x).all() for n, x in own.state_dict().items())
        return from_model(model)

    found = {}
    for function in (from_model, from_folder, from_both):
        out = tmp_path / function.__name__
        trajectory = run(schedule, out, score=function, threads=1).trajectory
        found[function] = [scores.value for scores in trajectory.scores if scores]
        assert not list(out.glob(".*"))
    assert found[from_model] == found[from_folder] == found[from_both]
    assert len(set(found[from_model])) == 3
    assert all(tmp_path / "from_folder" in folder.parents for folder in seen)


def test_a_folder_that_a_killed_run_left_is_gone_at_the_next_score(
    zoo: Any, tmp_path: Path
) -> None:
    plan = api.plan(f"merge_method: passthrough\nmodels: [{{model: {zoo.base('m0')}}}]\n")

    def killed() -> None:
        with Merged(plan, str, near=tmp_path) as weights:
            assert weights.folder() == weights.folder()
            assert (weights.folder() / "config.json").is_file()
            raise KeyboardInterrupt

    (tmp_path / ".scored" / "model").mkdir(parents=True)
    with Merged(plan, str, near=tmp_path):
        assert not (tmp_path / ".scored").exists()
    with pytest.raises(KeyboardInterrupt):
        killed()
    assert not (tmp_path / ".scored").exists()
    with Merged(plan, str) as weights:  # the system's place for temporary files
        folder = weights.folder()
        assert (folder / "model.safetensors").is_file()
    assert not folder.exists() and not folder.parent.exists()


def test_an_argument_with_a_default_is_the_function_s_own(tmp_path: Path) -> None:
    def score(model: Any, folder: str = "mine") -> dict[str, float]:
        assert (model, folder) == ("a model", "mine")
        return {"a": 1.0}

    scorer = make_scorer(load_evaluate({"callable": "a:b"}), tmp_path, tmp_path, score)
    assert scorer.score("a model", "steer").value == 1.0

    def bad(model: Any, folder: str, other: int) -> dict[str, float]:
        return {"a": model + folder + other}

    with pytest.raises(FastmergeError, match="is called with the model alone: missing a required"):
        make_scorer(load_evaluate({"callable": "a:b"}), tmp_path, tmp_path, bad)


def test_a_key_of_one_s_own_says_what_scores(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings_module, "WAYS", list(settings_module.WAYS))
    monkeypatch.setattr(scorers, "WAYS", settings_module.WAYS)
    monkeypatch.setattr(scorers, "_MAKERS", dict(scorers._MAKERS))

    class Norm:
        """The mean size of one tensor, from a state dict."""

        version = "norms"

        def __init__(self, settings: Any, *_: Path) -> None:
            self._tensor = settings.registered["norm_of"]["tensor"]
            if not isinstance(self._tensor, str):
                raise FastmergeError(f"{settings.at('norm_of')}: 'tensor' is a name")
            self.key = f"norm of {self._tensor}"

        def has(self, split: str) -> bool:
            return split == "steer"

        def score(self, weights: Weights, split: str, limit: int | None = None) -> Scores:
            assert (split, limit) == ("steer", None)
            tensor = weights.state_dict()[self._tensor]
            return Scores({"norm": TaskScore(100 * float(tensor.double().abs().mean()), "", 1)})

    scorers.register("norm_of", Norm)
    with pytest.raises(FastmergeError, match="'norm_of' of an evaluate section is taken"):
        scorers.register("norm_of", Norm)
    base = zoo.base("m0")
    recipe = (
        f"merge_method: slerp\nbase_model: {base}\n"
        f"models: [{{model: {base}}}, {{model: {zoo.tune(base, 'm1', size=0.05)}}}]\n"
        "parameters: {t: 0.5}\n"
    )
    (tmp_path / "norm.yml").write_text("norm_of: {tensor: lm_head.weight}\n")
    points = sweep(recipe, tmp_path / "out", [0.0, 1.0], evaluate=tmp_path / "norm.yml")
    for point, name in zip(points, ("m0", "m1"), strict=True):
        expected = 100 * np.abs(zoo.read(zoo.root / name)["lm_head.weight"]).mean(dtype=np.float64)
        assert point.scores is not None and point.scores.value == pytest.approx(expected)
    (tmp_path / "norm.yml").write_text("norm_of: {tensor: [1]}\n")
    with pytest.raises(FastmergeError, match=r"norm\.yml:1: 'tensor' is a name"):
        sweep(recipe, tmp_path / "other", [0.0], evaluate=tmp_path / "norm.yml")
    with pytest.raises(FastmergeError, match="perplexity, norm_of; found callable and norm_of"):
        load_evaluate({"norm_of": {"tensor": "a"}, "callable": "a:b"})


def _key_of(function: Any) -> str:
    return scorers.CallableScorer(function, load_evaluate({"callable": "stand:in"})).key


def _executed(text: str, name: str = "score") -> Any:
    """A function without a source file, as of `python -` or a notebook that is gone."""
    made: dict[str, Any] = {"__name__": "__main__"}
    exec(text, made)
    return made[name]


_WITHOUT_A_FILE = {
    "a constant": "def score(model):\n    return VALUE",
    "a lambda": "score = lambda model: VALUE",
    "nested": "def score(model):\n    def inner():\n        return VALUE\n    return inner()",
    "a default": "def score(model, by=VALUE):\n    return by",
    "a closure": "def make(by):\n    return lambda model: by\nscore = make(VALUE)",
    "a global": "BY = VALUE\ndef score(model):\n    return BY",
    "a global list": "BY = [1, {'a': VALUE}]\ndef score(model):\n    return BY[1]['a']",
    "a helper": "def by():\n    return VALUE\ndef score(model):\n    return by()",
    "a kept helper": (
        "import functools\n@functools.cache\ndef by():\n    return VALUE\n"
        "def score(model):\n    return by()"
    ),
    "a partial": (
        "import functools\ndef of(model, by):\n    return by\n"
        "score = functools.partial(of, by=VALUE)"
    ),
    "an object": (
        "class Score:\n    def __call__(self, model):\n        return VALUE\nscore = Score()"
    ),
    "an object's helper": (
        "class Score:\n    def by(self):\n        return VALUE\n    def __call__(self, model):\n"
        "        return self.by()\nscore = Score()"
    ),
    "an object it reads": (
        "class Own:\n    def __init__(self):\n        self.by = VALUE\nown = Own()\n"
        "def score(model):\n    return own.by"
    ),
    "a tensor": "import torch\nBY = torch.tensor([VALUE])\ndef score(model):\n    return float(BY)",
    "a condition": "def score(model):\n    return 1.0 if VALUE > 3 else 0.0",
}


@pytest.mark.parametrize("what", _WITHOUT_A_FILE)
def test_a_function_without_a_file_is_its_code_and_what_it_reads(what: str) -> None:
    text = _WITHOUT_A_FILE[what]
    first, again, other = (_executed(text.replace("VALUE", v)) for v in ("1.0", "1.0", "7.0"))
    assert _key_of(first) == _key_of(again) != _key_of(other)
    scorers.CallableScorer(first, load_evaluate({"callable": "stand:in"})).check_kept()


def test_two_lambdas_of_one_file_are_two_functions() -> None:
    ones = [_key_of(lambda model: 1.0) for _ in range(2)]
    assert ones[0] == ones[1] != _key_of(lambda model: 7.0)


def test_what_hides_its_contents_is_not_resumed_without_a_file(tmp_path: Path) -> None:
    text = (
        "import itertools, numpy\nBY = numpy.random.default_rng(1)\n"
        "def score(model):\n    return float(BY.random())"
    )
    scorer = scorers.CallableScorer(_executed(text), load_evaluate({"callable": "stand:in"}))
    with pytest.raises(FastmergeError, match=r"^resume=True: score reads what does not show wh"):
        scorer.check_kept()
    (tmp_path / "fm_hidden.py").write_text(text)
    settings = load_evaluate({"callable": "fm_hidden:score"})
    make_scorer(settings, tmp_path, tmp_path).check_kept()  # its text says how that was made


def test_a_scorer_without_a_signature_is_one_line(tmp_path: Path) -> None:
    """`builtins:int`, in a stranger's schedule."""
    settings = load_evaluate({"callable": "builtins:int"})
    with pytest.raises(FastmergeError, match="builtins:int: its arguments cannot be read"):
        make_scorer(settings, tmp_path, tmp_path)


@pytest.mark.parametrize("where", ["as it is imported", "as it scores"])
def test_a_function_that_exits_is_one_line(tmp_path: Path, where: str) -> None:
    """It ended the command with its own code, even 0, and nothing was said or written."""
    body = "raise SystemExit(0)"
    text = body if where == "as it is imported" else f"def score(model):\n    {body}\n"
    (tmp_path / f"fm_exits_{len(where)}.py").write_text(text)
    settings = load_evaluate({"callable": f"fm_exits_{len(where)}:score"})
    with pytest.raises(FastmergeError, match=r"fm_exits_\d+\.py:\d: SystemExit: 0$"):
        make_scorer(settings, tmp_path, tmp_path).score(None, "steer")


def test_bytes_that_are_no_program_have_no_place(tmp_path: Path) -> None:
    (tmp_path / "fm_nul.py").write_text("\0")
    settings = load_evaluate({"callable": "fm_nul:score"})
    with pytest.raises(FastmergeError, match="'fm_nul:score': SyntaxError: source code"):
        make_scorer(settings, tmp_path, tmp_path)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "hpu", "tpu", "cuda:99"])
def test_a_device_that_cannot_compute_is_one_line(tmp_path: Path, device: str) -> None:
    settings = load_evaluate({"callable": "builtins:abs", "device": device})
    with pytest.raises(FastmergeError, match=rf"'{device}'.*; use cpu") as caught:
        make_scorer(settings, tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "answer, said",
    [
        ({"a": "0.5"}, "'0.5' is text"),
        ({"a": [b"1", b"2"]}, "is text"),
        ({1: 0.5, "1": 0.7}, "two tasks have one name"),
    ],
)
def test_what_only_looks_like_scores_is_refused(answer: Any, said: str) -> None:
    with pytest.raises(FastmergeError, match=said):
        scores_of(answer, "who")


def test_an_error_without_a_text_is_one_line() -> None:
    class MuteError(Exception):
        def __str__(self) -> str:
            raise ValueError

    assert in_user_code(MuteError()) == "MuteError: its text cannot be read: ValueError"

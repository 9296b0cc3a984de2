"""The harness's own tasks over local JSON lines, against its own command with the same files."""

from __future__ import annotations

import gzip
import json
import re
import socket
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastmerge.errors import FastmergeError
from fastmerge.evaluation.leaderboard import leaderboard_table
from fastmerge.evaluation.local_data import LAYOUTS
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.settings import load_evaluate
from fastmerge.retrograde import run
from fastmerge.retrograde.runner import describe
from tests.test_retrograde_run import invoke

SHOTS = {
    "arc_challenge": 25, "hellaswag": 10, "mmlu_anatomy": 5, "mmlu_virology": 5,
    "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5,
    "arc_easy": 0, "piqa": 0, "boolq": 0, "lambada_openai": 0,
}  # fmt: skip
SUBJECTS = ("anatomy", "virology")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def refused(*_: Any) -> None:
        raise AssertionError("the network was asked")

    torch.set_num_threads(1)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.delenv("FASTMERGE_DATA", raising=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, shared_zoo: Any) -> Path:
    """A random llama with an id for each character, which gives every ending its own likelihood."""
    zoo = type(shared_zoo)(tmp_path_factory.mktemp("local"))
    folder = zoo.base("llama", vocab=104, scale=0.3)
    write_tokenizer(folder)
    zoo.tune(folder, "other", seed=1)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_data(folder, SUBJECTS)
    return folder


def scorer_of(llama: Path, **evaluate: Any) -> Any:
    return make_scorer(load_evaluate({"max_length": 2500, **evaluate}), Path(), llama)


def tasks_of(names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"name": name, "num_fewshot": SHOTS[name]} for name in names]


def test_every_item_scores_as_by_the_harness_s_command(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    from fastmerge import llama as loading

    harness_evaluate = lm_eval.evaluate
    called: list[Mapping[str, Any]] = []

    def listening(**options: Any) -> Any:
        called.append(harness_evaluate(**options))
        return called[-1]

    monkeypatch.setattr(lm_eval, "evaluate", listening)
    scorer = scorer_of(llama, data=str(data), tasks=tasks_of(list(SHOTS)), batch_size=4)
    scores = scorer.score(loading.load(llama, dtype="float32"), "steer")
    counts = {name: task.count for name, task in scores.tasks.items()}
    assert counts == {**dict.fromkeys(SHOTS, 4), "gsm8k": 1}
    theirs = by_command(llama, data, tmp_path)
    for name in SHOTS:
        ours = {s["doc_id"]: s for s in called[0]["samples"][name] if s["filter"] in USED}
        found = {s["doc_id"]: s for s in theirs[name] if s["filter"] in USED}
        assert sorted(ours) == sorted(found) == list(range(counts[name]))
        for number, sample in found.items():
            assert ours[number]["arguments"] == sample["arguments"]
            if name == "gsm8k":
                assert ours[number]["filtered_resps"] == sample["filtered_resps"]
                continue
            ours_ll, theirs_ll = (
                [float(x[0]) for (x,) in s["resps"]] for s in (ours[number], sample)
            )
            np.testing.assert_allclose(ours_ll, theirs_ll, atol=1e-3)
            assert len(set(theirs_ll)) == len(theirs_ll)


USED = ("none", "strict-match")


def by_command(llama: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The samples of ``lm_eval`` on task files that change the harness's in where the rows are."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    own = Path(lm_eval.__file__).parent / "tasks"
    tasks = folder / "tasks"
    tasks.mkdir()
    for name in SHOTS:
        layout = LAYOUTS["mmlu" if name.startswith("mmlu") else name]
        (source,) = [
            file
            for file in sorted((own / layout.tasks).glob("*.yaml"))
            if f"\ntask: {name}\n" in f"\n{file.read_text()}\n".replace('"', "")
        ]
        files = {}
        for split in filter(None, (layout.scored, layout.shown)):
            file = data / layout.folder / f"{split}.jsonl"
            if name.startswith("mmlu"):
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                subject = name.removeprefix("mmlu_")
                file = tasks / f"{name}_{split}.jsonl"
                write(file, [row for row in rows if row["subject"] == subject])
            packed = file.with_suffix(".jsonl.gz")
            files[split] = str(packed if packed.exists() else file)
        given = {
            "include": str(source), "task": name, "dataset_path": "json",
            "dataset_name": None, "dataset_kwargs": {"data_files": files},
        }  # fmt: skip
        (tasks / f"{name}.yaml").write_text(yaml.safe_dump(given))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: dict[str, Any] = {}
    for shots in set(SHOTS.values()):
        names = [name for name, own_shots in SHOTS.items() if own_shots == shots]
        found |= lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(llama), "dtype": "float32", "max_length": 2500},
            tasks=names,
            num_fewshot=shots,
            device="cpu",
            batch_size=4,
            task_manager=manager,
            bootstrap_iters=0,
        )["samples"]
    return found


def test_what_the_endings_of_an_item_share_is_read_once(
    llama: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmerge import llama as loading
    from fastmerge.evaluation import likelihoods

    model = loading.load(llama, dtype="float32")
    tokens: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, ids, __: tokens.append(ids[0].numel()))
    task = {"name": "arc_challenge", "num_fewshot": 25}
    scorer = scorer_of(llama, data=str(data), tasks=[task])
    once = scorer.score(model, "steer")
    count = sum(tokens)
    monkeypatch.setattr(likelihoods, "reads", lambda _: False)
    plain = scorer_of(llama, data=str(data), tasks=[task]).score(model, "steer")
    assert once.tasks["arc_challenge"].items == plain.tasks["arc_challenge"].items
    assert sum(tokens) - count > 3 * count


def test_the_preset_reads_all_six_with_every_subject(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    from fastmerge import llama as loading

    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    names = [file.stem.removeprefix("mmlu_") for file in folder.glob("mmlu_*.yaml")]
    write_data(tmp_path / "all", names)
    monkeypatch.setenv("FASTMERGE_DATA", str(tmp_path / "all"))
    scorer = scorer_of(llama, preset="open_llm_leaderboard_v1", limit=1)
    scores = scorer.score(loading.load(llama, dtype="float32"), "steer")
    counts = {name: task.count for name, task in scores.tasks.items()}
    assert counts == {
        "ARC": 1, "HellaSwag": 1, "MMLU": 57, "TruthfulQA": 1, "Winogrande": 1, "GSM8K": 1
    }  # fmt: skip
    row = leaderboard_table([("llama", scores)]).splitlines()[3]
    values = [task.value for task in scores.tasks.values()]
    assert row == "| llama | " + " | ".join(f"{v:.2f}" for v in [*values, sum(values) / 6]) + " |"


def test_ranges_limits_and_the_hold_out_see_their_own_rows(llama: Path, data: Path) -> None:
    from fastmerge import llama as loading

    scorer = scorer_of(
        llama,
        data=str(data),
        tasks=[{"name": "piqa", "items": "0:3"}],
        holdout=[{"name": "piqa", "items": "3:"}],
        limit=2,
    )
    model = loading.load(llama, dtype="float32")
    assert scorer.score(model, "steer").tasks["piqa[0:3]"].count == 2
    assert scorer.score(model, "holdout").tasks["piqa[3:]"].count == 1


def test_the_key_is_of_the_rows_and_not_of_their_place(llama: Path, data: Path) -> None:
    def key(folder: Path) -> str:
        return str(scorer_of(llama, data=str(folder), tasks=["piqa"]).key)

    first = key(data)
    moved = data.rename(data.parent / "moved")
    assert key(moved) == first
    file = moved / "piqa" / "validation.jsonl"
    packed = gzip.compress(file.read_bytes())
    file.unlink()
    file.with_suffix(".jsonl.gz").write_bytes(packed)
    assert key(moved) == first  # the same rows
    rows = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
    rows[2]["label"] = 1 - rows[2]["label"]
    write(file, rows)
    file.with_suffix(".jsonl.gz").unlink()
    assert key(moved) != first


def test_the_option_goes_before_the_schedule_and_that_before_the_environment(
    llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(**options: Any) -> str:
        evaluate = {"tasks": ["piqa"], "limit": 1, **options.pop("evaluate", {})}
        step = {"method": "linear", "t": 0.5}
        cycle = {"degrade": {"partner": "next", **step}, "retrace": {"toward": "baseline", **step}}
        schedule = {
            "baseline": str(llama), "pool": [str(llama.parent / "other")], "evaluate": evaluate,
            "schedule": {"cycles": 1, **cycle},
        }  # fmt: skip
        with pytest.raises(FastmergeError) as caught:
            run(schedule, tmp_path / "out", **options)
        return str(caught.value)

    monkeypatch.setenv("FASTMERGE_DATA", str(tmp_path / "c"))
    assert refusal() == f"FASTMERGE_DATA: no such folder: {tmp_path / 'c'}"
    assert f"no such folder: {tmp_path / 'b'}" in refusal(evaluate={"data": str(tmp_path / "b")})
    found = refusal(evaluate={"data": str(data)}, data=tmp_path / "a")
    assert f"no such folder: {tmp_path / 'a'}" in found


def test_a_dry_run_says_what_is_read_and_for_how_long(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    step = {"method": "linear", "t": 0.5}
    cycle = {"degrade": {"partner": "next", **step}, "retrace": {"toward": "baseline", **step}}
    schedule = {
        "baseline": str(llama), "pool": [str(llama.parent / "other")],
        "schedule": {"cycles": 1, **cycle},
        "evaluate": {"tasks": ["piqa"], "holdout": ["lambada_openai", "gsm8k"], "limit": 2},
    }  # fmt: skip
    found = describe(schedule, data=data)["measurements"]
    piqa, lambada, gsm8k = found["tasks"]
    assert piqa["split"] == "steer" and piqa["items"] == 2 and piqa["times"] == 2 + 2 + 1
    assert lambada["split"] == "holdout" and lambada["items"] == 2 and lambada["times"] == 3
    assert found["at most"] == 5 + 3 and 0 < found["seconds"] < 60
    # The question once, and both endings, of three and four letters.
    assert piqa["tokens"] == 2 * (len("Question: Get 0.\nAnswer: aei umnt"))
    assert gsm8k["items"] == 1 and gsm8k["tokens"] > 256  # what it may generate
    written = yaml.safe_dump(schedule)
    (tmp_path / "walk.yml").write_text(written)
    done = invoke("retrograde", str(tmp_path / "walk.yml"), "out", "--dry-run", "--data", str(data))
    assert "time for them                 at most about 0." in done.output, done.output
    assert re.search(r"piqa +steer +2 +66 +5\n", done.output)


def test_a_run_over_local_data_says_from_the_first_how_long_it_takes(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    step = {"method": "linear", "t": 0.5}
    cycle = {"degrade": {"partner": "next", **step}, "retrace": {"toward": "baseline", **step}}
    schedule = {
        "baseline": str(llama), "pool": [str(llama.parent / "other")],
        "schedule": {"cycles": 1, **cycle}, "evaluate": {"tasks": ["piqa"]},
    }  # fmt: skip
    told: list[Any] = []
    out = tmp_path / "out"
    result = run(schedule, out, data=data, threads=1, on_score=told.append)
    assert 0 < told[0].expected < 60 and told[0].most == 2 + 2 + 1
    assert [m.what for m in told[::2]][:4] == ["llama", "other", "step 1", "step 2"]
    (piqa,) = result.trajectory.models[0].tasks.values()
    assert piqa.count == 4 and len(piqa.items["piqa"]) == 4


def test_the_documentation_has_every_layout() -> None:
    text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for name, layout in LAYOUTS.items():
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[1]]
        scored, shown, fields = row.split("|")[2:5]
        files = layout.folder.replace("arc_easy", "arc_challenge")  # one row for both
        assert f"`{files}/{layout.scored}`" in scored
        assert f"`{layout.shown}`" in shown if layout.shown else "none" in shown
        assert all(field in fields for field in layout.fields)


def drop(field: str) -> Any:
    def change(row: dict[str, Any]) -> None:
        del row[field]

    return change


def put(field: str, value: Any) -> Any:
    def change(row: dict[str, Any]) -> None:
        row[field] = value

    return change


LAYOUT_FAULTS = {
    "arc_easy": (drop("answerKey"), "test.jsonl: line 4: the row has no 'answerKey'; rows of arc"),
    "arc_challenge": (put("answerKey", "Z"), "line 4: 'answerKey' is none of the labels"),
    "hellaswag": (put("label", "7"), "line 4: 'label' is no number of an ending"),
    "mmlu_anatomy": (put("answer", "B"), "line 8: 'answer' must be whole number, not 'B'"),
    "truthfulqa_mc2": (put("mc2_targets", [1]), "'mc2_targets' must be a mapping, not [1]"),
    "winogrande": (put("sentence", "No gap."), "line 4: 'sentence' has no '_' to fill"),
    "gsm8k": (put("answer", "7"), "line 1: 'answer' has no '#### ' before its number"),
    "piqa": (put("label", 2), "line 4: 'label' must be 0 or 1"),
    "boolq": (put("passage", None), "line 4: 'passage' must be text, not None"),
    "lambada_openai": (put("text", "word"), "line 4: 'text' has no last word"),
}


@pytest.mark.parametrize("name", LAYOUT_FAULTS)
def test_a_row_of_another_layout_is_one_line(llama: Path, data: Path, name: str) -> None:
    change, message = LAYOUT_FAULTS[name]
    layout = LAYOUTS["mmlu" if name.startswith("mmlu") else name]
    file = data / layout.folder / f"{layout.scored}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows[-1])
    write(file, rows)
    with pytest.raises(FastmergeError) as caught:
        scorer_of(llama, data=str(data), tasks=[name])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("evaluate.tasks[0]: ")


def test_a_file_from_elsewhere_is_read(llama: Path, data: Path) -> None:
    """With a byte order mark, and with other fields, whose types need not agree: the data library
    takes one type for each, so that such rows were refused.
    """
    file = data / "arc_easy" / "test.jsonl"
    (before,) = scorer_of(llama, data=str(data), tasks=["arc_easy"]).readings("steer")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, more in zip(rows, (1, "x", [1], {"a": None}), strict=True):
        row["more"] = row["choices"]["more"] = more
    text = "".join(json.dumps(row) + "\r\n" for row in rows)
    file.write_bytes(("\ufeff" + text).encode())
    assert scorer_of(llama, data=str(data), tasks=["arc_easy"]).readings("steer") == [before]
    file = data / "hellaswag" / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["label"] = int(rows[0]["label"])
    write(file, rows)
    (reading,) = scorer_of(llama, data=str(data), tasks=["hellaswag"]).readings("steer")
    assert reading.items == len(rows)


@pytest.mark.parametrize(
    "name, change",
    [
        ("arc_easy", put("choices", {"text": ["", "b"], "label": ["A", "B"]})),
        ("hellaswag", put("endings", ["a", " ", "b", "c"])),
        ("piqa", put("sol2", "\n")),
    ],
)
def test_an_ending_without_a_word_is_one_line(
    llama: Path, data: Path, name: str, change: Any
) -> None:
    """The harness asked for its first character, or divided by its length."""
    file = data / LAYOUTS[name].folder / f"{LAYOUTS[name].scored}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows[-1])
    write(file, rows)
    with pytest.raises(FastmergeError, match=r"line 4: '\w+' .*a text without a word"):
        scorer_of(llama, data=str(data), tasks=[name])


def test_a_line_that_is_no_json_says_where(llama: Path, data: Path) -> None:
    file = data / "arc_easy" / "test.jsonl"
    file.write_text(file.read_text().replace("\n", ",\n"))
    with pytest.raises(FastmergeError, match=r"line 1: is no JSON \(Extra data\); a row is one ob"):
        scorer_of(llama, data=str(data), tasks=["arc_easy"])


@pytest.mark.parametrize("name", [n for n, layout in LAYOUTS.items() if layout.shown])
def test_without_examples_a_task_needs_no_file_of_them(llama: Path, data: Path, name: str) -> None:
    layout = LAYOUTS[name]
    (data / layout.folder / f"{layout.shown}.jsonl").unlink(missing_ok=True)
    task = "mmlu_anatomy" if name == "mmlu" else name
    scorer = scorer_of(llama, data=str(data), tasks=[{"name": task, "num_fewshot": 0}])
    (reading,) = scorer.readings("steer")
    assert reading.items > 0


def test_what_is_not_there_is_named_at_once(llama: Path, data: Path) -> None:
    def refusal(**evaluate: Any) -> str:
        with pytest.raises(FastmergeError) as caught:
            scorer_of(llama, **evaluate)
        return str(caught.value)

    given = {"data": str(data)}
    (data / "gsm8k" / "train.jsonl").unlink()
    (data / "arc_challenge" / "test.jsonl").unlink()
    assert refusal(preset="open_llm_leaderboard_v1", **given) == (
        f"evaluate.preset: {data} (evaluate.data) lacks arc_challenge/test.jsonl, "
        "gsm8k/train.jsonl (or .jsonl.gz)"
    )
    # Its examples would be documents that are scored.
    assert "lacks gsm8k/train.jsonl" in refusal(tasks=["gsm8k"], **given)
    (data / "piqa" / "train.jsonl").unlink()
    assert "lacks piqa/train.jsonl" in refusal(tasks=["piqa"], num_fewshot=2, **given)
    assert "no row of subject 'astronomy'" in refusal(tasks=["mmlu_astronomy"], **given)
    assert "unknown task 'mmlu_stems'" in refusal(tasks=["mmlu_stems"], **given)
    assert "did you mean 'lambada_openai'?" in refusal(tasks=["lambada_open"], **given)
    assert "'data' goes with 'tasks' or a 'preset'" in refusal(perplexity="a.txt", **given)
    (data / "boolq" / "validation.jsonl").write_text("{no json\n")
    assert "validation.jsonl: line 1: is no JSON" in refusal(tasks=["boolq"], **given)
    (data / "boolq" / "validation.jsonl").write_text("\n")
    assert "validation.jsonl: holds no rows" in refusal(tasks=["boolq"], **given)
    (data / "boolq" / "validation.jsonl").rename(data / "boolq" / "validation.jsonl.gz")
    assert "validation.jsonl.gz: cannot be read" in refusal(tasks=["boolq"], **given)
    (data / "piqa" / "validation.jsonl.gz").write_bytes(b"")
    assert "lies packed beside it, too; remove one" in refusal(tasks=["piqa"], **given)


# --- rows and a tokenizer ---


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_data(folder: Path, subjects: Sequence[str]) -> None:
    """Four rows to score, one of GSM8K, and thirty to show, of every data set."""
    rng = np.random.default_rng(3)

    def words(count: int) -> list[str]:
        return ["".join(rng.choice(list("aeioumnt"), 3 + i)) for i in range(count)]

    def arc(i: int) -> dict[str, Any]:
        choices = {"text": words(4), "label": list("ABCD")}
        return {
            "id": str(i),
            "question": f"Is {i}?",
            "choices": choices,
            "answerKey": "ABCD"[i % 4],
        }

    def hellaswag(i: int) -> dict[str, Any]:
        return {
            "activity_label": "Test", "ctx_a": f"He has {i}.", "ctx_b": "then he",
            "endings": [f"[title] {w}" for w in words(4)], "label": str(i % 4),
        }  # fmt: skip

    def truthfulqa(i: int) -> dict[str, Any]:
        one = {"choices": words(3), "labels": [1, 0, 0]}
        return {"question": f"Is {i}?", "mc1_targets": one, "mc2_targets": one}

    def winogrande(i: int) -> dict[str, Any]:
        a, b = words(2)
        sentence = f"He saw {a} and {b} as _ was {i}."
        return {"sentence": sentence, "option1": a, "option2": b, "answer": str(1 + i % 2)}

    def piqa(i: int) -> dict[str, Any]:
        a, b = words(2)
        return {"goal": f"Get {i}.", "sol1": a, "sol2": b, "label": i % 2}

    makers: dict[str, Any] = {
        "arc_challenge": arc,
        "arc_easy": arc,
        "hellaswag": hellaswag,
        "truthfulqa": truthfulqa,
        "winogrande": winogrande,
        "gsm8k": lambda i: {"question": f"Add {i} to 1.", "answer": f"So.\n#### {i + 1}"},
        "piqa": piqa,
        "boolq": lambda i: {"question": f"is it {i}", "passage": words(4)[3], "label": i % 2},
        "lambada_openai": lambda i: {"text": f"He has {words(3)[2]} and {i} of {words(3)[2]}"},
    }
    for layout in LAYOUTS.values():
        for split in filter(None, (layout.scored, layout.shown)):
            file = folder / layout.folder / f"{split}.jsonl"
            scored = 1 if layout.folder == "gsm8k" else 4  # one, since generation is slow
            count = scored if split == layout.scored else 30
            if layout.folder == "mmlu":
                made = [
                    {"question": f"Is {i}?", "subject": s, "choices": words(4), "answer": i % 4}
                    for s in subjects
                    for i in range(min(count, 5))
                ]
            else:
                made = [makers[layout.folder](i) for i in range(count)]
            write(file, made)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)

"""Steering and hold-out items drawn from the same tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastmerge.errors import FastmergeError
from fastmerge.evaluation.leaderboard import LEADERBOARD_V1
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.settings import load_evaluate
from fastmerge.search.tables import leaderboard

TASK = """\
task: split_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/choice.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def place(shared_zoo: Any) -> Path:
    """A llama with a tokenizer of characters, a task of 24 documents and a text."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = shared_zoo.base("split", vocab=40, scale=0.3, dtype="F32")
    vocab = {t: i for i, t in enumerate(["<unk>", "</s>", *"0123456789+= "])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    rows = [{"question": f"{i}=", "choices": [str(i), "77"], "answer": i % 2} for i in range(24)]
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "split_choice.yaml").write_text(TASK.format(data=folder))
    (folder / "text.txt").write_text(" ".join(str(i) for i in range(100)))
    return folder


def scorer_of(place: Path, **evaluate: Any) -> Any:
    settings = load_evaluate({"max_length": 32, **evaluate})
    return make_scorer(settings, place, place)


@pytest.fixture(scope="module")
def model(place: Path) -> Any:
    import torch

    from fastmerge import llama

    torch.set_num_threads(1)
    return llama.load(place, dtype=torch.float32)


def documents(scorer: Any, split: str, limit: int | None = None) -> list[int]:
    (unit,) = scorer._units[split]
    return list(unit.documents["split_choice"])[:limit]


def test_a_split_scores_each_document_on_one_side(place: Path, model: Any) -> None:
    whole = scorer_of(place, tasks=["split_choice.yaml"])
    split = scorer_of(place, tasks=["split_choice.yaml"], split={"steer": 0.25, "seed": 3})
    every = whole.score(model, "steer").tasks["split_choice"].items["split_choice"]
    sides = {side: documents(split, side) for side in ("steer", "holdout")}
    assert sorted(sides["steer"] + sides["holdout"]) == list(range(24))
    assert len(sides["steer"]) == 6 and split.has("holdout") and not whole.has("holdout")
    for side, chosen in sides.items():
        task = split.score(model, side).tasks["split_choice"]
        assert task.items["split_choice"] == tuple(every[i] for i in sorted(chosen))
        assert task.count == len(chosen)
    # A limit takes the first that were drawn, and fewer are among more.
    few = split.score(model, "holdout", 4).tasks["split_choice"].items["split_choice"]
    assert few == tuple(every[i] for i in sorted(sides["holdout"][:4]))


def test_a_split_is_drawn_by_its_seed_within_the_range(place: Path) -> None:
    def drawn(**split: Any) -> list[int]:
        ranged = {"name": "split_choice.yaml", "items": "4:20"}
        return documents(scorer_of(place, tasks=[ranged], split=split), "steer")

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert set(drawn(steer=5)) < set(range(4, 20)) and len(drawn(steer=5)) == 5
    assert drawn(steer=5, holdout=3) == drawn(steer=5) == drawn(steer=7)[:5]


def test_the_key_follows_the_split_and_stays_without_one(place: Path) -> None:
    keys = {
        scorer_of(place, tasks=["split_choice.yaml"], split=split).key
        for split in ({"seed": 1}, {"seed": 2}, {"steer": 3, "seed": 1})
    }
    whole = scorer_of(place, tasks=["split_choice.yaml"])
    assert len(keys | {whole.key}) == 4
    from fastmerge.evaluation.journal import digest

    settings = load_evaluate({"max_length": 32, "tasks": ["split_choice.yaml"]})
    beside = {"every", "stages", "bootstrap", "registered", "data", "split"}
    values = settings.plain(without=beside)
    from importlib.metadata import version

    assert whole.key == digest([values, whole._texts, version("lm_eval")])


def test_windows_of_a_text_are_split(place: Path, model: Any) -> None:
    whole = scorer_of(place, perplexity="text.txt")
    split = scorer_of(place, perplexity="text.txt", split={"steer": 0.5})
    every = whole.score(model, "steer").tasks["text"].items["text"]
    both = [split.score(model, side).tasks["text"].items["text"] for side in ("steer", "holdout")]
    assert sorted([*both[0], *both[1]]) == sorted(every)
    assert split.readings("steer")[0].tokens < whole.readings("steer")[0].tokens
    assert split.key != whole.key


MISTAKES: Mapping[str, tuple[dict[str, Any], str]] = {
    "few": (
        {"tasks": ["split_choice.yaml"], "split": {"steer": 24}},
        "'split_choice' has 24 items, too",
    ),
    "both": (
        {"tasks": ["split_choice.yaml"], "holdout": ["other.yaml"], "split": {}},
        "remove it, or 'holdout'",
    ),
    "callable": ({"callable": "a:b", "split": {}}, "a callable that takes 'split' scores its own"),
    "shares": (
        {"tasks": ["split_choice.yaml"], "split": {"steer": 0.7, "holdout": 0.4}},
        "add up to 1.1",
    ),
    "part": (
        {"tasks": ["split_choice.yaml"], "split": {"steer": 2.5}},
        "a share below 1 or a whole",
    ),
    "none": (
        {"tasks": ["split_choice.yaml"], "split": {"steer": 0}},
        "'steer' must be greater than 0",
    ),
    "key": ({"tasks": ["split_choice.yaml"], "split": {"steering": 1}}, "unknown key 'steering'"),
    "text": ({"perplexity": "text.txt", "max_length": 400, "split": {}}, "'text' has 1 items, too"),
}


@pytest.mark.parametrize("evaluate, message", MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_split_is_one_line(place: Path, evaluate: dict[str, Any], message: str) -> None:
    with pytest.raises(FastmergeError, match=re.escape(message)) as caught:
        scorer_of(place, **evaluate)
    assert "\n" not in str(caught.value)


def test_the_leaderboard_row_of_a_split_is_of_its_hold_out() -> None:
    def scores(value: float) -> Scores:
        return Scores({title: TaskScore(value, "acc", 9) for title, _, _, _ in LEADERBOARD_V1})

    row = SimpleNamespace(name="final", steer=scores(70.0), holdout=scores(50.0))
    line: Any = SimpleNamespace(row=row, scores=row.holdout)
    settings = load_evaluate({"preset": "open_llm_leaderboard_v1", "split": {"steer": 0.5}})
    table = leaderboard([line], settings)
    assert "| final |" in table and "50.00 |" in table and "70.00" not in table
    assert "From part of the items: not to be compared" in table

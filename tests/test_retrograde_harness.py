"""lm-evaluation-harness in process, against its own command on the saved folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmerge.errors import FastmergeError
from fastmerge.evaluation import harness, leaderboard
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.settings import load_evaluate
from fastmerge.retrograde import run

LETTERS = "abcdefgh0123456789+=?: \n"

CHOICE = """\
task: fm_choice
dataset_path: json
dataset_kwargs: {{data_files: {{train: {data}/choice.jsonl, test: {data}/choice.jsonl}}}}
output_type: multiple_choice
training_split: train
fewshot_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
fewshot_delimiter: "\\n"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""

TEXT = """\
task: fm_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/text.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.set_num_threads(1)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def lab(zoo: Any, tmp_path: Path) -> Path:
    """Two llamas with a character tokenizer, and two local tasks."""
    base = zoo.base("m0", vocab=40, scale=0.3)
    zoo.tune(base, "m1", seed=1, size=0.1)
    for name in ("m0", "m1"):
        write_tokenizer(tmp_path / name)
    rows = []
    for i in range(24):
        a, b = i % 7, i % 5
        rows.append(
            {"question": f"{a}+{b}=", "choices": [str(a + b + k) for k in range(4)], "answer": 0}
        )
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [{"text": f"abc{i}+{i}={2 * i} def"} for i in range(6)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "fm_choice.yaml").write_text(CHOICE.format(data=tmp_path))
    (tmp_path / "tasks" / "fm_text.yaml").write_text(TEXT.format(data=tmp_path))
    return tmp_path


def write_tokenizer(folder: Path) -> None:
    """One id per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)


def schedule_of(lab: Path, **evaluate: Any) -> dict[str, Any]:
    return {
        "baseline": str(lab / "m0"),
        "pool": [str(lab / "m1")],
        "seed": 1,
        "schedule": {
            "cycles": 1,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.4},
            "retrace": {"toward": "baseline", "method": "linear", "t": 0.3},
        },
        "evaluate": {"max_length": 64, "batch_size": 8, "num_fewshot": 1, **evaluate},
    }


MISTAKES = {
    "shots": ({"num_fewshot": 25}, "num_fewshot 25 is more than the task's 24 examples allow"),
    "twice": (
        {"tasks": [{"name": "fm_choice", "items": "0:8"}, {"name": "fm_choice", "items": "8:"}]},
        "'fm_choice' is part of 'fm_choice\\[0:8\\]' already",
    ),
    "range": ({"tasks": [{"name": "fm_choice", "items": "500:"}]}, "no documents from 500 on"),
    "folder": ({"include_path": "nowhere"}, "no such folder: nowhere"),
    "no line": ({"tasks": ["fm_empty"]}, "task 'fm_empty' cannot be loaded"),
    "bad line": ({"tasks": ["fm_broken"]}, "task 'fm_broken' cannot be loaded"),
    "bad key": ({"tasks": ["fm_keyed"]}, "task 'fm_keyed' cannot be loaded .*foo"),
    "no text": ({"tasks": [], "perplexity": "short.txt"}, "short.txt: the text is too short"),
}


@pytest.mark.parametrize("change, message", MISTAKES.values(), ids=MISTAKES)
def test_what_cannot_be_evaluated_is_refused_before_anything(
    lab: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = (lab / "tasks" / "fm_choice.yaml").read_text()
    for name, data in (("empty", ""), ("broken", '{"question": \n')):
        (lab / f"{name}.jsonl").write_text(data)
        text = choice.replace("choice.jsonl", f"{name}.jsonl").replace("fm_choice", f"fm_{name}")
        (lab / "tasks" / f"fm_{name}.yaml").write_text(text)
    keyed = choice.replace("fm_choice", "fm_keyed") + "foo: 3\n"
    (lab / "tasks" / "fm_keyed.yaml").write_text(keyed)
    (lab / "short.txt").write_text("a")
    monkeypatch.chdir(lab)
    given = {"tasks": ["fm_choice"], "include_path": str(lab / "tasks"), **change}
    with pytest.raises(FastmergeError, match=message) as caught:
        run(schedule_of(lab, **given), lab / "out", threads=1)
    assert "\n" not in str(caught.value)
    assert not (lab / "out").exists()


def test_without_a_tokenizer_nothing_starts(lab: Path) -> None:
    for file in (lab / "m0").glob("*token*"):
        file.unlink()
    schedule = schedule_of(lab, tasks=["fm_choice"], include_path=str(lab / "tasks"))
    with pytest.raises(FastmergeError, match="m0: has no tokenizer, which text needs"):
        run(schedule, lab / "out", threads=1)
    assert not (lab / "out").exists()


def test_a_task_of_a_steering_group_is_no_hold_out(lab: Path) -> None:
    (lab / "tasks" / "fm_both.yaml").write_text(
        "group: fm_both\ntask: [fm_choice, fm_text]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean}]\n"
    )
    schedule = schedule_of(
        lab, tasks=["fm_both"], holdout=["fm_choice"], include_path=str(lab / "tasks")
    )
    with pytest.raises(FastmergeError, match=r"'fm_choice' is both a steering task \(of 'fm_both'"):
        run(schedule, lab / "out", threads=1)
    assert not (lab / "out").exists()


def test_scores_in_memory_equal_the_command_on_the_saved_folder(lab: Path) -> None:
    choice, text = str(lab / "tasks/fm_choice.yaml"), str(lab / "tasks/fm_text.yaml")
    schedule = schedule_of(lab, tasks=[choice, {"name": text, "metric": "byte_perplexity"}])
    result = run(schedule, lab / "out", threads=1)
    own = result.trajectory.scores[-1]
    first = result.trajectory.scores[0]
    assert own is not None and first is not None and own != first  # the weights did change
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf",
        "--model_args", f"pretrained={lab / 'out' / 'model'},dtype=float32,max_length=64",
        "--device", "cpu", "--batch_size", "8", "--num_fewshot", "1",
        "--include_path", str(lab / "tasks"), "--tasks", "fm_choice", "fm_text",
        "--output_path", str(lab / "harness"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (lab / "harness").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    assert own.tasks["fm_choice"].value == 100 * theirs["fm_choice"]["acc,none"]
    assert own.tasks["fm_text"].detail == {
        "byte_perplexity,none": theirs["fm_text"]["byte_perplexity,none"]
    }
    assert own.tasks["fm_choice"].count == 24
    items = own.tasks["fm_choice"].items
    assert items is not None
    assert sum(items["fm_choice"]) / 24 == pytest.approx(own.tasks["fm_choice"].value)
    # Perplexities steer by a bounded score: exp(log-likelihood per byte), item by item.
    texts = own.tasks["fm_text"].items
    assert texts is not None and all(0 < x <= 100 for x in texts["fm_text"])


def scorer_of(lab: Path, **evaluate: Any) -> Any:
    settings = load_evaluate(schedule_of(lab, **evaluate)["evaluate"])
    return make_scorer(settings, lab, lab / "m0")


def test_ranges_limits_and_the_hold_out_see_their_own_items(lab: Path) -> None:
    import torch

    from fastmerge import llama

    # Without shots: their draw depends on how many documents came before.
    name = "tasks/fm_choice.yaml"
    whole = scorer_of(lab, tasks=[name], num_fewshot=0)
    split = scorer_of(
        lab,
        tasks=[{"name": name, "items": "0:10"}],
        holdout=[{"name": name, "items": "10:"}],
        num_fewshot=0,
    )
    assert split.has("holdout") and not whole.has("holdout")
    model = llama.load(lab / "m0", dtype=torch.float32)
    full = whole.score(model, "steer").tasks["fm_choice"].items["fm_choice"]
    assert len(full) == 24
    assert split.score(model, "steer").tasks["fm_choice[0:10]"].items["fm_choice"] == full[:10]
    held = split.score(model, "holdout").tasks["fm_choice[10:]"]
    assert held.items["fm_choice"] == full[10:]
    few = whole.score(model, "steer", 4).tasks["fm_choice"]
    assert few.items["fm_choice"] == full[:4] and few.count == 4


def test_weights_changed_in_place_are_seen(lab: Path) -> None:
    import torch

    from fastmerge import llama

    scorer = scorer_of(lab, tasks=["tasks/fm_text.yaml"])
    model = llama.load(lab / "m0", dtype=torch.float32)
    before = scorer.score(model, "steer")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    assert scorer.score(model, "steer").value != before.value


def test_the_key_follows_settings_task_files_and_data(lab: Path) -> None:
    one = scorer_of(lab, tasks=["tasks/fm_choice.yaml"])
    assert one.key == scorer_of(lab, tasks=["tasks/fm_choice.yaml"]).key
    assert one.key != scorer_of(lab, tasks=["tasks/fm_choice.yaml"], batch_size=4).key
    data = lab / "choice.jsonl"
    data.write_text("\n".join(data.read_text().splitlines()[:-1]))
    assert one.key != scorer_of(lab, tasks=["tasks/fm_choice.yaml"]).key


MISTAKES = {
    "file": ({"tasks": ["tasks/nope.yaml"]}, "no such task file: tasks/nope.yaml"),
    "name": (
        {"tasks": ["fm_chioce"], "include_path": "tasks", "holdout": ["tasks/fm_text.yaml"]},
        "unknown task 'fm_chioce'; did you mean 'fm_choice'?",
    ),
    "metric": (
        {"tasks": [{"name": "tasks/fm_choice.yaml", "metric": "exact"}]},
        "task has no metric 'exact'",
    ),
}


@pytest.mark.parametrize("evaluate, message", MISTAKES.values(), ids=MISTAKES)
def test_a_wrong_task_is_one_line(
    lab: Path, evaluate: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The 13 000 built-in tasks take 13 s to list; a wrong name alone would ask for them.
    monkeypatch.setattr(harness, "BUILT_IN", False)
    with pytest.raises(FastmergeError, match=re.escape(message)) as caught:
        scorer_of(lab, **evaluate)
    assert "\n" not in str(caught.value)


def test_data_that_is_not_there_is_named(lab: Path) -> None:
    task = lab / "tasks" / "fm_choice.yaml"
    task.write_text(task.read_text().replace(f"{lab}/choice.jsonl", "data/choice.jsonl"))
    with pytest.raises(FastmergeError, match=r"data file 'data/choice\.jsonl' not found.*absolute"):
        scorer_of(lab, tasks=["tasks/fm_choice.yaml"])


def test_the_leaderboard_says_which_data_it_lacks() -> None:
    class Manager:
        def load(self, names: list[str]) -> dict[str, Any]:
            if names[0] in ("gsm8k", "mmlu_anatomy"):
                raise ConnectionError(f"Couldn't reach '{names[0]}' on the Hub")
            return {}

    with pytest.raises(FastmergeError, match=r"2 of 6 data sets .*: MMLU .*; GSM8K .*HF_HOME"):
        harness.check_leaderboard_data(Manager())


def test_the_leaderboard_table_holds_the_sources_row() -> None:
    tasks = {title: TaskScore(50.0, "acc", 1) for title, _, _, _ in leaderboard.LEADERBOARD_V1}
    table = leaderboard.leaderboard_table([("final", Scores(tasks))]).splitlines()
    assert table[0].startswith(
        "| model | ARC | HellaSwag | MMLU | TruthfulQA | Winogrande | GSM8K |"
    )
    assert "44.80 | 70.41 | 50.90 | 43.20 | 66.22 | 43.82 | 53.2" in table[2]
    assert table[3].endswith("| 50.00 |")
    shots = [shots for _, _, shots, _ in leaderboard.LEADERBOARD_V1]
    assert shots == [25, 10, 5, 0, 5, 5]


def test_perplexity_of_a_text_is_bounded_and_higher_is_better(lab: Path) -> None:
    import torch

    from fastmerge import llama

    (lab / "some.txt").write_text("abc0+0=0 def " * 20)
    settings = load_evaluate({"perplexity": "some.txt", "max_length": 32})
    scorer = make_scorer(settings, lab, lab / "m0")
    model = llama.load(lab / "m0", dtype=torch.float32)
    found = scorer.score(model, "steer").tasks["some"]
    assert 0 < found.value <= 100 and found.detail is not None
    ids = torch.tensor([llama.load_tokenizer(lab / "m0")("abc0+0=0 def " * 20)["input_ids"]])
    losses = []
    for window in torch.split(ids[0], 32):
        if len(window) > 1:
            with torch.no_grad():
                loss = model(input_ids=window[None], labels=window[None]).loss
            losses.append((float(loss), len(window) - 1))
    mean = sum(x * n for x, n in losses) / sum(n for _, n in losses)
    assert found.detail["perplexity"] == pytest.approx(2.718281828459045**mean, rel=1e-5)
    assert found.count == len(losses)

"""The leaderboard preset, whole, on stand-in data sets that the harness's own task files load."""

from __future__ import annotations

import io
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from fastmerge.errors import FastmergeError
from fastmerge.evaluation import harness, leaderboard
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.settings import load_evaluate

# As the leaderboard's page has it: title, task, shots, metric.
TASKS = [
    ("ARC", "arc_challenge", 25, "acc_norm,none"),
    ("HellaSwag", "hellaswag", 10, "acc_norm,none"),
    ("MMLU", "mmlu", 5, "acc,none"),
    ("TruthfulQA", "truthfulqa_mc2", 0, "acc,none"),
    ("Winogrande", "winogrande", 5, "acc,none"),
    ("GSM8K", "gsm8k", 5, "exact_match,strict-match"),
]
FOLDERS = ["arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k"]
SYMBOLS = ["<pad>", "<s>", "</s>", "<unk>", "####", *string.printable[:95], "\n"]
# What the llamas generate after ":", whatever stood before it: strict-match reads the 7,
# flexible-extract the 8.
CHAIN = [":", "####", " ", "7", "\n", "8", "</s>"]
SCHEDULE = """\
baseline: ./leader0
pool: [./leader1]
seed: 1
schedule:
  cycles: 1
  degrade: {partner: next, method: linear, t: 0.6}
  retrace: {toward: baseline, method: linear, t: 0.2}
evaluate: {preset: open_llm_leaderboard_v1, max_length: 2048, batch_size: 8, every: end}
"""


class Ran(NamedTuple):
    """One run of the preset: what it printed, wrote, and had from the harness."""

    folder: Path
    terminal: str
    called: Sequence[Mapping[str, Any]]  # what each of its calls of the harness returned

    @property
    def final(self) -> Mapping[str, Any]:
        """The harness's results on the final state, after the baseline's and the pool's."""
        return self.called[2]

    @property
    def scores(self) -> Mapping[str, Any]:
        """The final state's scores as the run wrote them, by title."""
        written = json.loads((self.folder / "out" / "trajectory.json").read_text())
        return written["comparison"][0]["steering"]["tasks"]


@pytest.fixture(scope="module")
def ran(shared_zoo: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The command, once: listing the harness's 13 000 tasks alone takes 13 s."""
    import datasets
    import lm_eval
    import torch

    from fastmerge.cli import main

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("leaderboard")
    write_data(folder)
    write_llamas(type(shared_zoo)(folder))
    (folder / "walk.yml").write_text(SCHEDULE)
    evaluate = lm_eval.evaluate
    called: list[Mapping[str, Any]] = []

    def listening(**options: Any) -> Any:
        called.append(evaluate(**options))
        return called[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # a folder called as a data set on the hub is that data set
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr(lm_eval, "evaluate", listening)
        with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
            main(["retrograde", "walk.yml", "out", "--threads", "1"])
        assert not ended.value.code
        yield Ran(folder, out.getvalue(), called)


def harness_folders() -> list[str]:
    """The harness's own task files of the six, without the other 13 000."""
    import lm_eval

    return [str(Path(lm_eval.__file__).parent / "tasks" / name) for name in FOLDERS]


def alone(model: Path, names: list[str], shots: int, **options: Any) -> Mapping[str, Any]:
    """The harness on a model folder, as its own command runs it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "float32", "max_length": 2048, **options},
        tasks=names,
        num_fewshot=shots,
        device="cpu",
        batch_size=8,
        task_manager=TaskManager(include_path=harness_folders(), include_defaults=False),
        bootstrap_iters=0,
    )["results"]


def test_each_task_has_its_shots_and_its_metric(ran: Ran) -> None:
    samples = ran.final["samples"]
    subjects = [name for name in samples if name.startswith("mmlu_")]
    assert len(subjects) == 57
    for title, name, shots, metric in TASKS:
        for part in subjects if name == "mmlu" else [name]:
            prompts = [prompt for item in samples[part] for prompt, _ in item["arguments"]]
            assert {prompt.count("stand-in") for prompt in prompts} == {shots + 1}
        assert ran.scores[title]["metric"] == metric
        if name != "mmlu":
            assert ran.scores[title]["value"] == 100 * ran.final["results"][name][metric]
    for title, name in (("ARC", "arc_challenge"), ("HellaSwag", "hellaswag")):
        assert ran.scores[title]["value"] == pytest.approx(100 * 4 / 6)
        assert ran.final["results"][name]["acc,none"] < 0.5  # the other metric is another number


def test_mmlu_is_the_plain_mean_of_its_subjects(ran: Ran) -> None:
    rows = [row for name, row in ran.final["results"].items() if name.startswith("mmlu_")]
    # 19 subjects of two documents, 38 of one; one of each subject's is right.
    assert sorted(row["acc,none"] for row in rows) == [0.5] * 19 + [1.0] * 38
    assert ran.scores["MMLU"]["items"] == 19 * 2 + 38
    assert ran.scores["MMLU"]["value"] == pytest.approx(100 * (19 * 0.5 + 38) / 57)  # not 57 / 76


def test_gsm8k_is_strict(ran: Ran) -> None:
    row = ran.final["results"]["gsm8k"]
    assert (row["exact_match,strict-match"], row["exact_match,flexible-extract"]) == (0.5, 0.25)
    assert ran.scores["GSM8K"]["value"] == 50 and ran.scores["GSM8K"]["items"] == 4


def test_the_scores_are_the_harness_s_own_on_the_written_folder(ran: Ran) -> None:
    model = ran.folder / "out" / "model"
    subjects = ["mmlu_anatomy", "mmlu_philosophy", "mmlu_virology"]
    theirs: dict[str, Any] = {}
    for shots in (25, 10, 5, 0):
        names = [name for _, name, own, _ in TASKS if own == shots and name != "mmlu"]
        names += subjects if shots == 5 else []
        theirs |= alone(model, names, shots, add_bos_token=False)
    for title, name, _, metric in TASKS:
        if name != "mmlu":
            # Other tasks in a batch, other padding: sums of probabilities move in the last digits.
            expected = pytest.approx(100 * theirs[name][metric], rel=1e-6)
            assert ran.scores[title]["value"] == expected, name
    for name in subjects:
        assert ran.final["results"][name]["acc,none"] == theirs[name]["acc,none"]
    # The tokenizer's own way is a BOS token, as llama's is, and that is another number.
    other = alone(model, ["truthfulqa_mc2"], 0)["truthfulqa_mc2"]["acc,none"]
    assert ran.scores["TruthfulQA"]["value"] != pytest.approx(100 * other, rel=1e-5)


def test_the_table_has_the_source_s_row_and_ours_with_the_average(ran: Ran) -> None:
    values = [ran.scores[title]["value"] for title, _, _, _ in TASKS]
    cells = " | ".join(f"{value:.2f}" for value in [*values, sum(values) / 6])
    for text in (ran.terminal, (ran.folder / "out" / "report.md").read_text()):
        lines = text.splitlines()
        start = lines.index(f"| model | {' | '.join(title for title, *_ in TASKS)} | average |")
        published = lines[start + 2].partition(" (published) | ")[2]
        assert published == "44.80 | 70.41 | 50.90 | 43.20 | 66.22 | 43.82 | 53.22 |"
        assert lines[start + 3] == f"| schedule | {cells} |"


# --- what may be wrong ---


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data sets, to be spoilt."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return tmp_path


def refusal(**evaluate: Any) -> str:
    """What the preset says before anything is measured."""
    preset = {"preset": "open_llm_leaderboard_v1", "include_path": harness_folders()}
    with pytest.raises(FastmergeError) as caught:
        make_scorer(load_evaluate({**preset, **evaluate}), Path(), Path())
    return str(caught.value)


def test_a_damaged_file_is_named_like_a_missing_set(data: Path) -> None:
    (data / "openai/gsm8k/main/test.jsonl").write_text("{damaged")
    assert "1 of 6 data sets cannot be loaded: GSM8K (" in refusal()


def test_a_missing_subject_is_the_preset_s_fault(data: Path) -> None:
    card = data / "cais/mmlu/README.md"
    card.write_text(
        card.read_text().replace("config_name: abstract_algebra", "config_name: astrology")
    )
    assert refusal().startswith("evaluate.preset: task 'mmlu' cannot be loaded (")


@pytest.mark.usefixtures("data")
def test_a_steering_task_is_no_hold_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first = leaderboard.LEADERBOARD_V1[:1]  # 57 subjects: slow
    monkeypatch.setattr(harness, "LEADERBOARD_V1", first)
    message = refusal(holdout=["arc_challenge"])
    assert message.startswith("evaluate.holdout[0]: 'arc_challenge' is both a steering task")


# --- llamas and data ---


def write_llamas(zoo: Any) -> None:
    """Two llamas that follow CHAIN, else answer B, and whose likelihoods see the whole prompt."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    base = zoo.base("leader0", layers=1, hidden=128, vocab=len(SYMBOLS), scale=0.1)
    tensors = dict(sorted(zoo.read(base).items()))
    tensors["model.embed_tokens.weight"] = 30 * np.eye(len(SYMBOLS), 128)
    head = tensors["lm_head.weight"]
    for symbol, following in pairwise(CHAIN):
        head[SYMBOLS.index(following), SYMBOLS.index(symbol)] += 1.5
    head[SYMBOLS.index("B"), SYMBOLS.index(" ")] += 0.6
    config = json.loads((base / "config.json").read_text())
    zoo.write("leader0", tensors, config)
    rng = np.random.default_rng(1)
    moved = {name: x + 0.05 * rng.normal(size=x.shape) for name, x in tensors.items()}
    zoo.write("leader1", moved, config)
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"####|[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    # As llama's tokenizer: a BOS token before every text, unless told otherwise.
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    for name in ("leader0", "leader1"):
        PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        ).save_pretrained(zoo.root / name)


def write_data(folder: Path) -> None:
    """The six data sets with the fields that the tasks read; each question says 'stand-in' once."""
    rng = np.random.default_rng(5)

    def words(count: int, length: int = 3) -> list[str]:
        return ["".join(rng.choice(list("aeiou"), length)) for _ in range(count)]

    def choices(best: int) -> list[str]:
        """The best by character is the worst as a whole: its length tells acc_norm from acc."""
        found = words(4)
        found[best] = "7" + words(1, 8)[0]
        return found

    def arc(i: int) -> dict[str, Any]:
        given = {"text": choices(i % 4), "label": list("ABCD")}
        key = "ABCDBC"[i % 6]  # of the six tested, the first four are the best
        return {"question": f"Which stand-in is {i}?", "choices": given, "answerKey": key}

    def hellaswag(i: int) -> dict[str, Any]:
        return {
            "activity_label": "Test", "ctx_a": f"A stand-in has {i}.", "ctx_b": "then it",
            "endings": choices(i % 4), "label": "012312"[i % 6],
        }  # fmt: skip

    def mmlu(i: int) -> dict[str, Any]:
        question = f"Which stand-in is {words(1)[0]}?"
        return {"question": question, "choices": words(4), "answer": 1 - i % 2}

    def truthfulqa(i: int) -> dict[str, Any]:
        targets = {"choices": words(3), "labels": [1, 0, 1]}
        return {
            "question": f"What is stand-in {i}?",
            "mc1_targets": targets,
            "mc2_targets": targets,
        }

    def winogrande(i: int) -> dict[str, Any]:
        one, two = words(2)
        sentence = f"The stand-in saw {one} and {two} as _ was {i}."
        return {"sentence": sentence, "option1": one, "option2": two, "answer": str(1 + i % 2)}

    def gsm8k(i: int) -> dict[str, Any]:
        # Of the four tested, flexible-extract gets the first right, strict-match the next two.
        answer = [8, 7, 7][i] if i < 3 else 90 + i
        return {"question": f"Add {i} to stand-in {i}.", "answer": f"It is this.\n#### {answer}"}

    def write(name: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        header = []
        for config, splits in configs.items():
            files = [{"split": split, "path": f"{config}/{split}.jsonl"} for split in splits]
            header.append({"config_name": config, "data_files": files})
            (folder / name / config).mkdir(parents=True)
            for split, (row, count) in splits.items():
                lines = "\n".join(json.dumps(row(i)) for i in range(count))
                (folder / name / config / f"{split}.jsonl").write_text(lines)
        (folder / name / "README.md").write_text(f"---\n{yaml.dump({'configs': header})}---\n")

    write("allenai/ai2_arc", {"ARC-Challenge": {"train": (arc, 30), "test": (arc, 6)}})
    write("Rowan/hellaswag", {"default": {"train": (hellaswag, 12), "validation": (hellaswag, 6)}})
    files = Path(harness_folders()[2]).glob("mmlu_*.yaml")
    subjects = sorted(file.stem.removeprefix("mmlu_") for file in files)
    tests = [{"dev": (mmlu, 5), "test": (mmlu, size)} for size in [2, 1, 1] * 19]
    write("cais/mmlu", dict(zip(subjects, tests, strict=True)))
    write("truthfulqa/truthful_qa", {"multiple_choice": {"validation": (truthfulqa, 4)}})
    write(
        "allenai/winogrande",
        {"winogrande_xl": {"train": (winogrande, 8), "validation": (winogrande, 8)}},
    )
    write("openai/gsm8k", {"main": {"train": (gsm8k, 8), "test": (gsm8k, 4)}})

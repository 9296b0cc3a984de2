"""Searches by gradient: a loss's slope by the coefficients, and where it leads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge import search
from fastmerge.errors import FastmergeError
from fastmerge.evaluation.journal import Journal
from fastmerge.evaluation.loss import gradients
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.search.runner import describe
from fastmerge.search.study import GRADIENT_COST

TASK = """\
task: gradient_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}/items.jsonl}}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""
REST = {
    "multiple_choice": ("acc", 'doc_to_target: answer\ndoc_to_choice: "{{choices}}"\n'),
    "generate_until": (
        "exact_match",
        (
            'doc_to_target: "{{choices[answer]}}"\n'
            'generation_kwargs: {until: [" "], max_gen_toks: 2, do_sample: false}\n'
        ),
    ),
}


@pytest.fixture(scope="module")
def place(shared_zoo: Any) -> Path:
    """A base and two fine-tunes with a tokenizer of characters, a text and tasks."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    base = shared_zoo.base("grad0", vocab=40, scale=0.2, dtype="F32")
    vocab = {t: i for i, t in enumerate(["<unk>", "</s>", *"0123456789+= "])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    for i in (1, 2):
        shared_zoo.tune(base, f"grad{i}", seed=i, dtype="F32", size=0.08)
    tokenizer.save_pretrained(base)
    rows = [
        {"question": f"{i}+{i}=", "choices": [str(2 * i), str(3 * i + 1)], "answer": i % 2}
        for i in range(1, 13)
    ]
    (base / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, (metric, rest) in REST.items():
        text = TASK.format(kind=kind, data=base, metric=metric) + rest
        (base / f"{kind}.yaml").write_text(text)
    (base / "text.txt").write_text(" ".join(f"{i}+{i}={2 * i}" for i in range(60)))
    return base


def file_of(place: Path, **keys: Any) -> dict[str, Any]:
    tuned = [str(place.parent / f"grad{i}") for i in (1, 2)]
    weight = {"low": 0, "high": 1, "start": 0.2, "layers": 2}
    found = {
        "space": {
            "merge_method": "task_arithmetic",
            "base_model": str(place),
            "models": [{"model": path, "parameters": {"weight": weight}} for path in tuned],
        },
        "optimiser": "gradient",
        "budget": {"items": 400},
        "evaluate": {
            "perplexity": str(place / "text.txt"), "max_length": 32, "split": {"seed": 1}
        },
    }  # fmt: skip
    return {**found, **keys}


def loss_at(study: search.Study, point: Any) -> float:
    lab: Any = study.lab
    model = lab.model(study.expression(point))
    return gradients(model, lab.scorer.targets(model, "steer"))[0]


METHODS: Mapping[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "linear": {"merge_method": "linear", "parameters": {"weight": 0.3}},
    "slerp": {"merge_method": "slerp", "parameters": {"t": "0.2..0.9"}},
}


@pytest.mark.parametrize("name", METHODS)
def test_the_slope_is_the_loss_s_derivative_by_every_number(
    place: Path, tmp_path: Path, name: str
) -> None:
    file = file_of(place)
    file["space"] |= METHODS[name]
    if name == "slerp":
        file["space"]["models"] = [{"model": str(place)}, {"model": str(place.parent / "grad1")}]
    study = search.open_study(file, tmp_path / "out", threads=1, scored=True)
    ranges = study.ranges
    here = ranges.units(ranges.start)
    slope = study._slope(ranges.start)
    step = 0.02
    for i in range(len(here)):
        ends = []
        for sign in (1, -1):
            moved = here.copy()
            moved[i] += sign * step
            ends.append(loss_at(study, ranges.at(moved)))
        assert slope[i] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02, abs=2e-4)
    assert np.abs(slope).max() > 1e-3


def test_a_search_by_gradient_improves_and_resumes(place: Path, tmp_path: Path) -> None:
    file = file_of(place)
    found = search.run(file, tmp_path / "out", threads=1)
    study = found.study
    assert found.best.value > study.start.value
    each = found.best.scores.tasks["text"].count
    slopes = Journal(tmp_path / "out" / "journal.jsonl").holds("slope:")
    assert slopes and (study.spent - each * len(study.trials)) % (GRADIENT_COST * each) == 0
    assert study.spent > each * len(study.trials)
    again = search.run(file, tmp_path / "out", threads=1, resume=True)
    assert [t.point for t in again.study.trials] == [t.point for t in study.trials]
    assert again.study.spent == study.spent
    assert "A gradient counts 3 times" in (tmp_path / "out" / "report.md").read_text()
    # A worker's slopes are these, too.
    search.run(file, tmp_path / "beside", threads=2, workers=2)
    for name in ("search.json", "journal.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()


def test_perplexity_is_shown_as_perplexity(place: Path, tmp_path: Path, capsys: Any) -> None:
    from fastmerge.cli import main

    file = file_of(place, optimiser="random", budget={"candidates": 4})
    (tmp_path / "space.yml").write_text(json.dumps(file))
    # What it takes is said before and while it runs.
    with pytest.raises(SystemExit):
        main(["search", str(tmp_path / "space.yml"), str(tmp_path / "dry"), "--dry-run"])
    words = " ".join(capsys.readouterr().out.split())
    assert re.search(r"items of a candidate \d+ ", words)
    assert re.search(r"time for all at most about [\d.]+ s", words)
    with pytest.raises(SystemExit):
        main(["search", str(tmp_path / "space.yml"), str(tmp_path / "out"), "--threads", "1"])
    written = json.loads((tmp_path / "out" / "search.json").read_text())
    best = written["candidates"][written["best"]]
    shown = f"{best['perplexity']:.2f}"
    assert (
        f"candidate {best['number']}: perplexity {shown}, the best so far"
        in capsys.readouterr().err
    )
    text = (tmp_path / "out" / "report.md").read_text()
    held = written["comparison"][0]["holdout"]["perplexity"]
    assert f"a perplexity of {held:.2f}" in text and f"| {held:.2f} |" in text
    assert "p (Holm) | perplexity |" in text
    assert (
        "| candidate | perplexity | where |" in text and f"| {best['number']} | {shown} |" in text
    )
    assert best["score"] == pytest.approx(100 / best["perplexity"], rel=0.05)  # steers as before


def test_windows_as_long_as_the_model_reads_are_foreseen(place: Path, tmp_path: Path) -> None:
    scores = {"perplexity": str(place / "text.txt"), "split": {"seed": 1}}
    file = file_of(place, optimiser="random", budget={"items": 400}, evaluate=scores)
    foreseen = describe(file)
    found = search.run({**file, "budget": {"candidates": 1}}, tmp_path / "out", threads=1)
    measured = found.best.scores.tasks["text"].count
    assert foreseen["items of a candidate"] == measured > 1
    assert foreseen["candidates on all items, about"] == 400 // measured
    assert foreseen["tasks"][0]["tokens"] <= 64 * measured
    with pytest.raises(FastmergeError, match=rf"one candidate takes {measured} items, more than"):
        describe({**file, "budget": {"items": 1}})
    too_few = {**scores, "split": {"steer": 500}}
    with pytest.raises(FastmergeError, match="too few for 500 that steer"):
        search.run({**file, "evaluate": too_few}, tmp_path / "few", threads=1)
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize("kind", REST)
def test_the_targets_of_a_task_are_its_right_answers(place: Path, kind: str) -> None:
    from fastmerge import llama
    from fastmerge.evaluation.settings import load_evaluate

    settings = load_evaluate({"tasks": [f"{kind}.yaml"], "max_length": 32, "split": {"steer": 5}})
    scorer: Any = make_scorer(settings, place, place)
    model = llama.load(place, dtype="float32")
    tokenizer = llama.load_tokenizer(place)
    (unit,) = scorer._units["steer"]
    rows = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
    chosen = sorted(unit.documents[f"gradient_{kind}"])
    wanted = [(rows[i]["question"], rows[i]["choices"][rows[i]["answer"]]) for i in chosen]
    targets = scorer.targets(model, "steer")
    shown = [
        tuple("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (t.given, t.asked))
        for t in targets
    ]
    assert shown == wanted
    assert sum(target.share for target in targets) == pytest.approx(1)
    assert len(scorer.targets(model, "steer", 2)) == 2


def test_a_callable_has_no_gradient(place: Path, tmp_path: Path) -> None:
    file = file_of(place, evaluate={"callable": "stand:in"})
    with pytest.raises(FastmergeError, match=r"gradient: needs tasks or a perplexity"):
        search.run(file, tmp_path / "out", score=lambda model: 1.0, threads=1)
    assert not (tmp_path / "out").exists()


def test_a_loss_leaves_the_model_as_it_was(place: Path) -> None:
    from fastmerge import llama

    model = llama.load(place, dtype="float32").requires_grad_(False)
    settings: Any = file_of(place)["evaluate"]
    from fastmerge.evaluation.settings import load_evaluate

    scorer: Any = make_scorer(load_evaluate(settings), place, place)
    loss, grads = gradients(model, scorer.targets(model, "steer"))
    assert loss > 0 and set(grads) == {name for name, _ in model.named_parameters()}
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    perplexity = scorer.score(model, "steer").tasks["text"].detail["perplexity"]
    # Windows have one weight each here, and their tokens there: of equal lengths, but for the last.
    assert loss == pytest.approx(float(np.log(perplexity)), rel=0.02)


def test_no_gradient_beyond_the_budget(place: Path, tmp_path: Path) -> None:
    file = file_of(place)
    each = search.describe(file)["items of a candidate"]
    file["budget"] = {"items": 2 + each * (1 + GRADIENT_COST + 1)}  # no second gradient
    out = tmp_path / "out"
    found = search.run(file, out, threads=1)
    assert found.study.spent == each * (1 + GRADIENT_COST + 1)
    assert len(found.study.trials) == 2
    file["budget"] = {"items": each * 2}
    with pytest.raises(FastmergeError, match="buy less than the folder holds already"):
        search.run(file, out, threads=1, resume=True)

"""Log-likelihoods with every token read once, against one plain pass over each sequence."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmerge.errors import FastmergeError
from fastmerge.evaluation import likelihoods
from fastmerge.evaluation.likelihoods import Request, reads, steps
from fastmerge.evaluation.settings import load_evaluate

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256,
}  # fmt: skip
MOST = 150  # tokens of a sequence


def model_of(kind: str, **config: Any) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **config)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


def plain(model: Any, request: Request) -> tuple[float, bool]:
    import torch

    given, asked = request
    ids = [*given, *asked][-(MOST + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, -len(asked) :].log_softmax(-1)
    tokens = torch.tensor(list(asked))
    value = float(logits.gather(-1, tokens[:, None]).sum())
    return value, bool((logits.argmax(-1) == tokens).all())


def drawn(seed: int) -> list[Request]:
    """Items with four endings each behind what all share; some lie within others, some are cut."""
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(50) for _ in range(count)]

    shared = tokens(rng.choice([0, 3, 40, 90]))
    requests: list[Request] = [([*shared, 1], [2]), ([*shared, 1, 2], [3])]
    for _ in range(rng.choice([1, 5, 12])):
        question = shared + tokens(rng.choice([1, 5, 50, 120]))
        requests += [(question, tokens(rng.choice([1, 1, 3, 9]))) for _ in range(4)]
    requests.append(requests[-1])
    rng.shuffle(requests)
    return requests


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "eager"])
def test_every_answer_is_that_of_a_plain_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = (
        model_of("llama", attn_implementation="eager")
        if kind == "eager"
        else model_of(kind, **({"sliding_window": None} if kind == "mistral" else {}))
    )
    assert reads(model)
    for seed in range(6):
        requests = drawn(seed)
        wanted = [plain(model, request) for request in requests]
        for pack, chain in ((33, 40), (100, 1024), (400, 40)):
            monkeypatch.setattr(likelihoods, "_CHAIN", chain)
            found = likelihoods.likelihoods(model, requests, MOST, pack=pack)
            np.testing.assert_allclose(
                [value for value, _ in found], [value for value, _ in wanted], atol=1e-3
            )
            assert [best for _, best in found] == [best for _, best in wanted]


def test_what_requests_share_is_read_once() -> None:
    shared = list(range(100))
    items: list[Request] = [
        (shared + [i, i + 1] + [7] * 20, [ending] * 3) for i in range(10) for ending in range(4)
    ]
    passes = list(steps(items, 1000, 64))
    # The examples; of each item the question, and of its endings all but the last token.
    assert sum(len(step.tokens) for step in passes) == 100 + 10 * (22 + 4 * 2)
    assert passes[0].tokens == shared and passes[0].past == 0
    assert {step.past for step in passes[1:]} == {100}
    assert all(len(step.tokens) <= 64 for step in passes[1:])
    assert sum(len(step.targets) for step in passes) == 40 * 3


def test_endings_of_one_token_share_one_place() -> None:
    (step,) = steps([([1, 2, 3], [4]), ([1, 2, 3], [5])], 100, 64)
    assert step.tokens == [1, 2, 3]
    assert sorted(step.targets) == [(2, 4, 0), (2, 5, 1)]


@pytest.mark.parametrize(
    "kind, config",
    [
        ("mistral", {"sliding_window": 8}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("gpt_neox", {}),
    ],
)
def test_a_model_that_a_shared_reading_would_change_is_read_plainly(
    kind: str, config: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(kind, **SIZES, **config)
    assert not reads(AutoModelForCausalLM.from_config(made))


def test_a_text_that_the_model_cannot_hold_is_one_line() -> None:
    model = model_of("llama")
    with pytest.raises(FastmergeError, match=r"9 tokens after 1 .* reads 8: raise"):
        likelihoods.likelihoods(model, [([1], [2] * 9)], 8)


def test_an_evaluation_has_the_threads_that_were_asked_for(zoo: Any) -> None:
    import torch

    from fastmerge.evaluation.loaded import Loaded
    from fastmerge.planning.planner import make_plan

    folder = zoo.base("llama", vocab=104)
    plan = make_plan(
        {
            "models": [{"model": str(folder)}],
            "merge_method": "linear",
            "parameters": {"weight": 1.0},
        }
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        Loaded(load_evaluate({"tasks": ["piqa"]}), 2).load(plan)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("given, kept", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_without_work_sleep_unless_the_user_says_otherwise(
    given: str | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastmerge.evaluation.scorers import make_scorer

    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    with pytest.raises(FastmergeError, match="unknown device"):
        make_scorer(load_evaluate({"tasks": ["piqa"], "device": "abacus"}), Path(), Path())
    assert os.environ["OMP_WAIT_POLICY"] == kept

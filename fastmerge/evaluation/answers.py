"""The right answer of one of the harness's requests, as tokens."""

from __future__ import annotations

from typing import Any

from fastmerge.errors import UnsupportedError
from fastmerge.evaluation.likelihoods import Tokens


def right_answer(lm: Any, task: Any, request: Any) -> tuple[Tokens, Tokens] | None:
    """What is given and what should follow, for the request that has the right answer of its
    document; None for the others. ``lm``: the harness's wrapper. Raises FastmergeError for tasks
    that do not say what is right.
    """
    kind = task.OUTPUT_TYPE
    if kind == "loglikelihood_rolling":
        tokens = lm.tok_encode(request.args[0])
        return ([lm.prefix_token_id], tokens) if tokens else None
    context, ending = request.args[0], request.args[1]
    if kind == "multiple_choice" and request.idx != _gold(task, request.doc):
        return None
    if kind == "generate_until":
        target = task.doc_to_target(request.doc)
        target = target[0] if isinstance(target, list) and target else target
        if not isinstance(target, str):
            raise UnsupportedError(f"task '{task.config.task}': has no text as its target")
        ending = f"{task.config.target_delimiter}{target}"
    if context:
        given, asked = lm._encode_pair(context, ending)  # noqa: SLF001
    else:
        given, asked = [lm.prefix_token_id], lm.tok_encode(ending)
    return (given or [lm.prefix_token_id], asked) if asked else None


def _gold(task: Any, document: Any) -> int:
    """The number of the right choice, as the harness's process_results has it."""
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    gold = gold[0] if isinstance(gold, list) and gold else gold
    if isinstance(gold, str):
        choices = task.doc_to_choice(document)
        gold = choices.index(gold) if gold in choices else -1
    return int(gold)

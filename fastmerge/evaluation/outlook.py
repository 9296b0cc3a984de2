"""How much a measurement reads and how long that takes, told before any model is loaded."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from fastmerge.evaluation.settings import Evaluate

# Documents and parts of a group whose requests stand for those of a task.
_DOCUMENTS, _PARTS = 4, 3
_GENERATED = 256  # tokens, the harness's own most where a task says nothing
# Of the rate of a matrix product that a forward reaches: 0.79 to 0.86 with 135 M parameters on one
# core, in float32.
_SHARE = 0.8
_SIZE, _SECONDS = 1024, 0.3  # of the matrix product that is timed


@dataclass(frozen=True)
class Reading:
    """What one measurement reads of one task; ``tokens``: about, from a few of its items."""

    task: str
    items: int
    tokens: int


@dataclass(frozen=True)
class Unread:
    """What a dry run knows of a scorer whose making would run what a schedule brings along: a
    callable's module, task files. Not what it reads.
    """

    holdout: bool  # whether there are items that no step looks at

    def has(self, split: str) -> bool:
        """See `Scorer`."""
        return split == "steer" or self.holdout


def tokens_each(tasks: Sequence[Any], tokenizer: Any) -> float:
    """About how many tokens a document of the harness's ``tasks`` takes, contexts once and endings
    each; of generations as many as they may be.
    """
    counts = []
    for task in tasks[:: max(1, len(tasks) // _PARTS)][:_PARTS]:
        last = len(task.eval_docs)
        chosen = list(range(0, last, max(1, last // _DOCUMENTS)))[:_DOCUMENTS]
        task.build_all_requests(samples=chosen)
        for _, requests in groupby(task.instances, key=lambda request: request.doc_id):
            texts, generated = set(), 0
            for request in requests:
                context, *rest = request.args
                texts.add(context)
                if rest and isinstance(rest[0], str):
                    texts.add(rest[0])
                elif rest:
                    generated += int(rest[0].get("max_gen_toks", _GENERATED))
            counts.append(generated + sum(len(tokenizer(text)["input_ids"]) for text in texts))
    return sum(counts) / len(counts)


def slow_products(settings: Evaluate) -> tuple[str, ...]:
    """What to say where the CPU has no instructions for the type that is asked for: torch then
    multiplies one number at a time, on one core. 512 x 576 x 576 took 252 ms in bfloat16, 136 in
    float16 and 16 in float32 on two cores with AVX2.
    """
    if settings.dtype == "float32" or settings.device != "cpu":
        return ()
    import torch

    found = torch.backends.cpu.get_cpu_capability()
    if found not in ("AVX2", "DEFAULT") or platform.machine() not in ("x86_64", "AMD64"):
        return ()
    slow = f"this CPU has no fast products of {settings.dtype} (torch finds {found})"
    return (f"{settings.at('dtype')}: {slow}: 'dtype: float32' takes a tenth of the time",)


def seconds_for(tokens: int, parameters: int, settings: Evaluate) -> float:
    """About how long the machine, as busy as it is now, takes to read ``tokens`` with a model of
    ``parameters``: two operations for each, at the rate of a matrix product that is timed.
    """
    import torch

    dtype = getattr(torch, settings.dtype)
    a, b = (torch.ones(_SIZE, _SIZE, device=settings.device, dtype=dtype) for _ in range(2))
    (a @ b).sum().item()
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < _SECONDS:
        (a @ b).sum().item()
        done += 1
    rate = done * 2 * _SIZE**3 / (time.perf_counter() - begun)
    return 2.0 * parameters * tokens / (_SHARE * rate)

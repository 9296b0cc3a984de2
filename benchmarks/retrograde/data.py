"""Synthetic skills, their character tokenizer, and splits that share no prompt.

A line is ``prompt=answer\\n``; every line of one skill has the same length, so a batch of one
skill needs no padding. Whether a line is trained on or scored follows from a hash of its prompt
alone, so no prompt can be in two splits, for any seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
CHARACTERS = "0123456789abcdefghmnrsx+=:?D([{</)]}>\\"
VOCABULARY = {"<pad>": PAD_ID, "\n": EOS_ID, "<unk>": UNK_ID} | {
    character: index for index, character in enumerate(CHARACTERS, start=3)
}
SPLITS = ("test", "val", "search")  # the last digit of a prompt's hash: 0, 1, 2; 3 to 9 train
LETTERS = np.array(list("abcdefgh"))
CLOSING = dict(zip("([{</", ")]}>\\", strict=True))

Rng = np.random.Generator


def _digits(number: int, width: int) -> str:
    """Least significant digit first: the order in which carries are known."""
    return str(number).zfill(width)[::-1]


def _add(rng: Rng) -> tuple[str, str]:
    a, b = rng.integers(0, 100, 2)
    return f"{a:02d}+{b:02d}", _digits(a + b, 3)


def _sub(rng: Rng) -> tuple[str, str]:
    a, b = rng.integers(100, 1000), rng.integers(0, 100)
    return f"{a}D{b:02d}", _digits(a - b, 3)


def _reverse(length: int) -> Callable[[Rng], tuple[str, str]]:
    def draw(rng: Rng) -> tuple[str, str]:
        word = "".join(rng.choice(LETTERS, length))
        return f"r:{word}", word[::-1]

    return draw


def _sort(length: int) -> Callable[[Rng], tuple[str, str]]:
    def draw(rng: Rng) -> tuple[str, str]:
        word = "".join(rng.choice(LETTERS, length))
        return f"s:{word}", "".join(sorted(word))

    return draw


def _count(length: int) -> Callable[[Rng], tuple[str, str]]:
    def draw(rng: Rng) -> tuple[str, str]:
        word, letter = "".join(rng.choice(LETTERS[:3], length)), str(rng.choice(LETTERS[:3]))
        return f"n:{word}?{letter}", str(word.count(letter))

    return draw


def _max(rng: Rng) -> tuple[str, str]:
    word = "".join(map(str, rng.integers(0, 10, 5)))
    return f"m:{word}", max(word)


def _shift(rng: Rng) -> tuple[str, str]:
    places, letters = rng.integers(1, 4), rng.integers(0, 8, 4)
    return f"c{places}:{''.join(LETTERS[letters])}", "".join(LETTERS[(letters + places) % 8])


def _brackets(rng: Rng) -> tuple[str, str]:
    word = "".join(rng.choice(list(CLOSING), 6))
    return f"x:{word}", "".join(CLOSING[character] for character in reversed(word))


SKILLS: dict[str, Callable[[Rng], tuple[str, str]]] = {
    "add": _add,
    "rev": _reverse(5),
    "srt": _sort(5),
    "max": _max,
    "shf": _shift,
    "cnt": _count(7),
    "brk": _brackets,
    "srt7": _sort(7),
    "rev7": _reverse(7),
    "cnt9": _count(9),
    "sub": _sub,
}
OLD_SKILLS = ("add", "rev", "srt", "max", "shf", "cnt", "brk")
NEW_SKILLS = ("srt7", "rev7", "cnt9", "sub")


def split_of(prompt: str) -> str:
    """Return the one split a prompt belongs to: "test", "val", "search" or "train"."""
    digit = zlib.crc32(prompt.encode()) % 10
    return SPLITS[digit] if digit < len(SPLITS) else "train"


def encode(text: str) -> list[int]:
    return [VOCABULARY[character] for character in text]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the same vocabulary as a Hugging Face tokenizer: one id per character, no BOS."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    # [\s\S] because "." stops at the newline; Fuse because the default decoder inserts spaces.
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="\n",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Lines:
    """Lines of one skill: ids (count, length) int64; the last ``answer`` ids are scored."""

    ids: np.ndarray
    answer: int  # ids of the answer, its "\n" included
    prompts: tuple[str, ...]


def draw(skill: str, split: str, count: int, seed: int, *, distinct: bool) -> Lines:
    """Draw ``count`` lines of a skill from one split, without repeated prompts if ``distinct``."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{skill}/{split}".encode())])
    lines: list[tuple[str, str]] = []
    seen: set[str] = set()
    for _ in range(400 * count):
        prompt, answer = SKILLS[skill](rng)
        if split_of(prompt) != split or (distinct and prompt in seen):
            continue
        seen.add(prompt)
        lines.append((prompt, answer))
        if len(lines) == count:
            break
    else:
        raise ValueError(
            f"skill {skill!r} has too few prompts in split {split!r} for {count} lines"
        )
    ids = np.array([encode(f"{prompt}={answer}\n") for prompt, answer in lines])
    return Lines(ids, len(lines[0][1]) + 1, tuple(prompt for prompt, _ in lines))

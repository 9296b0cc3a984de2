"""Small llamas with real tokenizers, made by the tokenizers library, for test_tokenizer*.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmerge
from fastmerge import api

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TEXTS = (
    "the quick brown fox jumps over the lazy dog while the other foxes watch and wonder",
    "merging models is a way to get more out of what others have trained before",
    "schnelle braune Füchse springen über faule Hunde und wundern sich über Modelle",
    "tokens and embeddings, rows and columns: 12345 numbers, 67 of them prime!",
)


def bpe(corpus: Sequence[str], size: int, added: Sequence[Any] = ()):
    """A byte-level BPE tokenizer, as GPT-2's and llama 3's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus, trainer)
    made.add_tokens(list(added))
    return made


def unigram(corpus: Sequence[str], size: int, added: Sequence[Any] = ()):
    """A unigram tokenizer, as T5's and many of sentencepiece's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    made.train_from_iterator(corpus, trainer)
    made.add_tokens(list(added))
    return made


def words(names: Sequence[str], added: Sequence[Any] = ()):
    """A word-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *names])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.Fuse()
    made.add_tokens(list(added))
    return made


def permuted(tokenizer, seed: int):
    """The same tokenizer with its tokens under other ids."""
    from tokenizers import Tokenizer

    document = json.loads(tokenizer.to_str())
    model, order = document["model"], np.random.default_rng(seed)
    if isinstance(model["vocab"], list):
        shuffled = order.permutation(len(model["vocab"]))
        model["vocab"] = [model["vocab"][i] for i in shuffled]
        model["unk_id"] = next(i for i, (t, _) in enumerate(model["vocab"]) if t == "<unk>")
        ids = {token: i for i, (token, _) in enumerate(model["vocab"])}
    else:
        ids = dict(
            zip(model["vocab"], order.permutation(len(model["vocab"])).tolist(), strict=True)
        )
        model["vocab"] = ids
    for entry in document["added_tokens"]:
        entry["id"] = ids.get(entry["content"], entry["id"])
    document["added_tokens"].sort(key=lambda entry: entry["id"])
    return Tokenizer.from_str(json.dumps(document))


class Maker:
    """Models of one base and their tokenizers."""

    def __init__(self, zoo) -> None:
        self._zoo = zoo

    def model(
        self,
        name: str,
        tokenizer,
        *,
        seed: int,
        rows: int | None = None,
        dtype: str = "F32",
        config: dict[str, Any] | None = None,
        template: str | None = None,
        **options: Any,
    ) -> Path:
        """A llama whose weights follow from ``seed``, with a row for each token or ``rows``."""
        count = tokenizer.get_vocab_size() if rows is None else rows
        folder = self._zoo.base(name, seed=seed, dtype=dtype, vocab=count, **options)
        kept = json.loads((folder / "config.json").read_text())
        kept |= {"torch_dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype]}
        kept |= {"bos_token_id": tokenizer.token_to_id("<s>")}
        kept |= {"eos_token_id": tokenizer.token_to_id("</s>"), **(config or {})}
        (folder / "config.json").write_text(json.dumps(kept))
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
        own |= {"eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
        if template is not None:
            own["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(own))
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder


def vocabulary(folder: Path) -> dict[str, int]:
    """Token to id, as the tokenizers library has it."""
    from tokenizers import Tokenizer

    found: dict[str, int] = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    return found


def trio_of(maker: Maker, prefix: str) -> dict[str, Path]:
    """A base, a model with two tokens more and its tokens in another order, and one of another
    corpus with one of these tokens too."""
    from tokenizers import AddedToken

    chat = [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    base = bpe(TEXTS[:2], 300)
    return {
        "base": maker.model(f"{prefix}-base", base, seed=1),
        "chat": maker.model(f"{prefix}-chat", permuted(bpe(TEXTS[:2], 300, chat), 3), seed=2),
        "other": maker.model(f"{prefix}-other", bpe(TEXTS[2:], 320, [chat[1]]), seed=3),
    }


def recipe(models, *, method="linear", base="base", weights=(0.5, 0.3, 0.2), **more):
    entries = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(models.values(), weights, strict=False)
    ]
    found = {"merge_method": method, "models": entries, "dtype": "float32", **more}
    if base is not None:
        found["base_model"] = str(models[base])
    return found


def refused(given) -> str:
    with pytest.raises(fastmerge.FastmergeError) as caught:
        api.plan(given)
    text = str(caught.value)
    assert "\n" not in text
    return text

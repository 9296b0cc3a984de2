"""A model's vocabulary, from its tokenizer's files: which token has which id.

tokenizer.json says it for every fast tokenizer, and is read as what it is, JSON; what
tokenizer_config.json adds to it counts as it does in transformers. Where there is no tokenizer.json
transformers makes one of the older files, if it is installed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastmerge.errors import ModelError, ResourceError, UnsupportedError, brief, first_line
from fastmerge.extras import install
from fastmerge.limits import MAX_CONFIG_BYTES, MAX_FILE_BYTES, MAX_TOKENIZER_BYTES, MAX_TOKENS
from fastmerge.models.header import as_object, open_regular, read_object
from fastmerge.models.links import Home
from fastmerge.models.side_files import is_tokenizer
from fastmerge.once import cached_property

Files = Mapping[str, "bytes | Path"]

TOKENIZER, CONFIG, SPECIALS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
# Older files that say again what tokenizer.json says, for programs that read no such file.
_OLDER = (
    "tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model",
    "sentencepiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json",
    "vocab.bpe", "encoder.json", "tekken.json",
)  # fmt: skip
# Where tokenizer_config.json names tokens by what they are for.
_ROLES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
_NUMBER = re.compile(r"[0-9]{1,9}")  # int takes 4300 digits
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Texts and mappings in them that name no file, beside tokens; auto_map, for which transformers
# refuses a tokenizer of the model's own code.
HARMLESS = frozenset({
    "tokenizer_class", "model_type", "auto_map", "added_tokens_decoder", "extra_special_tokens",
    "additional_special_tokens", "src_lang", "tgt_lang", "language", "task", "errors",
    "padding_side", "truncation_side",
})  # fmt: skip
_MAX_SCORE = 1e300  # of a piece, a logarithm; an int beyond any float is none
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """One tokenizer: its tokens by id, and the files that it is kept in.

    label: whose it is, for messages. ids: by token, those of `added` among them. added: what
    tokenizer.json keeps of a token that is split off before the model sees the text. document,
    config: tokenizer.json and tokenizer_config.json.
    """

    label: str
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    document: Mapping[str, Any]
    config: Mapping[str, Any]
    files: Files
    changed: bool = False  # the files say something else

    @cached_property
    def tokens(self) -> dict[int, str]:
        """By id; of several with one id the first."""
        found: dict[int, str] = {}
        for token, number in self.ids.items():
            found.setdefault(number, token)
        return found

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.ids.values(), default=-1) + 1

    def without(self, tokens: set[str]) -> Vocabulary:
        """The same less some tokens."""
        if not tokens:
            return self
        ids = {token: number for token, number in self.ids.items() if token not in tokens}
        added = {token: info for token, info in self.added.items() if token not in tokens}
        return replace(self, ids=ids, added=added, changed=True)

    def with_tokens(self, others: Iterable[tuple[Vocabulary, str]]) -> Vocabulary:
        """The same and, behind them, tokens of other vocabularies as these have them."""
        ids, added = dict(self.ids), dict(self.added)
        document, size = self.document, self.size
        donors: dict[int, tuple[Vocabulary, bool]] = {}  # and whether they are alike
        for other, token in others:
            if token in ids:
                continue
            if id(other) not in donors:
                donors[id(other)] = other, _alike(self, other)
            ids[token] = size
            size += 1
            if token in other.added or not donors[id(other)][1]:
                info = other.added.get(token, {**_PLAIN, "special": False})
                added[token] = {**info, "content": token}
        if len(ids) == len(self.ids):
            return self
        for other, alike in donors.values():
            if alike:
                document = _with_model(document, self.label, other, ids)
        return replace(self, ids=ids, added=added, document=document, changed=True)

    def written(self) -> dict[str, bytes | Path]:
        """Its files: as they were, where it has not changed."""
        files = dict(self.files)
        if not self.changed:
            return files
        for name in _OLDER:
            files.pop(name, None)
        files[TOKENIZER] = _dumped(_document(self), self.label)
        files[CONFIG] = _dumped(_config(self), self.label)
        if SPECIALS in files:
            kept = {
                role: value
                for role, value in _object(files[SPECIALS], SPECIALS, self.label).items()
                if isinstance(value, list) or text_of(value) in self.ids
            }
            files[SPECIALS] = _dumped(kept, self.label)
        return files


def template_of(files: Files, label: str) -> str | None:
    """A model's chat template: the one that transformers takes where there are several."""
    if TEMPLATE in files:
        return _bytes(files[TEMPLATE]).decode(errors="replace")
    if CONFIG not in files:
        return None
    found = _object(files[CONFIG], CONFIG, label).get("chat_template")
    if isinstance(found, list):  # by name
        named = [item for item in found if isinstance(item, dict) and item.get("name") == "default"]
        found = named[-1].get("template") if named else None
    return found if isinstance(found, str) else None


def with_template(files: Files, template: str, label: str) -> dict[str, bytes | Path]:
    """A tokenizer's files with another chat template, where new and old readers look for it."""
    found = {name: file for name, file in files.items() if name != "chat_template.json"}
    config = _object(files[CONFIG], CONFIG, label) if CONFIG in files else {}
    found[CONFIG] = _dumped({**config, "chat_template": template}, label)
    found[TEMPLATE] = template.encode()
    return found


def read_generation(files: Files, label: str) -> Mapping[str, Any]:
    """generation_config.json, {} where there is none."""
    return _object(files[GENERATION], GENERATION, label) if GENERATION in files else {}


def with_ids(file: bytes | Path, ids: Mapping[str, Any]) -> bytes:
    """A JSON file with other values under the keys that it has of ``ids``."""
    config = _object(file, GENERATION, "")
    return _dumped({key: ids.get(key, value) for key, value in config.items()}, GENERATION)


def is_same(one: Files, other: Files) -> bool:
    """Whether both have a tokenizer.json of the same bytes: quicker to see than to read either."""
    a, b = one[TOKENIZER], other[TOKENIZER]
    if isinstance(a, Path) and isinstance(b, Path) and a.stat().st_size != b.stat().st_size:
        return False
    return _bytes(a) == _bytes(b)


def identity(files: Files) -> str:
    """Hex digits that are equal where the files that say which token has which id are; '' where
    there are none.
    """
    names = [
        n for n in files if n in _OLDER or n in (TOKENIZER, SPECIALS) or n.endswith("tiktoken")
    ]
    if not names:
        return ""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0".encode() + hashlib.sha256(_bytes(files[name])).digest())
    if CONFIG in files:
        try:
            config = json.loads(_bytes(files[CONFIG]))
            kept = [config.get(key) for key in (*_ROLES, *_LISTS, "added_tokens_decoder")]
            digest.update(json.dumps(kept, sort_keys=True).encode())
        except (ValueError, AttributeError, RecursionError):
            digest.update(_bytes(files[CONFIG]))
    return digest.hexdigest()


def read_vocabulary(label: str, side_files: Files, folder: Path | None) -> Vocabulary | None:
    """The vocabulary of a model with these side files; None where none of them is a tokenizer's.

    Raises FastmergeError for files that cannot be read, or by what is installed.
    """
    files = {name: file for name, file in side_files.items() if is_tokenizer(name)}
    if TOKENIZER in files:
        document = _object(files[TOKENIZER], TOKENIZER, label)
    elif any(name in _OLDER or name.endswith((".model", ".tiktoken")) for name in files):
        document = _converted(label, files, folder)
    else:
        return None
    config = _object(files[CONFIG], CONFIG, label) if CONFIG in files else {}
    ids = _model_ids(document, label)
    added: dict[str, Mapping[str, Any]] = {}
    following = len(document["model"]["vocab"])
    for entry in _listed(document.get("added_tokens"), "added_tokens", label):
        token, number = entry.get("content"), entry.get("id")
        if not isinstance(token, str) or not _is_id(number):
            raise _unreadable(
                label, f"an entry of added_tokens has no content, or no id below {MAX_TOKENS}"
            )
        # The id that is written counts for nothing: see `_document`.
        if token not in ids:
            ids[token] = following
            following += 1
        added[token] = {key: value for key, value in entry.items() if key != "id"}
    _from_config(config, ids, added, label)
    if SPECIALS in files:
        _roles(_object(files[SPECIALS], SPECIALS, label), ids, added)
    if not ids:
        raise _unreadable(label, "it has no tokens")
    return Vocabulary(label, ids, added, document, config, files)


def _from_config(
    config: Mapping[str, Any], ids: dict[str, int], added: dict[str, Mapping[str, Any]], label: str
) -> None:
    """Takes over what transformers adds to tokenizer.json from tokenizer_config.json."""
    decoder = config.get("added_tokens_decoder")
    for text, entry in decoder.items() if isinstance(decoder, dict) else ():
        token = entry.get("content") if isinstance(entry, dict) else None
        number = int(text) if _NUMBER.fullmatch(text) else -1
        if not isinstance(token, str) or not _is_id(number):
            raise _unreadable(
                label, "an entry of added_tokens_decoder has no content or id", CONFIG
            )
        if token not in ids:
            ids[token] = number
            added[token] = {**_PLAIN, "normalized": False, "special": True, **entry}
    _roles(config, ids, added)


def _roles(
    config: Mapping[str, Any], ids: dict[str, int], added: dict[str, Mapping[str, Any]]
) -> None:
    """Special tokens that no list of tokens has: transformers puts them behind the others."""
    wanted = [config.get(role) for role in _ROLES]
    for key in _LISTS:
        extra = config.get(key)
        wanted += extra if isinstance(extra, list) else []
        wanted += list(extra.values()) if isinstance(extra, dict) else []
    last = max(ids.values(), default=-1)
    for value in wanted:
        token = text_of(value)
        if token and token not in ids:
            last += 1
            ids[token] = last
            info = value if isinstance(value, dict) else {}
            known = {key: info[key] for key in _PLAIN if key in info}
            added[token] = {**_PLAIN, "normalized": False, **known, "content": token}
            added[token] = {**added[token], "special": True}


def text_of(value: Any) -> str | None:
    """A token as configs write it: its text, or a mapping with that as its content."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else None


# ---------------------------------------------------------------- the model of a tokenizer


def _model_ids(document: Mapping[str, Any], label: str) -> dict[str, int]:
    """Token to id, without added tokens, of any model that tokenizers knows."""
    model = document.get("model")
    model = model if isinstance(model, dict) else {}
    vocab = model.get("vocab")
    if isinstance(vocab, list):  # Unigram: [piece, score], the place is the id
        if not all(map(_is_piece, vocab)):
            raise _unreadable(label, "an entry of model.vocab is no [piece, score]")
        unknown = model.get("unk_id")
        if unknown is not None and not (type(unknown) is int and 0 <= unknown < len(vocab)):
            raise _unreadable(label, f"model.unk_id is {brief(unknown)}, the number of no piece")
        return {item[0]: number for number, item in reversed(list(enumerate(vocab)))}
    if not isinstance(vocab, dict):
        raise _unreadable(label, "it has no model.vocab")
    if not all(map(_is_id, vocab.values())):
        raise _unreadable(label, f"an id in model.vocab is no whole number below {MAX_TOKENS}")
    return dict(vocab)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_TOKENS


def _is_piece(item: Any) -> bool:
    if not isinstance(item, list) or len(item) != 2 or not isinstance(item[0], str):
        return False
    return type(item[1]) in (int, float) and abs(item[1]) < _MAX_SCORE


def _kind(document: Mapping[str, Any]) -> Any:
    model = document["model"]
    listed = isinstance(model["vocab"], list)
    return model.get("type") or ("Unigram" if listed else "BPE"), listed


def _alike(one: Vocabulary, other: Vocabulary) -> bool:
    """Whether both cut text up the same way, so that one can take over the other's tokens as such;
    else they are split off the text wherever they stand.
    """
    return _kind(one.document) == _kind(other.document) and all(
        one.document.get(part) == other.document.get(part)
        for part in ("normalizer", "pre_tokenizer")
    )


def _with_model(
    document: Mapping[str, Any], label: str, other: Vocabulary, ids: Mapping[str, int]
) -> Mapping[str, Any]:
    """The document with what the other's model knows of the tokens that are new to it.

    BPE: its merges, behind those that are there. Unigram: its pieces' scores, which `_document`
    puts in place.
    """
    model, theirs = dict(document["model"]), other.document["model"]
    if isinstance(model["vocab"], list):
        have = {piece for piece, *_ in model["vocab"]}
        model["vocab"] = [
            *model["vocab"],
            *(item for item in theirs["vocab"] if item[0] not in have),
        ]
    else:
        known = set(model["vocab"])
        model["vocab"] = {**model["vocab"], **{t: ids[t] for t in theirs["vocab"] if t in ids}}
        if "merges" in model or "merges" in theirs:
            mine = _merges(model, label)
            seen = set(mine)
            more = _merges(theirs, other.label)
            new = [m for m in more if m not in seen and "".join(m) not in known]
            model["merges"] = [list(pair) for pair in (*mine, *new)]
    return {**document, "model": model}


def _merges(model: Mapping[str, Any], label: str) -> list[tuple[str, str]]:
    """The merges of a BPE model, which older files write as one text each."""
    given = model.get("merges") or []
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in _list_of(given)]
    for pair in pairs:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise _unreadable(label, "an entry of model.merges is no pair of tokens")
    return [(first, second) for first, second in pairs]


def _list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _document(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json with the vocabulary's tokens and ids, and no others."""
    ids = vocabulary.ids
    document: dict[str, Any] = _copied(vocabulary.document, vocabulary.label)
    model = document["model"]
    added = sorted(vocabulary.added, key=lambda token: ids[token])
    document["added_tokens"] = [
        {"id": ids[token], **_PLAIN, "special": False, **vocabulary.added[token]} for token in added
    ]
    if isinstance(model["vocab"], list):
        _place_pieces(model, vocabulary)
        return document
    own = {token: ids[token] for token in model["vocab"] if token in ids}
    # tokenizers numbers added tokens that are not in the model's vocabulary by itself: from its
    # size on (0.23), or from the largest id of an added token on (before). Where either gives other
    # ids, they must be in it.
    following, last = len(own), -1
    for token in added:
        number = ids[token]
        if token not in own:
            if number != following or number != max(last + 1, len(own)):
                own |= {name: ids[name] for name in added}
                break
            following += 1
        last = max(last, number)
    model["vocab"] = dict(sorted(own.items(), key=lambda item: item[1]))
    if "merges" in model:
        pairs = _merges(model, vocabulary.label)
        kept = [p for p in pairs if all(t in own for t in (*p, "".join(p)))]
        if len(kept) != len(pairs):
            model["merges"] = [list(pair) for pair in kept]
    return document


def _place_pieces(model: dict[str, Any], vocabulary: Vocabulary) -> None:
    """Each piece of a Unigram model at the place of its id, added tokens among them."""
    scores = {piece: score for piece, score, *_ in reversed(model["vocab"])}
    # An added token never reaches the model; a gap between ids must be filled with something.
    lowest = min((score for score in scores.values()), default=0.0) - 10.0
    unknown = model.get("unk_id")
    unknown_piece = model["vocab"][unknown][0] if isinstance(unknown, int) else None
    last = max((vocabulary.ids[t] for t in scores if t in vocabulary.ids), default=-1)
    pieces = []
    for number in range(last + 1):
        token = vocabulary.tokens.get(number, f"<|fastmerge_unused_{number}|>")
        pieces.append([token, scores.get(token, lowest)])
    beyond = [t for t in vocabulary.added if vocabulary.ids[t] > last]
    if sorted(vocabulary.ids[t] for t in beyond) != list(range(last + 1, last + 1 + len(beyond))):
        for number in range(last + 1, vocabulary.size):
            token = vocabulary.tokens.get(number, f"<|fastmerge_unused_{number}|>")
            pieces.append([token, lowest])
    model["vocab"] = pieces
    if unknown_piece is not None:
        model["unk_id"] = vocabulary.ids.get(unknown_piece, 0)


def _config(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer_config.json, its tokens being the vocabulary's."""
    config: dict[str, Any] = _copied(vocabulary.config, vocabulary.label)
    config = config or {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(vocabulary.ids[token]): {
                **_PLAIN,
                "special": False,
                **{key: value for key, value in info.items() if key != "id"},
            }
            for token, info in sorted(
                vocabulary.added.items(), key=lambda item: vocabulary.ids[item[0]]
            )
        }
    for role in _ROLES:
        token = text_of(config.get(role))
        if token is not None and token not in vocabulary.ids:
            del config[role]
    for key in _LISTS:
        if isinstance(config.get(key), list):
            config[key] = [t for t in config[key] if text_of(t) in vocabulary.ids]
    return config


# ---------------------------------------------------------------- files


def _converted(label: str, files: Files, folder: Path | None) -> dict[str, Any]:
    """tokenizer.json as transformers makes it of older files."""
    found = ", ".join(name for name in files if name in _OLDER or name.endswith(".model"))
    code = (
        "from transformers import AutoTokenizer as T; "
        f"T.from_pretrained({str(folder or label)!r}).save_pretrained({str(folder or label)!r})"
    )
    remedy = f"save it as one: python -c {shlex.quote(code)}"
    if folder is None:
        raise UnsupportedError(f"{label}: has no {TOKENIZER} and lies in no folder; {remedy}")
    try:
        import transformers
    except ImportError:
        raise ResourceError(
            f"{label}: has no {TOKENIZER} (only {found}), and reading that needs "
            f"`{install('llama', 'sentencepiece')}`; or {remedy}"
        ) from None
    try:
        with TemporaryDirectory(prefix="fastmerge-tokenizer-") as place:
            _put_older(files, folder, Path(place), label)
            made = transformers.AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
        backend = made.backend_tokenizer
        document: dict[str, Any] = json.loads(backend.to_str())
    except ModelError:
        raise
    except Exception as error:  # of transformers, tokenizers, sentencepiece, tiktoken, ...
        raise UnsupportedError(
            f"{label}: has no {TOKENIZER} (only {found}), and transformers makes none of it "
            f"({first_line(error)[:120]}); {remedy}"
        ) from error
    return document


def _put_older(files: Files, folder: Path, place: Path, label: str) -> None:
    """The tokenizer's files alone, and of a stranger's settings those that name no file:
    transformers opens "vocab", "vocab_file" and others wherever they lead, and what it reads is
    written into the output.
    """
    said = {name: _object(files[name], name, label) for name in (CONFIG, SPECIALS) if name in files}
    if (folder / "config.json").exists():
        said["config.json"] = read_object(Home(folder).inside(folder / "config.json"))
    for name, settings in said.items():
        kept = {
            key: value
            for key, value in settings.items()
            if not isinstance(value, str | dict) or key in HARMLESS or key.endswith("_token")
        }
        (place / name).write_text(json.dumps(kept))
    for name, file in files.items():
        if (name in _OLDER or name.endswith((".model", ".tiktoken"))) and "/" not in name:
            (place / name).write_bytes(_bytes(file))


def _bytes(file: bytes | Path, limit: int = MAX_FILE_BYTES) -> bytes:
    if isinstance(file, bytes):
        return file
    try:
        with open_regular(file) as opened:
            return opened.read(limit) or b""
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error


def _object(file: bytes | Path, name: str, label: str) -> dict[str, Any]:
    where = f"{label}/{name}" if isinstance(file, bytes) else str(file)
    limit = MAX_TOKENIZER_BYTES if name == TOKENIZER else MAX_CONFIG_BYTES
    data = _bytes(file, limit + 1)
    if len(data) > limit:
        raise ModelError(f"{where}: over {limit} bytes; no tokenizer's, download it again")
    try:
        return as_object(data)
    except ValueError as error:
        raise ModelError(f"{where}: {error}; download it again") from None


def _listed(value: Any, what: str, label: str) -> list[dict[str, Any]]:
    items: list[Any] = value if isinstance(value, list) else [] if value is None else [None]
    if not all(isinstance(item, dict) for item in items):
        raise _unreadable(label, f"{what} is no list of objects")
    return items


def _unreadable(label: str, what: str, name: str = TOKENIZER) -> ModelError:
    return ModelError(f"{label}: {name} cannot be read: {what}; download it again")


def _copied(value: Any, label: str) -> Any:
    with _shallow(label):
        return json.loads(json.dumps(value))


def _dumped(value: Any, label: str) -> bytes:
    with _shallow(label):
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def _shallow(label: str) -> Iterator[None]:
    """What can be read can be nested too deeply to be written."""
    try:
        yield
    except RecursionError:
        raise ModelError(
            f"{label}: its tokenizer's files are nested too deeply; download them again"
        ) from None

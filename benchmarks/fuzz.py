"""Mutations of valid files of every kind that a stranger may send, for as long as is asked.

    python benchmarks/fuzz.py                 60 seconds
    python benchmarks/fuzz.py --seconds 3600 --seed 7
    python benchmarks/fuzz.py --headers 1000000 --save      and the figures to results/
    python benchmarks/fuzz.py --only tokenizer --only part  some kinds alone

Of every input: it is taken, or refused with a FastmergeError of one printable line; nothing else is
raised, nothing is written beside the output, and time and memory stay under a bound. Of every
header, beside that: the verdict is the safetensors library's, but for what `OURS` lists. The first
input that breaks a rule is written to --keep and ends the run with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import safetensors

sys.path.append(str(Path(__file__).resolve().parent))  # also where PYTHONSAFEPATH is set

from fuzz_seeds import (
    ADAPTER,
    BITS,
    CONFIG,
    EVALUATED,
    HEADER,
    HEADER_DATA_BYTES,
    MIXTURE,
    MODEL,
    RECIPE,
    SCHEDULE,
    SPACE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    UNIGRAM,
    adapter_header,
    linear,
    llama,
)

import fastmerge
from fastmerge import api
from fastmerge.errors import FastmergeError
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.folder import INDEX, SINGLE
from fastmerge.models.header import Header, read_header
from fastmerge.output.working import beside

MAX_GROWTH_BYTES = 1 << 30  # of the whole run: no input here is larger than a few MB
MAX_MESSAGE = 1700
MAX_SECONDS = 10.0  # for one input, which takes milliseconds

# What the library takes and we refuse, by words of our refusal, and why.
OURS = {
    "does not start with '{'": "white space first: the format says that a header begins with {",
    "duplicate key": "two entries of a name: readers disagree about which one counts",
    "and nothing else": "an unknown field, which a newer format may have given a meaning",
    "dimensions; at most": "more dimensions than NumPy and torch have",
    "has unknown dtype": "a dtype spelt as an object, or of a newer library",
    "overflows": "a zero in a shape that hides an overflow from readers of 64 bits",
    "__metadata__": "metadata that no reader can give back",
}

ODD = (
    b"null", b"true", b"-0", b"-1", b"0", b"1e3", b"1.0", b"18446744073709551616", b"NaN",
    b"9223372036854775807", b"4294967296", b'""', b'"F32"', b'"\\ud800"', b'"\\ud83d\\ude00"',
    b'"\\u0000"', b"[]", b"{}", b"[[[[]]]]", b'{"F32": null}', b'"__metadata__"', b'"F8_E4M3"',
    b'"F4"', b"\xff", b"\x00", b"\xe2\x80\xae", b"\x1b[31m", b"!!bool 7", b"!!timestamp x",
    b"!!int ''", b"&a", b"*a", b"<<: *a", b"!!python/object:x y", b"? ", b"- ", b"\t", b"---\n",
    b'"\\U00110000"', b"1:" * 300 + b"1.0", b"0x" + b"f" * 5000, b"!!set x", b"!!seq x", b"!!map x",
    b"shape", b"data_offsets", b"dtype", b"1:99", b"2020-01-01", b"0x_", b"'", b'"', b"#", b"%",
)  # fmt: skip
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\w.+-]+|[^\s\w]|\s+')


def mutated(text: bytes, rng: random.Random) -> bytes:
    """One to four changes: of bits, bytes, tokens, stretches."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(7)
        if kind < 3:
            tokens = _TOKEN.findall(text)
            if not tokens:
                return text
            at = rng.randrange(len(tokens))
            if kind == 0:
                tokens[at] = rng.choice(ODD)
            elif kind == 1:
                tokens[at] = rng.choice(tokens)
            else:
                tokens[at:at] = tokens[at : at + rng.randrange(1, 12)]
            text = b"".join(tokens)
            continue
        at = rng.randrange(len(text) + 1)
        if kind == 3:
            text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        elif kind == 4:
            text = text[:at] + text[at + rng.randrange(1, 9) :]
        elif kind == 5:
            text = text[:at] + rng.choice(ODD) + text[at:]
        else:
            text = (
                text[:at] + text[at : at + rng.randrange(1, 20)] * rng.randrange(2, 50) + text[at:]
            )
    return text


def drawn_header(rng: random.Random) -> bytes:
    """A header that is valid but for what is drawn seldom: of mutations 19 in 20 are refused."""
    tensors: list[tuple[str, object]] = []
    names = _NAMES if rng.random() < 0.5 else _NAMES[:8]  # most readers' short cut is for these
    at = 0
    while at < HEADER_DATA_BYTES:
        dtype, bits = rng.choice(list(BITS.items()))
        shape = [rng.choice((0, 1, 1, 2, 3)) for _ in range(rng.randrange(5))]
        end = at + math.prod(shape) * bits // 8
        if end > HEADER_DATA_BYTES or len(tensors) > 8:
            dtype, end = "U8", HEADER_DATA_BYTES
            shape = [end - at]
        name = rng.choice(names) + str(len(tensors))
        fields = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        if rng.random() < 0.02:
            fields[rng.choice(list(fields))] = rng.choice((None, [], [0, 0], "F32", 2**63, [1, -1]))
        tensors.append((name, _Pairs(_twice(rng.sample(list(fields.items()), 3), rng))))
        at = end
    order = _twice(rng.sample(tensors, len(tensors)), rng)
    if rng.random() < 0.3:
        metadata: object = rng.choice((None, [], {"a": 1}, {"a": {"b": "c"}}))
        if rng.random() < 0.8:
            keys = rng.sample(names, rng.randrange(4))
            metadata = _Pairs(_twice([(key, rng.choice(_NAMES)) for key in keys], rng))
        order.insert(rng.randrange(len(order) + 1), ("__metadata__", metadata))
    text = _text(_Pairs(order), rng, rng.random() < 0.5, rng.choice(("", "", " ", "\n\t\r ")))
    return text.encode() + rng.choice((b"", b" ", b"  \n\t", b"\x00")) * rng.randrange(2)


_NAMES = (
    "a", "b.weight", "é", "\U0001f600", "", "x" * 300, "dtype", "__metadata__", "\x00",
    ":", "a:b::", '":', "\\u003a", "\\", "shape", "layer-0", "\ufeff", "\x7f", "{}", "/",
)  # fmt: skip


class _Pairs(list[tuple[str, object]]):
    """An object of JSON that may have a key twice."""


def _twice(pairs: list[tuple[str, object]], rng: random.Random) -> list[tuple[str, object]]:
    """Seldom with one more pair of a key that is there, or without one."""
    if pairs and rng.random() < 0.01:
        pairs.insert(
            rng.randrange(len(pairs) + 1), (rng.choice(pairs)[0], rng.choice((*pairs, ("", 0)))[1])
        )
    if pairs and rng.random() < 0.005:
        pairs.pop(rng.randrange(len(pairs)))
    return pairs


def _text(value: object, rng: random.Random, escaped: bool, space: str) -> str:
    """As JSON; ``escaped``: any letter may be written by its number."""
    if isinstance(value, dict):
        value = _Pairs(value.items())
    if isinstance(value, _Pairs):
        inner = (
            f"{space}{_text(key, rng, escaped, space)}{space}:{_text(each, rng, escaped, space)}"
            for key, each in value
        )
        return f"{{{','.join(inner)}{space}}}"
    if isinstance(value, list):
        return f"[{','.join(space + _text(each, rng, escaped, space) for each in value)}{space}]"
    if type(value) is int and rng.random() < 0.001:
        return rng.choice((f"{value}.0", f"{value}e0", f"0{value}", f"-{value}", "9" * 5000))
    if not isinstance(value, str):
        return json.dumps(value)
    text = json.dumps(value, ensure_ascii=escaped)
    if not escaped or rng.random() < 0.7:
        return text
    at = rng.randrange(len(value) + 1)
    number = "".join(f"\\u{ord(letter):04{rng.choice('xX')}}" for letter in value[at : at + 1])
    if len(number) != 6:  # none, or a letter of two
        return text
    return json.dumps(value[:at])[:-1] + number + json.dumps(value[at + 1 :])[1:]


_OWN = {f"{name}.yml" for name in ("recipe", "schedule", "space", "mixture")}
_OWN |= {"x.safetensors", "journal.jsonl"}  # which are made here


class BrokenError(Exception):
    """A rule that an input breaks."""


def _late(*_: object) -> None:
    raise BrokenError(f"took more than {MAX_SECONDS:.0f} s")


def refusal(work: Callable[[], object]) -> str | None:
    """The message of the FastmergeError that ``work`` raises; None where it raises none."""
    try:
        work()
    except FastmergeError as error:
        message = str(error)
        if not message.isprintable() or len(message) > MAX_MESSAGE:
            raise BrokenError(f"not one short line: {message[:300]!r}") from None
        return message
    except BrokenError:
        raise
    except Exception as error:
        raise BrokenError(f"{type(error).__name__}: {str(error)[:300]}") from error
    return None


def _interrupted(done: int, total: int, _: str) -> None:
    if done > total // 2:
        raise KeyboardInterrupt


class Target:
    """A folder with small models, and one way in for each kind of input."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.tune = folder / "base", folder / "tune"
        for place in (self.base, self.tune):
            place.mkdir()
            (place / "config.json").write_text(json.dumps(CONFIG))
            self._write(place / SINGLE, json.dumps(MODEL).encode())
        self.seeds = {
            "header": json.dumps(HEADER).encode(),
            "index": json.dumps({"weight_map": dict.fromkeys(MODEL, SINGLE)}).encode(),
            "config": json.dumps(CONFIG).encode(),
            "recipe": self._placed(RECIPE),
            "schedule": self._placed(SCHEDULE),
            "adapter": json.dumps(ADAPTER).encode(),
            "tokenizer": json.dumps(TOKENIZER).encode(),
            "pieces": json.dumps(UNIGRAM).encode(),
            "tokenizer_config": json.dumps(TOKENIZER_CONFIG).encode(),
            "space": self._placed(SPACE),
            "mixture": self._placed(MIXTURE),
            "evaluated": EVALUATED,
        }
        self.llama = llama(folder / "llama")
        self.adapter = folder / "adapter"
        self.adapter.mkdir()
        (self.adapter / "adapter_model.safetensors").write_bytes(adapter_header())
        self._tokenized = [self._copied(self.base, name) for name in ("one", "two")]
        self._tokenizers(TOKENIZER, TOKENIZER)
        self._work()
        self.verdicts: Counter[str] = Counter()
        self._there = self._names()

    def _work(self) -> None:
        """What merges leave: a written model, parts that are done, a merge that was killed."""
        self.out, kept = self.folder / "out", self.folder / "kept"
        recipe = linear(self.base, self.tune)
        fastmerge.merge(recipe, self.out)
        self.seeds["lineage"] = (self.out / "fastmerge.json").read_bytes()
        self.out.rename(kept)
        parts = beside(self.out, "parts")
        fastmerge.merge(recipe, self.out, part="1/1")
        parts.rename(self.folder / "parts")
        self.seeds["manifest"] = (self.folder / "parts" / "plan" / "manifest.json").read_bytes()
        (run,) = (self.folder / "parts").glob("part-*.run")
        self.seeds["part"] = run.read_bytes()
        self._run = run.name
        while not beside(self.out, "partial").exists():  # none is left where all was under way
            with suppress(KeyboardInterrupt):
                fastmerge.merge(recipe, self.out, threads=1, progress=_interrupted)
        beside(self.out, "partial").rename(self.folder / "partial")
        journal = beside(self.out, "journal").read_bytes()
        beside(self.out, "journal").unlink()
        self.seeds["journal"] = re.sub(rb'"folder": \d+', b'"folder": 1', journal)

    def _copied(self, model: Path, name: str) -> Path:
        return Path(shutil.copytree(model, self.folder / name))

    def _tokenizers(self, *documents: object) -> None:
        for place, document in zip(self._tokenized, documents, strict=True):
            (place / "tokenizer.json").write_text(json.dumps(document))
            (place / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))

    def _names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def _placed(self, text: str) -> bytes:
        places = {"BASE": "base", "TUNE": "tune", "LLAMA": "llama"}
        for word, name in places.items():
            text = text.replace(word, str(self.folder / name))
        return text.encode()

    def _write(self, path: Path, text: bytes) -> None:
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(HEADER_DATA_BYTES))

    def try_one(self, kind: str, text: bytes) -> None:
        getattr(self, f"_{kind}_taken")(text)
        new = self._names() - self._there - _OWN
        if new:
            raise BrokenError(f"writes {', '.join(sorted(new))} beside the output")

    def _count(self, kind: str, message: str | None) -> None:
        self.verdicts[f"{kind}: {'taken' if message is None else 'refused'}"] += 1

    def _header_taken(self, text: bytes) -> None:
        path = self.folder / "x.safetensors"
        self._write(path, text)
        ours: list[Header] = []
        message = refusal(lambda: ours.append(read_header(path, 0)[0]))
        content: object = None
        try:
            with safetensors.safe_open(path, "np") as file:
                names = file.keys()
                shapes = [tuple(file.get_slice(name).get_shape()) for name in names]
                content = dict(zip(names, shapes, strict=True)), file.metadata() or {}
            theirs = None
        except safetensors.SafetensorError as error:
            theirs = str(error)
        self._count("header", message)
        if message is None and theirs is not None:
            raise BrokenError(f"taken, which the library refuses: {theirs}")
        for header in ours:
            if content != ({info.name: info.shape for info in header.tensors}, header.metadata):
                raise BrokenError(f"read as {header}, by the library as {content}")
        if message is not None and theirs is None:
            known = [words for words in OURS if words in message]
            if not known:
                raise BrokenError(f"refused, which the library takes: {message}")
            self.verdicts[f"header: refused by us alone ({known[0]})"] += 1

    def _index_taken(self, text: bytes) -> None:
        (self.base / INDEX).write_bytes(text)
        try:
            self._count("index", refusal(lambda: Checkpoint.open(self.base)))
        finally:
            (self.base / INDEX).unlink()

    def _config_taken(self, text: bytes) -> None:
        (self.base / "config.json").write_bytes(text)
        recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}}
        recipe |= {"models": [{"model": str(self.base)}, {"model": str(self.tune)}]}
        try:
            self._count("config", refusal(lambda: api.plan(recipe)))
        finally:
            (self.base / "config.json").write_text(json.dumps(CONFIG))

    def _recipe_taken(self, text: bytes) -> None:
        path = self.folder / "recipe.yml"
        path.write_bytes(text)
        self._count("recipe", refusal(lambda: api.plan(path)))

    def _schedule_taken(self, text: bytes) -> None:
        from fastmerge.retrograde import schedule

        path = self.folder / "schedule.yml"
        path.write_bytes(text)
        self._count("schedule", refusal(lambda: schedule.load(path)))

    def _space_taken(self, text: bytes) -> None:
        from fastmerge.search import document, runner

        path = self.folder / "space.yml"
        path.write_bytes(text)
        self._count("space", refusal(lambda: runner.opened(document.load(path))))

    def _mixture_taken(self, text: bytes) -> None:
        path = self.folder / "mixture.yml"
        path.write_bytes(text)
        self._count("mixture", refusal(lambda: api.plan(path)))

    def _adapter_taken(self, text: bytes) -> None:
        (self.adapter / "adapter_config.json").write_bytes(text)
        recipe = linear(f"{self.llama}+{self.adapter}")
        self._count("adapter", refusal(lambda: api.plan(recipe)))

    def _union(self, kind: str) -> None:
        """The tokens of two models, and the files that a merge would write of them."""
        recipe = linear(*self._tokenized, tokenizer_source="union")
        try:
            self._count(kind, refusal(lambda: api.plan(recipe).side_files()))
        finally:
            self._tokenizers(TOKENIZER, TOKENIZER)

    def _tokenizer_taken(self, text: bytes) -> None:
        other = json.loads(json.dumps(TOKENIZER).replace('"a"', '"b"').replace("a a", "b b"))
        self._tokenizers(TOKENIZER, other)
        (self._tokenized[0] / "tokenizer.json").write_bytes(text)
        self._union("tokenizer")

    def _pieces_taken(self, text: bytes) -> None:
        self._tokenizers(UNIGRAM, json.loads(json.dumps(UNIGRAM).replace('"a"', '"b"')))
        (self._tokenized[1] / "tokenizer.json").write_bytes(text)
        self._union("pieces")

    def _tokenizer_config_taken(self, text: bytes) -> None:
        other = json.loads(json.dumps(TOKENIZER).replace('"a"', '"b"').replace("a a", "b b"))
        self._tokenizers(TOKENIZER, other)
        (self._tokenized[0] / "tokenizer_config.json").write_bytes(text)
        self._union("tokenizer_config")

    def _evaluated_taken(self, text: bytes) -> None:
        from fastmerge.evaluation.journal import Journal

        path = self.folder / "journal.jsonl"
        path.write_bytes(text)
        self._count("evaluated", refusal(lambda: Journal(path).holds("score:")))

    def _lineage_taken(self, text: bytes) -> None:
        place = self.folder / "kept"
        (place / "fastmerge.json").write_bytes(text)
        self._count("lineage", refusal(lambda: fastmerge.verify(place).as_dict()))

    def _parts_taken(self, kind: str, name: str, text: bytes) -> None:
        """What `finish` makes of a folder of parts, which it may refuse or join, nothing else."""
        parts = beside(self.out, "parts")
        shutil.copytree(self.folder / "parts", parts)
        (parts / name).write_bytes(text)
        parts.chmod(0o700)
        try:
            self._count(kind, refusal(lambda: fastmerge.finish(self.out)))
        finally:
            for place in (parts, self.out, beside(self.out, "old")):
                shutil.rmtree(place, ignore_errors=True)

    def _manifest_taken(self, text: bytes) -> None:
        self._parts_taken("manifest", "plan/manifest.json", text)

    def _part_taken(self, text: bytes) -> None:
        self._parts_taken("part", self._run, text)

    def _journal_taken(self, text: bytes) -> None:
        """A merge beside a journal and a folder that nobody knows is whole, or refused."""
        journal, partial = beside(self.out, "journal"), beside(self.out, "partial")
        shutil.copytree(self.folder / "partial", partial)
        said = text.replace(b'"folder": 1', f'"folder": {partial.stat().st_ino}'.encode())
        journal.write_bytes(said)
        journal.chmod(0o600)
        try:
            recipe = linear(self.base, self.tune)
            message = refusal(lambda: fastmerge.merge(recipe, self.out, threads=1))
            if message is None and not fastmerge.verify(self.out).whole:
                raise BrokenError("a planted journal made a model that is not whole")
            self._count("journal", message)
        finally:
            journal.unlink(missing_ok=True)
            for place in (partial, self.out, beside(self.out, "old")):
                shutil.rmtree(place, ignore_errors=True)


def fuzz(
    seconds: float,
    seed: int,
    *,
    headers: int = 0,
    keep: Path | None = None,
    only: Sequence[str] = (),
) -> Counter[str]:
    """Tries inputs until both bounds are met; returns how many were taken and refused, by kind.
    ``only``: of these kinds.

    Raises BrokenError, with the input kept in the file ``keep``, at the first that breaks a rule.
    """
    signal.signal(signal.SIGALRM, _late)
    rng = random.Random(seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    until = time.monotonic() + seconds
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk is most of the time
    with tempfile.TemporaryDirectory(prefix="fastmerge-fuzz-", dir=memory) as name:
        target = Target(Path(name))
        kinds = list(only or target.seeds)
        for kind in kinds:
            target.try_one(kind, target.seeds[kind])
            if target.verdicts[f"{kind}: taken"] != 1:
                raise BrokenError(f"the valid {kind} is refused")
        tried = 0
        while time.monotonic() < until or tried < headers:
            # A header takes 50 us, a plan 5 ms.
            kind = rng.choice(kinds)
            kind = "header" if not only and rng.random() < 0.9 else kind
            tried += kind == "header"
            if kind == "header" and rng.random() < 0.4:
                text = drawn_header(rng)
            else:
                text = mutated(target.seeds[kind], rng)
            try:
                signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
                try:
                    target.try_one(kind, text)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                if (peak - before) * 1024 > MAX_GROWTH_BYTES:
                    raise BrokenError(f"memory grew by {(peak - before) >> 10} MiB")
            except BrokenError as broken:
                if keep is not None:
                    keep.write_bytes(text)
                raise BrokenError(f"{kind} {text[:500]!r}: {broken}") from broken
        return target.verdicts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--headers", type=int, default=0, help="at least this many of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", action="append", default=[], metavar="KIND")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-broken"))
    parser.add_argument("--save", action="store_true", help="the figures to results/fuzz")
    words = parser.parse_args()
    begun = time.monotonic()
    try:
        verdicts = fuzz(
            words.seconds, words.seed, headers=words.headers, keep=words.keep, only=words.only
        )
    except BrokenError as broken:
        print(f"BROKEN: {broken}\n(kept in {words.keep})")
        sys.exit(1)
    for verdict, count in sorted(verdicts.items()):
        print(f"{count:10}  {verdict}")
    about = {
        "inputs": sum(count for verdict, count in verdicts.items() if "alone" not in verdict),
        "seed": words.seed,
        "seconds": round(time.monotonic() - begun),
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        "broken": 0,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if words.save:
        from record import record

        # Kinds alone beside the long run, or in its place: headers are most of it.
        name = "fuzz" if not words.only or "header" in words.only else "fuzz-kinds"
        record(name, "Mutated inputs", "| verdict | inputs |", sorted(verdicts.items()), about)


if __name__ == "__main__":
    main()

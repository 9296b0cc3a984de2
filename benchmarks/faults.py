"""Fails every call of a merge that can fail, one at a time, and looks at what is left.

    python benchmarks/faults.py                      every point, every way: an hour
    python benchmarks/faults.py --sample 12          some of each, as the tests do
    python benchmarks/faults.py --only merge --ways kill

`faults.c`, compiled here and preloaded, counts the points and fails the chosen one: each open,
read, write, fsync, rename, unlink, mkdir, ftruncate, fallocate, flock, fchmod, close and mmap under
the folder of models and outputs; each piece of memory that the extension asks for, and what anybody
else asks for from 64 KiB on; each thread. After a fault:

- what was raised is a FastmergeError of one printable line (or nothing, where the call is advice);
- the target is absent, or what it was before, or the whole merge, byte for byte;
- the same command, without a fault, succeeds, and its bytes are those of a merge without faults;
- nothing else is left beside the target.

"objects" makes one of each of the extension's classes, and gets a MemoryError at most.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))  # also where PYTHONSAFEPATH is set

from fuzz_seeds import MIXTURE, llama

FILES, MEMORY, THREADS = 1 | 2, 4, 8  # kinds of points, as in faults.c
WAYS = {  # kinds of points, what happens there, and whether later ones fail too
    "no space": (FILES, errno.ENOSPC, False),
    "no space from then on": (FILES, errno.ENOSPC, True),
    "input/output error": (FILES, errno.EIO, False),
    "permission denied": (FILES, errno.EACCES, False),
    "kill": (FILES, -signal.SIGKILL, False),
    "interrupt": (FILES, -signal.SIGINT, False),
    "no memory": (MEMORY, errno.ENOMEM, False),
    "no memory from then on": (MEMORY, errno.ENOMEM, True),
    "no thread": (THREADS, errno.EAGAIN, False),
}
MAX_SECONDS = 60  # for one run, which takes 0.05
COMPILE = ["-shared", "-fPIC", "-O1", "-fexceptions", "-ldl", "-lstdc++", "-lpthread"]


class BrokenError(Exception):
    """A promise that a fault breaks."""


def nothing(out: Path) -> None:
    pass


@dataclass(frozen=True)
class Scenario:
    """``run(out)`` makes ``out``; ``prepare(out)`` puts there what it meets."""

    name: str
    run: Callable[[Path], None]
    prepare: Callable[[Path], None] = nothing
    again: Callable[[Path], None] | None = None  # the run after a fault; None: the same
    exchange: bool = True  # whether the file system exchanges two names in one step
    whole: bool = True  # absent or whole; False: the folder of a run, which fills step by step


@dataclass
class Outcome:
    """What became of a process: ``error`` None if all went well."""

    error: str | None = None
    message: str = ""
    points: int = 0
    log: tuple[str, ...] = ()
    trace: str = ""


Fault = tuple[str, str, str, Outcome]  # scenario, way, where, what happened

# --- processes ---


class Shim:
    """The functions of faults.c in this process."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(None)
        self._folder = str(folder).encode()
        self._library.faults_log.restype = ctypes.c_char_p
        self._library.faults_disarm.restype = ctypes.c_long

    def arm(self, kinds: int, at: int, with_: int, on: bool, *, exchange: bool = True) -> None:
        self._library.faults_no_exchange(int(not exchange))
        self._library.faults_arm(self._folder, kinds, ctypes.c_long(at), with_, int(on))

    def disarm(self) -> tuple[int, tuple[str, ...]]:
        count = self._library.faults_disarm()
        return count, tuple(self._library.faults_log().decode(errors="replace").splitlines())


def _outcome(
    work: Callable[[], None], shim: Shim, how: tuple[int, int, int, bool, bool]
) -> Outcome:
    from fastmerge.errors import FastmergeError

    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcome = Outcome()
    try:
        kinds, at, with_, on, exchange = how
        shim.arm(kinds, at, with_, on, exchange=exchange)
        work()
    except FastmergeError as error:
        shim.disarm()
        outcome.error, outcome.message = "FastmergeError", str(error)
    except BaseException as error:  # noqa: BLE001 - the parent looks at it
        shim.disarm()
        outcome.error, outcome.message = type(error).__name__, str(error)
        outcome.trace = traceback.format_exc()
    outcome.points, outcome.log = shim.disarm()
    return outcome


def forked(
    work: Callable[[], None],
    shim: Shim,
    how: tuple[int, int, int, bool, bool],
    interrupt_after: float = 0.0,
) -> Outcome:
    """``work`` in a child of this process, armed as ``how`` says; SIGINT after some seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                outcome = _outcome(work, shim, how)
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # it may come later still
            except KeyboardInterrupt:  # before the work, or after it
                outcome = Outcome("KeyboardInterrupt")
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(outcome, pipe)
        finally:  # never up the parent's stack, which would delete its folder
            os._exit(0)
    os.close(writing)
    if interrupt_after:
        time.sleep(interrupt_after)
        os.kill(child, signal.SIGINT)
    until = time.monotonic() + MAX_SECONDS
    with os.fdopen(reading, "rb") as pipe:
        data = b""
        os.set_blocking(reading, False)
        while time.monotonic() < until:
            piece = pipe.read()
            if piece == b"":
                break
            data += piece or b""
            if piece is None:
                time.sleep(0.001)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(error="hang")
    _, status = os.waitpid(child, 0)
    if data:
        return pickle.loads(data)
    _, log = shim.disarm()
    return Outcome(error=f"signal {-os.waitstatus_to_exitcode(status)}", log=log)


def contents(folder: Path) -> dict[str, str] | None:
    """Every file's digest; None where there is no folder."""
    if not folder.is_dir():
        return None
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- the check ---


class Bench:
    """One scenario, whose every point can be failed."""

    def __init__(self, scenario: Scenario, root: Path, shim: Shim) -> None:
        self.scenario, self.shim = scenario, shim
        self._place = root / f"place-{scenario.name.replace(' ', '-')}"
        self._out = self._place / "out"
        clean = self._run((FILES | MEMORY | THREADS, 0, 0, False))
        if clean.error is not None:
            raise BrokenError(f"{scenario.name}: without a fault: {clean}")
        self.wanted = contents(self._out)
        assert self.wanted
        self._siblings = sorted(os.listdir(self._place))

    def _prepared(self) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir()
        self.scenario.prepare(self._out)

    def _run(self, how: tuple[int, int, int, bool]) -> Outcome:
        self._prepared()
        self._before = contents(self._out)
        return forked(
            lambda: self.scenario.run(self._out), self.shim, (*how, self.scenario.exchange)
        )

    def points(self, kinds: int) -> tuple[str, ...]:
        return self._run((kinds, 0, 0, False)).log

    def fail(self, way: str, at: int) -> Outcome:
        """Raises BrokenError for a promise that is broken."""
        kinds, with_, on = WAYS[way]
        outcome = self._run((kinds, at, with_, on))
        try:
            self._check(outcome, with_)
        except BrokenError as broken:
            where = outcome.log[at - 1] if at <= len(outcome.log) else ""
            raise BrokenError(
                f"{self.scenario.name}: {way} at point {at} ({where}): {broken}"
                f"\n  {outcome.error}: {outcome.message}\n{outcome.trace}"
            ) from None
        return outcome

    def interrupt(self, rng: random.Random) -> Outcome:
        """SIGINT at a random moment, in no call in particular."""
        begun = time.monotonic()
        self._run((0, 0, 0, False))
        seconds = rng.uniform(0.2, 1.0) * (time.monotonic() - begun)
        self._prepared()
        self._before = contents(self._out)
        how = (0, 0, 0, False, self.scenario.exchange)
        outcome = forked(lambda: self.scenario.run(self._out), self.shim, how, seconds)
        try:
            self._check(outcome, -signal.SIGINT)
        except BrokenError as broken:
            text = f"{self.scenario.name}: interrupted after {seconds:.3f} s: {broken}"
            raise BrokenError(f"{text}\n  {outcome.error}\n{outcome.trace}") from None
        return outcome

    def _check(self, outcome: Outcome, with_: int) -> None:
        legal = {None, "FastmergeError"}
        if with_ < 0:
            legal = {None, f"signal {-with_}", "KeyboardInterrupt"}
        if outcome.error not in legal:
            raise BrokenError(f"ends with {outcome.error}")
        if not outcome.message.isprintable() or len(outcome.message) > 1700:
            raise BrokenError("not one printable line")
        found = contents(self._out)
        if found is None and not self.scenario.exchange:
            # Between the two steps only a kill, or a disk that refuses the way back, may leave it.
            found = contents(self._out.with_name(".out.fastmerge-old"))
        as_before = found == self._before or not self.scenario.whole
        if found != self.wanted and (not as_before or outcome.error is None):
            raise BrokenError(f"the target is not what it was: {_differ(found, self.wanted)}")
        again = self.scenario.again or self.scenario.run
        if found == self.wanted and self._before is None:
            # The name was given before the fault: there is nothing to do again.
            again = nothing
        mended = forked(lambda: again(self._out), self.shim, (0, 0, 0, False, True))
        if mended.error is not None:
            raise BrokenError(f"the next run fails: {mended.error}: {mended.message}{mended.trace}")
        found = contents(self._out)
        if found != self.wanted:
            raise BrokenError(f"the next run's bytes differ: {_differ(found, self.wanted)}")


def _differ(found: dict[str, str] | None, wanted: dict[str, str] | None) -> list[str]:
    found, wanted = found or {}, wanted or {}
    return sorted(name for name in found | wanted if found.get(name) != wanted.get(name))


# --- what is run ---


def write_model(folder: Path, seed: int, *, layers: int = 3) -> Path:
    import numpy as np

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{i}.mlp.{part}.weight" for i in range(layers) for part in "ab"]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name in names:
        begin = len(data)
        data += rng.normal(size=(24, 32)).astype(np.float32).tobytes()
        offsets = [begin, len(data)]
        header[name] = {"dtype": "F32", "shape": [24, 32], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    config = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 24}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"padding": "x" * 3000}))
    return folder


def write_adapter(folder: Path) -> Path:
    """On what `write_model` writes."""
    folder.mkdir()
    header, at = {}, 0
    for module in (f"layers.{layer}.mlp.{name}" for layer in range(3) for name in "ab"):
        for part, shape in (("A", [2, 32]), ("B", [24, 2])):
            end = at + 4 * shape[0] * shape[1]
            name = f"base_model.model.model.{module}.lora_{part}.weight"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
            at = end
    text = json.dumps(header).encode()
    data = (b"\0\0\x80\x3f" * at)[:at]
    (folder / "adapter_model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a", "b"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def scenarios(root: Path, shim: Shim) -> dict[str, Scenario]:
    import fastmerge
    from fastmerge.engine import merge as engine
    from fastmerge.retrograde import run as run_walk
    from fastmerge.search.sweep import sweep

    vars(engine)["_SCRATCH_SHARE"] = 1 << 40  # every intermediate lies in a file
    a, b, c = (write_model(root / name, seed) for seed, name in enumerate("abc"))
    inner = {
        "merge_method": "ties",
        "base_model": str(a),
        "parameters": {"density": 0.5, "weight": 1.0},
    }
    inner["models"] = [{"model": str(b)}, {"model": str(c)}]
    ties = inner | {"parameters": {"density": 0.5, "weight": 0.7}, "dtype": "bfloat16"}
    recipe = root / "nested.yml"
    documents = [
        {"name": "inner", **inner},
        {"merge_method": "slerp", "base_model": str(a), "parameters": {"t": 0.3}}
        | {"models": [{"model": str(a)}, {"model": "inner"}]},
    ]
    recipe.write_text("\n---\n".join(json.dumps(document) for document in documents))

    def merge(source: Any, *, overwrite: bool = False) -> Callable[[Path], None]:
        def run(out: Path) -> None:
            fastmerge.merge(
                source, out, threads=2, overwrite=overwrite, max_shard_bytes=7000,
                memory_limit=64 << 20,
            )  # fmt: skip

        return run

    def old(out: Path) -> None:
        shutil.copytree(root / "old", out)

    def killed(out: Path) -> None:
        """A merge of the same recipe that died once half of the tensors were written."""
        log = forked(lambda: merge(ties)(out), shim, (FILES, 0, 0, False, True)).log
        shutil.rmtree(out)
        late = [n for n, line in enumerate(log, 1) if line.startswith("pwrite")]
        at = late[len(late) * 2 // 3]
        forked(lambda: merge(ties)(out), shim, (FILES, at, -signal.SIGKILL, False, True))

    def parts(out: Path) -> None:
        """Both parts of a merge, and what joins them."""
        for number in (1, 2):
            fastmerge.merge(ties, out, threads=2, max_shard_bytes=7000, part=(number, 2))
        fastmerge.finish(out)

    def parts_again(out: Path) -> None:
        try:
            parts(out)
        except fastmerge.OutputError:  # the parts are being joined already
            fastmerge.finish(out)

    walk = {
        "baseline": {"model": str(a)},
        "pool": [{"model": str(b)}, {"model": str(c)}],
        "seed": 3,
        "schedule": {
            "cycles": 2,
            "degrade": {"partner": "next", "method": "slerp", "t": 0.35},
            "retrace": {"toward": "baseline", "method": "slerp", "t": 0.4},
        },
    }
    pair = {"merge_method": "slerp", "base_model": str(a), "parameters": {"t": 0.5}}
    pair["models"] = [{"model": str(a)}, {"model": str(b)}]

    def walked(out: Path, *, resume: bool = False) -> None:
        run_walk(walk, out, evaluate=False, threads=2, resume=resume)

    def swept(out: Path, *, resume: bool = False) -> None:
        sweep(pair, out, [0.2, 0.5], threads=2, resume=resume)

    def average(out: Path) -> None:
        fastmerge.average([a, b, c], out, threads=2)

    adapter, mixture = write_adapter(root / "adapter"), root / "mixture.yml"
    mixture.write_text(MIXTURE.replace("LLAMA", str(llama(root / "llama"))))

    def resumed(run: Callable[..., None]) -> Callable[[Path], None]:
        """The same again, where it had begun."""
        return lambda out: run(out, resume=out.exists())

    extract = partial(fastmerge.extract_lora, rank=2, threads=2)
    adapters = partial(fastmerge.merge_adapters, weights=[1.0, 0.5], method="linear", threads=2)

    def fold(out: Path) -> None:
        fastmerge.fold(a, adapter, out, threads=2)

    merge({**inner, "merge_method": "linear", "parameters": {"weight": 1.0}})(root / "old")
    found = [
        Scenario("merge", merge(ties)),
        Scenario("overwrite", merge(ties, overwrite=True), old),
        Scenario("overwrite in two steps", merge(ties, overwrite=True), old, exchange=False),
        Scenario("resume", merge(ties), killed),
        Scenario("intermediates", merge(recipe)),
        Scenario("parts", parts, again=parts_again),
        Scenario("average", average),
        Scenario("fold", fold),
        Scenario("mixture", merge(str(mixture))),
        Scenario("walk", walked, again=resumed(walked), whole=False),
        Scenario("sweep", swept, again=resumed(swept), whole=False),
        Scenario("extract-lora", lambda out: extract(b, a, out)),
        Scenario("adapters", lambda out: adapters([adapter, adapter], out)),
    ]
    return {scenario.name: scenario for scenario in found}


# --- running ---


def chosen(points: int, sample: int, rng: random.Random) -> list[int]:
    """All of them, or ``sample``, the first and the last among them."""
    every = range(1, points + 1)
    if not sample or points <= sample:
        return list(every)
    return sorted({1, points, *rng.sample(every, max(sample - 2, 0))})


def objects(root: Path, np: Any, _C: Any) -> None:
    """One of each class of the extension, and of what they return."""
    pool, array = _C.Pool(1), np.zeros(64, np.float32)
    view = _C.View(array.ctypes.data, array.size, "F32", array)
    _C.copy(pool, _C.zeros(8, "F32"), _C.MemorySink(view.slice(8, 16)))
    mapping = _C.Mapping(str(root / "a" / "model.safetensors"))
    staged = _C.StagedFile(_C.Staging(1 << 20, 2, 1), str(root / "staged"), 256)
    sink = staged.sink(0, 64, "F32", checksum=_C.Checksum(256))
    _C.copy(pool, mapping.view(0, 64, "F32"), sink)
    staged.finish()


def run_objects(root: Path, shim: Shim, words: argparse.Namespace) -> Iterator[Fault]:
    import numpy as np

    from fastmerge import _C  # imported before a fork: what it makes then is made once

    def work() -> None:
        objects(root, np, _C)

    for way in ("no memory", "no memory from then on"):
        if words.ways and way not in words.ways:
            continue
        kinds, with_, on = WAYS[way]
        points = forked(work, shim, (kinds, 0, 0, False, True)).log
        for at, where in enumerate(points, 1):
            outcome = forked(work, shim, (kinds, at, with_, on, True))
            if outcome.error not in (None, "MemoryError"):
                text = f"objects: {way} at point {at} ({where}): {outcome.error}\n{outcome.trace}"
                if not words.go_on:
                    raise BrokenError(text)
                outcome = Outcome("BROKEN", text)
            yield "objects", way, where, outcome


def run_all(words: argparse.Namespace, root: Path) -> Iterator[Fault]:
    shim = Shim(root)
    rng = random.Random(words.seed)
    if not words.only or "objects" in words.only:
        write_model(root / "a", 0)
        yield from run_objects(root, shim, words)
        shutil.rmtree(root / "a")
    for name, scenario in scenarios(root, shim).items():
        if words.only and name not in words.only:
            continue
        bench = Bench(scenario, root, shim)
        for _ in range(words.interrupts):
            try:
                yield name, "interrupt at random", "", bench.interrupt(rng)
            except BrokenError as broken:
                if not words.go_on:
                    raise
                yield name, "interrupt at random", "", Outcome("BROKEN", str(broken))
        for way, (kinds, _, _) in WAYS.items():
            if words.ways and way not in words.ways:
                continue
            log = bench.points(kinds)
            for at in chosen(len(log), words.sample, rng):
                try:
                    yield name, way, log[at - 1], bench.fail(way, at)
                except BrokenError as broken:
                    if not words.go_on:
                        raise
                    yield name, way, log[at - 1], Outcome(error="BROKEN", message=str(broken))


def inside(words: argparse.Namespace) -> int:
    begun, broken = time.monotonic(), 0
    counts: Counter[tuple[str, str, str]] = Counter()
    with tempfile.TemporaryDirectory(prefix="fastmerge-faults-") as folder:
        try:
            for name, way, where, outcome in run_all(words, Path(folder).resolve()):
                counts[name, way, outcome.error or "went on"] += 1
                if outcome.error == "BROKEN":
                    broken += 1
                    print(f"BROKEN: {outcome.message}", flush=True)
                elif words.verbose:
                    print(f"{name}, {way}, {where}: {outcome.error} {outcome.message}", flush=True)
        except BrokenError as error:
            print(f"BROKEN: {error}")
            return 1
    for (name, way, error), count in sorted(counts.items()):
        print(f"{count:6}  {name}: {way}: {error}")
    seconds = time.monotonic() - begun
    print(f"{sum(counts.values())} faults in {seconds:.0f} s, {broken} broken")
    if words.save:
        from record import record

        rows = [(*key, count) for key, count in sorted(counts.items())]
        about = {"points of each": words.sample or "all", "faults": sum(counts.values())}
        about |= {"broken": broken, "seconds": round(seconds)}
        name = "faults-rooms" if words.only else "faults"
        record(name, "Faults", "| what runs | fault | ends with | faults |", rows, about)
    return broken > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sample", type=int, default=0, help="points of each kind; 0: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--interrupts", type=int, default=40, help="at random moments, of each")
    parser.add_argument("--only", action="append", help="a scenario")
    parser.add_argument("--ways", action="append", choices=WAYS)
    parser.add_argument("--save", action="store_true", help="the figures to results/faults")
    parser.add_argument("--go-on", action="store_true", help="past what is broken")
    parser.add_argument("--verbose", action="store_true")
    words = parser.parse_args()
    if "FAULTS_PRELOADED" in os.environ:
        return inside(words)
    source = Path(__file__).with_suffix(".c")
    with tempfile.TemporaryDirectory(prefix="fastmerge-shim-") as folder:
        shim = Path(folder) / "faults.so"
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, str(source), "-o", str(shim), *COMPILE], check=True)
        env = os.environ | {"LD_PRELOAD": str(shim), "FAULTS_PRELOADED": "1"}
        env |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *sys.argv], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

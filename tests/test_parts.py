"""A merge in parts: the bytes of one without, whatever is killed, and what is refused."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import fastmerge
from fastmerge import _C, FastmergeError, api
from fastmerge.compute.across import TILE_ENTRIES
from fastmerge.compute.cpu import cpu
from fastmerge.engine import window
from fastmerge.models.adapter import CONFIG, PREFIX, WEIGHTS
from fastmerge.output import claim, join, publish
from fastmerge.output.share import shares
from fastmerge.selection import INDEX, MAGNITUDE, MIXED, Sparsify
from tests import test_moe
from tests.test_low_precision import Formats, linear
from tests.tokenizer_models import Maker, trio_of
from tests.tokenizer_models import recipe as tokenizer_recipe

KILLS = int(os.environ.get("FASTMERGE_KILLS", "10"))  # at random moments; 60 takes half a minute
SHARD_BYTES = 12_000


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch) -> None:
    """Tensors as small as these share a turn: too few turns to be stopped in the middle."""
    monkeypatch.setattr(window, "_TURN_ITEMS", 1)


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def of_kind(kind: str, zoo) -> dict:
    """A recipe, whose output has several files of `SHARD_BYTES`."""
    base = zoo.base("first", layers=5)
    if kind == "ties of the whole model":
        return {
            "merge_method": "ties", "base_model": str(base), "dtype": "bfloat16",
            "models": [
                {"model": str(zoo.tune(base, name, seed=i)), "parameters": {"density": 0.3}}
                for i, name in enumerate(["one", "two"], 5)
            ],
            "parameters": {"trim": "model", "weight": 0.5, "rescale": True},
        }  # fmt: skip
    if kind == "codes":
        formats = Formats(zoo)
        x, y = formats.fp8("x", base), formats.fp8("y", zoo.tune(base, "one", seed=5))
        return linear(x, y, out_dtype="as_base")
    if kind == "experts":
        os.chdir(zoo.root)
        test_moe.models(zoo)
        return test_moe.recipe(architecture="mixtral", dtype="bfloat16")
    if kind == "tokenizers":
        trio = trio_of(Maker(zoo), "parts")
        return tokenizer_recipe(trio, tokenizer_source="union")
    if kind == "an adapter":
        rng = np.random.default_rng(3)
        module = f"{PREFIX}model.layers.1.self_attn.q_proj"
        factors = {"lora_A": (4, 32), "lora_B": (32, 4)}
        folder = zoo.root / "lora"
        folder.mkdir()
        save_file(
            {f"{module}.{n}.weight": rng.normal(size=s).astype("f4") for n, s in factors.items()},
            folder / WEIGHTS,
        )
        said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        said |= {"layers_to_transform": [1]}
        (folder / CONFIG).write_text(json.dumps(said))
        return linear(f"{base}+{folder}", zoo.tune(base, "one", seed=5))
    return linear(base, zoo.tune(base, "one", seed=5), dtype="float32")


KINDS = ["linear", "ties of the whole model", "codes", "experts", "tokenizers", "an adapter"]


def in_parts(recipe, out: Path, count: int, **options) -> None:
    for number in random.Random(count).sample(range(1, count + 1), count):
        fastmerge.merge(recipe, out, part=(number, count), **options)


def left(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.glob(f".{out.name}.*"))


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_parts_makes_the_same_bytes(zoo, monkeypatch, kind: str) -> None:
    monkeypatch.chdir(zoo.root)
    recipe, options = of_kind(kind, zoo), {"max_shard_bytes": SHARD_BYTES}
    out = zoo.root / "out"
    one = fastmerge.merge(recipe, out, **options)
    wanted = tree(out)
    files = sum(name.endswith(".safetensors") for name in wanted)
    assert files >= 4
    # Planning tokenizers and experts takes longer than merging these.
    counts = (2, files + 3) if kind in ("experts", "tokenizers") else (1, 2, 3, 7, files + 5)
    for count in counts:
        shutil.rmtree(out)
        in_parts(recipe, out, count, **options)
        report = fastmerge.finish(out)
        assert tree(out) == wanted
        assert (report.parts, report.files) == (count, files)
        assert [note for note in report.notes if note not in one.notes] == []
        assert not left(out)
    assert fastmerge.verify(out, recipe, sample=None).whole


def test_one_file_has_one_part_with_work(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    fastmerge.merge(recipe, out)
    wanted = tree(out)
    shutil.rmtree(out)
    reports = [fastmerge.merge(recipe, out, part=f"{i}/3") for i in (1, 2, 3)]
    assert sorted(report.tensors > 0 for report in reports) == [False, False, True]
    fastmerge.finish(out)
    assert tree(out) == wanted


def test_one_part_counts_for_all(zoo, monkeypatch) -> None:
    recipe, out = of_kind("ties of the whole model", zoo), zoo.root / "out"
    asked = []
    counted = fastmerge.compute.cpu.CpuBackend.select_across
    monkeypatch.setattr(
        "fastmerge.compute.cpu.CpuBackend.select_across",
        lambda *given: asked.append(1) or counted(*given),
    )
    in_parts(recipe, out, 3, max_shard_bytes=SHARD_BYTES)
    assert len(asked) == 1


@pytest.mark.parametrize("rule", [MIXED, INDEX])
def test_counts_of_pieces_are_the_counts_of_all(rule: int) -> None:
    """Few distinct magnitudes and many; any cut into pieces, counted in any order."""
    rng = np.random.default_rng(rule)
    for kinds in (1, 3, 60, 10**6):
        sizes = rng.integers(0, 70_000, 6)
        deltas = [(rng.integers(-kinds, kinds + 1, n) / 64).astype("f4") for n in sizes]
        views = [[_C.View(d.ctypes.data, d.size, "F32", d)] for d in deltas]
        zeros = [np.zeros(n, "f4") for n in sizes]
        bases = [_C.View(z.ctypes.data, z.size, "F32", z) for z in zeros]
        steps = [-(-int(n) // TILE_ENTRIES) * TILE_ENTRIES for n in sizes]
        origins = [sum(steps[:i]) for i in range(6)]
        spec = Sparsify(MAGNITUDE, int(0.3 * sizes.sum()), rule, rescale=True)
        given = (views, bases, origins, [spec])
        wanted = cpu(2).select_across(*given)
        for ends in ([6], [2, 6], [0, 0, 3, 3, 5, 6, 6], [1, 2, 3, 4, 5, 6]):
            passes = []

            def counted(pieces, count, passes=passes):
                order = rng.permutation(pieces)
                found = {int(piece): count(int(piece)) for piece in order}
                passes.append(pieces)
                return [found[piece] for piece in range(pieces)]

            assert cpu(2).select_across(*given, ends, counted) == wanted
            assert set(passes) == {len(ends)}
    with pytest.raises(ValueError, match="cut"):
        cpu(2).select_across(*given, [6], lambda *_: [b"short"])
    with pytest.raises(ValueError, match="one result per piece"):
        cpu(2).select_across(*given, [6], lambda *_: [])


@pytest.mark.parametrize("rule", [MIXED, INDEX])
@pytest.mark.parametrize("after", [1, 2])
def test_a_count_of_numbers_that_change_ends(rule: int, after: int) -> None:
    """A file that is torn or written to between two passes, which its reader tells afterwards."""
    size = 70_000
    delta, base = np.random.default_rng(0).integers(-3, 4, size).astype("f4"), np.zeros(size, "f4")
    views = [_C.View(each.ctypes.data, size, "F32", each) for each in (delta, base)]
    passes = []

    def counted(pieces, count):
        passes.append(pieces)
        assert len(passes) < 200
        found = [count(piece) for piece in range(pieces)]
        if len(passes) == after:
            delta[100:] = 0
        return found

    given = ([views[:1]], views[1:], [0], [Sparsify(MAGNITUDE, size // 3, rule)])
    assert len(cpu(1).select_across(*given, [1], counted)) == 1


def test_parts_at_once_share_the_counting(zoo) -> None:
    recipe, out = zoo.root / "recipe.yml", zoo.root / "out"
    recipe.write_text(json.dumps(of_kind("ties of the whole model", zoo)))
    fastmerge.merge(recipe, out, max_shard_bytes=SHARD_BYTES)
    wanted = tree(out)
    shutil.rmtree(out)
    commands = [
        [sys.executable, "-c", _PART, str(recipe), str(out), f"{i}/3", str(SHARD_BYTES)]
        for i in (1, 2, 3)
    ]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda command: killed(command, None), commands)) == [0, 0, 0]
    pieces = {path.name for path in zoo.root.glob(".out.fastmerge-parts/shared-*")}
    assert {f"shared-trims-0-0000{piece}" for piece in range(3)} < pieces
    fastmerge.finish(out)
    assert tree(out) == wanted


def test_shares_follow_the_bytes() -> None:
    assert shares([5] * 9, 4) == [range(2), range(2, 5), range(5, 7), range(7, 9)]
    assert shares([90, 5, 5], 2) == [range(1), range(1, 3)]
    assert shares([], 3) == shares([0], 1)[1:] + [range(0)] * 3
    rng = random.Random(1)
    for _ in range(200):
        costs = [rng.randrange(0, 50) for _ in range(rng.randrange(30))]
        count = rng.randrange(1, 40)
        found = shares(costs, count)
        assert [number for share in found for number in share] == list(range(len(costs)))
        most = max((sum(costs[number] for number in share) for share in found), default=0)
        assert most <= sum(costs) / count + max(costs, default=0)


# --- kills ---

_PART = """
import sys, time, fastmerge
from fastmerge.compute.across import TILE_ENTRIES
from fastmerge.compute.cpu import cpu
from fastmerge.engine import window
window._TURN_ITEMS = 1
recipe, out, part, size = sys.argv[1:]
print("start", flush=True)
slow = lambda *_: time.sleep(0.004)
if part == "finish":
    fastmerge.finish(out)
else:
    fastmerge.merge(recipe, out, part=part, max_shard_bytes=int(size), threads=1, progress=slow)
"""


def killed(command: list[str], seconds: float | None) -> int:
    """The exit code of the command, killed ``seconds`` after it has started."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        if seconds is not None:
            time.sleep(seconds)
            child.send_signal(signal.SIGKILL)
        said = child.communicate()[1].decode()
    assert child.returncode in (0, -signal.SIGKILL), said
    return child.returncode


def test_nothing_is_lost_whatever_is_killed(zoo) -> None:
    recipe, out, rng = zoo.root / "recipe.yml", zoo.root / "out", random.Random(7)
    recipe.write_text(json.dumps(of_kind("ties of the whole model", zoo)))
    fastmerge.merge(recipe, out, max_shard_bytes=SHARD_BYTES)
    wanted = tree(out)
    kills = 0
    while kills < KILLS:
        shutil.rmtree(out, ignore_errors=True)
        todo = ["1/3", "2/3", "3/3"]
        rng.shuffle(todo)
        for part in [*todo, "finish"]:
            command = [sys.executable, "-c", _PART, str(recipe), str(out), part, str(SHARD_BYTES)]
            for seconds in (0.5 * rng.random(), 0.25 * rng.random(), 0.25 * rng.random(), None):
                if not killed(command, seconds if kills < KILLS else None):
                    break
                kills += 1
                assert not out.exists() or (part == "finish" and tree(out) == wanted)
                if out.exists() and not left(out):
                    break  # killed after its last word: there is nothing to finish any more
        assert tree(out) == wanted
        assert not left(out)


def test_a_killed_part_goes_on(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"

    def stop(done: int, total: int, _name: str) -> None:
        folder = zoo.root / left(out)[0]
        noted = [file.read_text() for file in folder.glob("part-*") if file.is_file()]
        if done < total and any("checksum" in text for text in noted):
            raise KeyboardInterrupt

    options = {"max_shard_bytes": SHARD_BYTES, "part": (1, 2)}
    with pytest.raises(KeyboardInterrupt):
        fastmerge.merge(recipe, out, progress=stop, **options)
    report = fastmerge.merge(recipe, out, **options)
    assert 0 < report.resumed < report.tensors
    again = fastmerge.merge(recipe, out, **options)
    assert again.resumed == again.tensors == report.tensors and again.bytes_written == 0
    anew = fastmerge.merge(recipe, out, fresh=True, **options)
    assert anew.resumed == 0 and anew.bytes_written > 0


def test_finished_tensors_that_changed_are_merged_again(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    fastmerge.merge(recipe, out, max_shard_bytes=SHARD_BYTES)
    wanted = tree(out)
    shutil.rmtree(out)

    def stop(done: int, total: int, _name: str) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    options = {"max_shard_bytes": SHARD_BYTES, "part": (1, 1)}
    with pytest.raises(KeyboardInterrupt):
        fastmerge.merge(recipe, out, progress=stop, **options)
    run = next(zoo.root.glob(".out.fastmerge-parts/part-*.0001/*-00001-*"))
    data = bytearray(run.read_bytes())
    data[5000] ^= 1
    run.write_bytes(data)
    report = fastmerge.merge(recipe, out, **options)
    assert any("had changed on the disk" in note for note in report.notes)
    fastmerge.finish(out)
    assert tree(out) == wanted


# --- two at once, here and on other machines ---


def at_work(out: Path, number: int) -> Path:
    """The file of a run of a part that is at work on another machine, as far as it says."""
    folder = out.parent / f".{out.name}.fastmerge-parts"
    file = max(folder.glob(f"part-{number:05d}.*.run"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0] |= {"host": "elsewhere", "boot": "another", "pid": 1}
    kept = [line for line in lines if not isinstance(line, dict) or "run" in line]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return file


def test_two_runs_of_one_part_here(zoo) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    seen: list[str] = []

    def second(*_: object) -> None:
        if not seen:
            with pytest.raises(FastmergeError) as caught:
                fastmerge.merge(recipe, out, part=(1, 2))
            seen.append(str(caught.value))

    fastmerge.merge(recipe, out, part=(1, 2), progress=second)
    assert seen == [
        f"{out}: part 1/2: is at work already (process {os.getpid()} on {os.uname().nodename})"
    ]


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("renames", [True, False])
def test_a_run_that_ends_as_it_begins(zoo, monkeypatch, named: bool, renames: bool) -> None:
    """Its file was empty, so that the next run waited a minute for a sign of life of anybody."""
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    real = claim.take_name

    def interrupted(a: Path, b: Path) -> bool:
        if named:
            real(a, b)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(claim, "take_name", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fastmerge.merge(recipe, out, part=(1, 1))
    if not renames:  # as on NFS
        monkeypatch.setattr(claim, "take_name", lambda *_: False)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    fastmerge.merge(recipe, out, part=(1, 1))
    fastmerge.finish(out)
    assert not left(out)


@pytest.mark.parametrize("alive", [True, False])
def test_a_run_on_another_machine(zoo, monkeypatch, alive: bool) -> None:
    """Its clock does not matter: only whether its file grows while this one watches."""
    monkeypatch.setattr(claim, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(claim, "_LOOK_SECONDS", 0.05)
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    options = {"max_shard_bytes": SHARD_BYTES, "part": (1, 1)}
    fastmerge.merge(recipe, out, **{**options, "part": None})
    wanted = tree(out)
    shutil.rmtree(out)

    def stop(done: int, total: int, _name: str) -> None:
        if done > total / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastmerge.merge(recipe, out, progress=stop, **options)
    file = at_work(out, 1)
    os.utime(file, (4e9, 4e9))  # a clock that is decades ahead
    if alive:
        timer = threading.Timer(0.3, lambda: file.open("a").write('{"beat": 1}\n'))
        timer.start()
        with pytest.raises(FastmergeError, match=r"at work already \(process 1 on elsewhere"):
            fastmerge.merge(recipe, out, **options)
        timer.join()
        return
    old = file.with_suffix("")
    shards = {path.name for path in old.iterdir()}
    stale = {name: (old / name).open("r+b") for name in shards}
    report = fastmerge.merge(recipe, out, **options)
    assert 0 < report.resumed < report.tensors
    done = {r["name"] for r in _resumed_shards(out, report)}
    for name in shards - done:  # it was not dead, and writes on: into files of its own
        stale[name].seek(0)
        stale[name].write(b"\xff" * 100)
        stale[name].flush()
    fastmerge.finish(out)
    assert tree(out) == wanted


def test_machines_without_locks_and_with_clocks_of_their_own(zoo, monkeypatch) -> None:
    """Years apart, forwards and back; a lock that is asked for fails, as on a mount without any."""
    recipe, out = of_kind("ties of the whole model", zoo), zoo.root / "out"
    options = {"max_shard_bytes": SHARD_BYTES}
    fastmerge.merge(recipe, out, **options)
    wanted = tree(out)
    shutil.rmtree(out)
    own, now = os.uname(), time.time

    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, refuses)
    for number, years in ((2, 30), (3, -20), (1, 0)):
        named = os.uname_result((own[0], f"host{number}", *own[2:]))
        monkeypatch.setattr(os, "uname", lambda named=named: named)
        monkeypatch.setattr(time, "time", lambda years=years: now() + years * 365 * 86400)
        fastmerge.merge(recipe, out, part=(number, 3), **options)
        for path in zoo.root.glob(".out.fastmerge-parts/**/*"):
            os.utime(path, (now() + years * 365 * 86400,) * 2)
    fastmerge.finish(out)
    assert tree(out) == wanted and not left(out)


def _resumed_shards(out: Path, report) -> list[dict]:
    """The files that the run took over whole."""
    folder = out.parent / f".{out.name}.fastmerge-parts"
    run = folder / "part-00001.0002.run"
    lines = [json.loads(line) for line in run.read_text().splitlines()]
    names = [line[0] for line in lines if isinstance(line, list)][: report.resumed]
    index = json.loads((folder / "plan/files/model.safetensors.index.json").read_text())
    return [{"name": index["weight_map"][name]} for name in names]


def test_a_run_that_lost_its_part_stops(zoo, monkeypatch) -> None:
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.02)
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    folder = zoo.root / ".out.fastmerge-parts"

    def overtaken(*_: object) -> None:
        if not (folder / "part-00001.0002.run").exists():
            (folder / "part-00001.0002.run").touch()
            time.sleep(0.1)

    with pytest.raises(FastmergeError, match="part 1/1: another run took over"):
        fastmerge.merge(recipe, out, part=(1, 1), progress=overtaken)


def test_two_finishes_at_once(zoo, monkeypatch) -> None:
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    in_parts(recipe, out, 2, max_shard_bytes=SHARD_BYTES)
    said: list[str] = []

    def second(*given):
        options = {"part": "2/2", "fresh": True, "max_shard_bytes": SHARD_BYTES}
        for call in (lambda: fastmerge.finish(out), lambda: api.merge(recipe, out, **options)):
            with pytest.raises(FastmergeError) as caught:
                call()
            said.append(str(caught.value))
        return publish.publish(*given)

    monkeypatch.setattr(join, "publish", second)
    fastmerge.finish(out)
    assert said[0].startswith(f"{out}: finish: is at work already (process ")
    assert said[1].startswith(f"{out}: part 2/2: the parts are being finished (process ")
    assert fastmerge.verify(out).whole
    with pytest.raises(FastmergeError, match="is there already, and no part lies beside it"):
        fastmerge.finish(out)


@pytest.mark.parametrize("exchange", [True, False])
def test_finish_replaces_a_model_whole(zoo, monkeypatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    fastmerge.merge({**recipe, "dtype": "bfloat16"}, out)
    in_parts(recipe, out, 2, overwrite=True)
    old = tree(out)
    with pytest.raises(FastmergeError, match="exists; choose another output or add overwrite=True"):
        fastmerge.finish(out)
    assert tree(out) == old
    fastmerge.finish(out, overwrite=True)
    assert tree(out) != old and not left(out)


@pytest.mark.parametrize("step", range(8))
def test_finish_killed_at_any_step(zoo, monkeypatch, step: int) -> None:
    """At each rename and removal, of a finish that replaces a model without an exchange."""
    recipe, out = of_kind("linear", zoo), zoo.root / "out"
    fastmerge.merge(recipe, out, max_shard_bytes=SHARD_BYTES)
    wanted = tree(out)
    shutil.rmtree(out)
    fastmerge.merge({**recipe, "dtype": "bfloat16"}, out)
    old = tree(out)
    in_parts(recipe, out, 2, overwrite=True, max_shard_bytes=SHARD_BYTES)
    monkeypatch.setattr(publish, "exchange", lambda *_: False)
    steps = [0]

    class Killed(BaseException):
        pass

    def counted(real):
        def wrapper(*given, **named):
            found = real(*given, **named)
            steps[0] += 1
            if steps[0] > 2 * step:
                raise Killed
            return found

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        try:
            fastmerge.finish(out, overwrite=True)
        except Killed:
            assert not out.exists() or tree(out) in (old, wanted)
    with suppress(FastmergeError):  # it had ended before it was killed
        fastmerge.finish(out, overwrite=True)
    assert tree(out) == wanted and not left(out)

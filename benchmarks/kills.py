"""SIGKILL at random moments: nothing is lost or visible half-written, and the bytes are the same.

    python benchmarks/kills.py                          60 kills, 20 of them of Ray's: ten minutes
    python benchmarks/kills.py --only part finish --kills 10 --seed 3

Kinds, and what is killed:

- merge, part, finish: the process of a whole merge, of one of three parts, of `finish`;
- worker: what works on a part for a cluster; node: one of its nodes; driver: who asked it;
- evaluator: what measures a state of a walk for a cluster; walk: who walks.

Each runs once undisturbed, for its bytes and its time T, then again and again, each time killed
after a time drawn from (0, T), until the kills are spent and a run ends by itself. After every kill
the output must be absent, or what it was, or whole. What a run had noted as finished (tensors in a
part's journal, scores in a walk's) must be there for the next one, and is counted. At the end the
folder must be that of the undisturbed run, byte for byte, with nothing beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

KILLS = {
    "merge": 12, "part": 16, "finish": 8,
    "worker": 8, "node": 3, "driver": 5, "evaluator": 4, "walk": 4,
}  # fmt: skip
ON_RAY = ("worker", "node", "driver", "evaluator")
NODES = 2  # beside the head
PARTS, LAYERS, WIDTH = 3, 24, 160
SHARD_BYTES = 1_000_000
STARTED = "started"
_MEASURING = "_Evaluator.measure"  # the title of a worker that does

# What is killed: imports first, as a kill in the middle of them shows nothing; a word; the work, a
# little slower than it would be, for it to be in the middle of something.
CHILD = """
import json, sys, time
import fastmerge
from fastmerge import retrograde
kind, options = sys.argv[1], json.loads(sys.argv[2])
print("started", flush=True)
slow = lambda *_: time.sleep(0.002)
if kind == "finish":
    report = fastmerge.finish(options["out"])
elif kind == "walk":
    retrograde.run(options.pop("schedule"), options.pop("out"), **options)
else:
    recipe, out = options.pop("recipe"), options.pop("out")
    report = fastmerge.merge(recipe, out, progress=slow, threads=1, **options)
    print(json.dumps({"resumed": report.resumed}), flush=True)
"""
SCORER = """
import time

def score(model):
    time.sleep(0.15)
    return float(sum(x.double().abs().sum() for x in model.parameters()) % 100)
"""


class BrokenError(Exception):
    """A promise that a kill breaks."""


@dataclass
class Count:
    """What came of the kills of one kind."""

    kills: int = 0
    seen: dict[str, int] = field(default_factory=dict)  # what the output was then
    noted: int = 0  # results that were finished when it was killed
    kept: int = 0  # of those, what the next run had
    runs: int = 0  # that ended by themselves, with the bytes of the undisturbed one


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=KILLS, default=list(KILLS))
    parser.add_argument("--kills", type=int, help="of each kind; by default 60 in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--record", action="store_true", help="into results/kills.*, where other kinds stay"
    )
    options = parser.parse_args(words)
    counts: dict[str, Count] = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as made, ExitStack() as kept:
        here = Place(Path(made))
        if set(options.only) & set(ON_RAY):
            here.cluster = kept.enter_context(cluster())
        for kind in options.only:
            rng = random.Random(f"{options.seed} {kind}")
            many = KILLS[kind] if options.kills is None else options.kills
            begun = time.perf_counter()
            counts[kind] = RUNS[kind](here, rng, many)
            print(kind, counts[kind], f"{time.perf_counter() - begun:.0f} s", flush=True)
    total = sum(c.kills for c in counts.values())
    print(f"{total} kills, nothing lost, nothing half-written")
    if options.record:
        write(counts, options.seed)


def write(counts: dict[str, Count], seed: int) -> None:
    """The rows of these kinds into the table."""
    from record import HERE, record

    path = HERE / "results" / "kills.json"
    known = {row[0]: row for row in json.loads(path.read_text())["result"]} if path.exists() else {}
    for kind, c in counts.items():
        seen = ", ".join(f"{many} {what}" for what, many in sorted(c.seen.items())) or "-"
        known[kind] = [kind, c.kills, seen, c.noted, c.kept, c.runs, seed]
    rows = [known[kind] for kind in KILLS if kind in known]
    record(
        "kills", "SIGKILLs at random moments",
        "| killed | kills | its output then | results noted | kept by the next run | "
        "runs to the end, the same bytes | seed |",
        rows, {"kills": sum(row[1] for row in rows)},
    )  # fmt: skip


# --- models and folders ---


class Place:
    """The models of all runs, and the folders that they write."""

    def __init__(self, root: Path) -> None:
        self.root, self.cluster = root, None
        rng = np.random.default_rng(1)
        shapes = {
            f"model.layers.{i}.mlp.{name}_proj.weight": (WIDTH, WIDTH)
            for i in range(LAYERS) for name in ("up", "gate", "down")
        }  # fmt: skip
        base = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
        for model in ("base", "one", "two"):
            (root / model).mkdir()
            moved = {n: x + (model != "base") * 0.01 * rng.normal(size=x.shape).astype("f4")
                     for n, x in base.items()}  # fmt: skip
            save_file(moved, root / model / "model.safetensors")
            (root / model / "config.json").write_text('{"model_type": "llama"}')
        self.recipe = {
            "merge_method": "ties", "base_model": str(root / "base"),
            "models": [{"model": str(root / m), "parameters": {"density": 0.4}}
                       for m in ("one", "two")],
            "parameters": {"trim": "model", "weight": 0.5}, "dtype": "bfloat16",
        }  # fmt: skip

    def fresh(self, name: str) -> Path:
        """A folder for one run's output, which is called the same in each: its card says so."""
        shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / name).mkdir()
        return self.root / name / "out"


def tree(folder: Path) -> dict[str, str]:
    """Every file below, with its digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def look(count: Count, out: Path, wanted: dict[str, str]) -> None:
    """The output is absent or whole."""
    found = "whole" if out.exists() else "absent"
    if out.exists() and tree(out) != wanted:
        raise BrokenError(f"{out}: is there and is not whole")
    count.seen[found] = count.seen.get(found, 0) + 1


def ended(count: Count, out: Path, wanted: dict[str, str]) -> None:
    """A run that ended by itself has made what the undisturbed one made, and left nothing."""
    beside = [path.name for path in out.parent.iterdir() if path != out]
    if tree(out) != wanted or beside:
        raise BrokenError(f"{out}: other bytes than the undisturbed run's, or {beside} beside it")
    count.runs += 1


# --- processes ---


def start(kind: str, **options: Any) -> subprocess.Popen[str]:
    """The child, after its imports."""
    words = [sys.executable, "-c", CHILD, kind, json.dumps(options, default=str)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    while (line := child.stdout.readline()) and line.strip() != STARTED:
        pass
    return child


def wait(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What a child says that ends by itself."""
    said, wrong = child.communicate()
    if child.returncode:
        raise BrokenError(f"a run after a kill failed: {wrong.strip()[-500:]}")
    lines = [line for line in said.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def timed(kind: str, **options: Any) -> float:
    """The seconds of an undisturbed run."""
    child = start(kind, **options)
    begun = time.perf_counter()
    wait(child)
    return time.perf_counter() - begun


def killed(child: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the child was at work when it was killed."""
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


# --- merges and parts ---


def merges(here: Place, rng: random.Random, kills: int) -> Count:
    count, options = Count(), {"recipe": here.recipe, "max_shard_bytes": SHARD_BYTES}
    out = here.fresh("plain")
    most = timed("merge", out=out, **options)
    wanted = tree(out)
    while count.kills < kills:
        out = here.fresh("merge")
        while count.kills < kills and killed(
            start("merge", out=out, **options), most * rng.random()
        ):
            count.kills += 1
            look(count, out, wanted)
        if not out.exists():
            wait(start("merge", out=out, **options))
        ended(count, out, wanted)
    return count


def parts(here: Place, rng: random.Random, kills: int) -> Count:
    count, options = Count(), {"recipe": here.recipe, "max_shard_bytes": SHARD_BYTES}
    wait(start("merge", out=here.fresh("plain"), **options))
    wanted = tree(here.root / "plain" / "out")
    most = timed("part", out=here.fresh("part"), part=f"1/{PARTS}", **options)
    while count.kills < kills:
        out = here.fresh("part")
        numbers = list(range(1, PARTS + 1))
        rng.shuffle(numbers)
        for number in numbers:
            own = {**options, "out": out, "part": f"{number}/{PARTS}"}
            noted = 0
            while count.kills < kills and killed(start("part", **own), most * rng.random()):
                count.kills += 1
                look(count, out, wanted)
                noted = noted_by(out, number)
            resumed = wait(start("part", **own)).get("resumed", 0)
            if resumed < noted:
                raise BrokenError(f"part {number}: {noted} tensors noted, {resumed} kept")
            count.noted, count.kept = count.noted + noted, count.kept + min(noted, resumed)
        wait(start("finish", out=out))
        ended(count, out, wanted)
    return count


def noted_by(out: Path, number: int) -> int:
    """How many tensors the last run of a part had noted as finished."""
    runs = sorted(out.parent.glob(f".{out.name}.*/part-{number:05d}.*.run"))
    lines = runs[-1].read_bytes().split(b"\n")[:-1] if runs else []
    return sum(line.startswith(b"[") for line in lines)


def finishes(here: Place, rng: random.Random, kills: int) -> Count:
    count, options = Count(), {"recipe": here.recipe, "max_shard_bytes": SHARD_BYTES}
    wait(start("merge", out=here.fresh("plain"), **options))
    wanted = tree(here.root / "plain" / "out")
    most = 0.0
    while count.kills < kills:
        out = here.fresh("finish")
        for number in range(1, PARTS + 1):
            wait(start("part", out=out, part=f"{number}/{PARTS}", **options))
        if not most:
            most = timed("finish", out=out)
            continue
        while count.kills < kills and killed(start("finish", out=out), most * rng.random()):
            count.kills += 1
            look(count, out, wanted)
            if out.exists():
                break  # it may say that nothing is left to finish
        if left(out):
            wait(start("finish", out=out))
        ended(count, out, wanted)
    return count


def left(out: Path) -> list[Path]:
    """What lies beside the output."""
    return [path for path in out.parent.iterdir() if path != out]


# --- a cluster ---


@contextmanager
def cluster() -> Iterator[Any]:
    """A head and its nodes, of one CPU each, in processes of their own."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        for _ in range(NODES):
            found.add_node(num_cpus=1)
        yield found
    finally:
        found.shutdown()


def workers(here: Place, name: str) -> list[int]:
    """The processes of the cluster that are called so."""
    own = {node.all_processes["raylet"][0].process.pid for node in here.cluster.list_all_nodes()}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            title = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        if parent in own and title.startswith(f"ray::{name}".encode()):
            found.append(int(entry.name))
    return found


def kill_one(here: Place, rng: random.Random, name: str) -> bool:
    """Kills a worker that is at it, if there is one."""
    there = workers(here, name)
    if not there:
        return False
    try:
        os.kill(rng.choice(there), signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_node(here: Place, rng: random.Random, name: str) -> bool:
    """Kills a node while a worker of the name is at work somewhere."""
    if not workers(here, name):
        return False
    here.cluster.remove_node(rng.choice(list(here.cluster.worker_nodes)), allow_graceful=False)
    return True


def on_cluster(
    here: Place, rng: random.Random, kills: int, kill: Callable[[Place, random.Random, str], bool]
) -> Count:
    count, options = Count(), {"recipe": here.recipe, "max_shard_bytes": SHARD_BYTES}
    wait(start("merge", out=here.fresh("plain"), **options))
    wanted = tree(here.root / "plain" / "out")
    options["cluster"] = here.cluster.address
    while count.kills < kills:
        out = here.fresh("cluster")
        child, own = start("merge", out=out, **options), 0
        while child.poll() is None:
            time.sleep(0.3 * rng.random())
            # Parts are tried four times: two kills in a run cannot use that up.
            if own < 2 and count.kills < kills and kill(here, rng, "_merge_part"):
                own, count.kills = own + 1, count.kills + 1
                look(count, out, wanted)
                if len(here.cluster.worker_nodes) < NODES:
                    here.cluster.add_node(num_cpus=1)
        wait(child)
        ended(count, out, wanted)
    return count


def drivers(here: Place, rng: random.Random, kills: int) -> Count:
    count, options = Count(), {"recipe": here.recipe, "max_shard_bytes": SHARD_BYTES}
    wait(start("merge", out=here.fresh("plain"), **options))
    wanted = tree(here.root / "plain" / "out")
    options["cluster"] = here.cluster.address
    most = timed("merge", out=here.fresh("driver"), **options)
    while count.kills < kills:
        out = here.fresh("driver")
        while count.kills < kills and killed(
            start("merge", out=out, **options), most * rng.random()
        ):
            count.kills += 1
            look(count, out, wanted)
        if not out.exists() or left(out):
            wait(start("merge", out=out, **options))
        ended(count, out, wanted)
    return count


# --- walks ---


def schedule_of(here: Place) -> dict[str, Any]:
    """Four steps over llamas of two layers, measured by `SCORER`."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    folder = here.root / "walked"
    if not folder.exists():
        config = LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        for number in range(3):
            set_seed(number)
            LlamaForCausalLM(config).save_pretrained(folder / f"m{number}")
        (folder / "scoring.py").write_text(SCORER)
    return {
        "baseline": str(folder / "m0"), "pool": [str(folder / "m1"), str(folder / "m2")],
        "seed": 3, "accept": {"rule": "always"}, "compare": {"methods": ["linear"], "budget": 4},
        "schedule": {
            "cycles": 2, "degrade": {"partner": "next", "method": "slerp", "t": 0.3},
            "retrace": {"toward": "baseline", "method": "ties", "t": 0.4, "density": 0.6},
        },
        "evaluate": {"callable": "scoring:score"},
    }  # fmt: skip


def schedule_file(here: Place) -> Path:
    path = here.root / "walked" / "walk.json"
    text = json.dumps(schedule_of(here))
    path.write_text(text)
    return path


def walks(here: Place, rng: random.Random, kills: int, *, evaluators: bool) -> Count:
    count, options = Count(), {"schedule": schedule_file(here), "threads": 1}
    most = timed("walk", out=here.fresh("plain"), **options)
    wanted = tree(here.root / "plain" / "out")
    if evaluators:
        options["cluster"] = here.cluster.address
    while count.kills < kills:
        out = here.fresh("walk")
        scores, own = 0, 0
        while True:
            resume = (out / "run.json").exists()
            child = start("walk", out=out, resume=resume, **options)
            if evaluators:
                while child.poll() is None:
                    time.sleep(0.5 * rng.random())
                    if (
                        own < 2
                        and count.kills < kills
                        and kill_one(here, rng, "_Evaluator.measure")
                    ):
                        own, count.kills = own + 1, count.kills + 1
                break
            if count.kills >= kills or not killed(child, most * rng.random()):
                break
            count.kills += 1
            there = (out / "model").exists() and tree(out / "model") != {
                name[6:]: digest for name, digest in wanted.items() if name.startswith("model/")
            }
            if there:
                raise BrokenError(f"{out}: the model is there and is not whole")
            scores = max(scores, scored(out))
        wait(child)
        if scored(out) < scores:
            raise BrokenError(f"{out}: {scores} scores noted, {scored(out)} kept")
        count.noted, count.kept = count.noted + scores, count.kept + scores
        ended(count, out, wanted)
    return count


def scored(out: Path) -> int:
    """How many scores the journal of a walk has."""
    journal = out / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return sum(b'"score:' in line for line in lines)


RUNS: dict[str, Callable[[Place, random.Random, int], Count]] = {
    "merge": merges,
    "part": parts,
    "finish": finishes,
    "worker": lambda here, rng, kills: on_cluster(here, rng, kills, kill_one),
    "node": lambda here, rng, kills: on_cluster(here, rng, kills, kill_node),
    "driver": drivers,
    "evaluator": lambda here, rng, kills: walks(here, rng, kills, evaluators=True),
    "walk": lambda here, rng, kills: walks(here, rng, kills, evaluators=False),
}


if __name__ == "__main__":
    main()

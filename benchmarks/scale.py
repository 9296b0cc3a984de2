"""How long a merge of a very large model takes, on paper: from figures that a small machine gives.

    python benchmarks/scale.py                            # the tables of docs/scale.md
    python benchmarks/scale.py --model 405b --method ties --storage 5 --nodes 8
    python benchmarks/scale.py --bytes 1.2e12 --tensors 60000 --models 3 --storage 10

Each of N nodes merges one part: it plans (every header, every tensor), then reads, computes and
writes at once, so that the whole takes the longest of: all bytes through the shared storage, the
largest part's through its node's network, its arithmetic, its tensors' own costs. One `finish`
follows. Reads are counted once: a second pass over a tensor finds it in memory. Every figure is an
option, with what was measured as default.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

SHARD_BYTES = 5e9  # --max-shard-size: what parts are made of
LIMITS = ("storage", "network", "processor", "tensors")


@dataclass(frozen=True)
class Model:
    """``nbytes`` of tensors, as stored."""

    nbytes: float
    tensors: int


MODELS = {  # bytes: the published indices' total_size; DeepSeek-V3's files hold fp8 and scales
    "70b": Model(141.1e9, 723),
    "405b": Model(811.7e9, 1137),
    "671b": Model(688.6e9, 91_000),
}
# CPU seconds for each GB that is read or written, on one core: merge_model.py at 1.1 B
# (results/merge_model-1.1b.json, without the start); average: average.py, 8 models.
CPU_SECONDS_PER_GB = {
    "linear": 0.10,
    "average": 0.14,
    "slerp": 0.13,
    "ties": 0.23,
    "dare_ties": 0.22,
}


@dataclass(frozen=True)
class Figures:
    """What was measured, and what the machines are. Seconds; GB are 1e9 bytes."""

    start: float = 0.15  # process, imports, a merge of nothing (startup.py)
    plan_tensor: float = 21e-6  # many_tensors.py, 90 000 tensors
    merge_tensor: float = 53e-6  # beyond its bytes: the same
    finish_tensor: float = 9e-6  # `finish` of the same model in two parts
    cpu_gb: float = CPU_SECONDS_PER_GB["linear"]
    cores: int = 16  # of a node
    network: float = 3.0  # GB/s that one node moves, both ways together
    storage: float = 5.0  # GB/s that all nodes get together


@dataclass(frozen=True)
class Estimate:
    """Of one merge in parts: minutes from the first process's start to a folder under its name."""

    nodes: int
    minutes: float
    limit: str  # what sets the pace: one of LIMITS
    part_gb: float  # that the largest part moves


def estimate(model: Model, models: int, nodes: int, figures: Figures, out: float = 1) -> Estimate:
    """Of a merge of ``models`` like ``model`` on ``nodes``; ``out``: the output's bytes over one
    model's.
    """
    moved = model.nbytes * (models + out) / 1e9
    shards = max(1, math.ceil(model.nbytes * out / SHARD_BYTES))
    share = math.ceil(shards / nodes) / shards  # parts are whole shards
    part = moved * share
    seconds = {
        "storage": moved / figures.storage,
        "network": part / figures.network,
        "processor": part * figures.cpu_gb / figures.cores,
        "tensors": model.tensors * share * figures.merge_tensor,
    }
    limit = max(seconds, key=seconds.__getitem__)
    planned = figures.start + model.tensors * figures.plan_tensor
    finished = figures.start + model.tensors * figures.finish_tensor
    return Estimate(nodes, (planned + seconds[limit] + finished) / 60, limit, part)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown, figures to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def minutes(value: float) -> str:
    return f"{value * 60:.0f} s" if value < 2 else f"{value:.0f} min"


def overview(figures: Figures) -> str:
    """Every model and job at 1, 5 and 40 GB/s, on 1 and 8 nodes, with the first letter of what sets
    the pace.
    """
    jobs = [("linear", 2), ("average", 8), ("ties", 3)]
    rows = []
    for name, model in MODELS.items():
        for method, models in jobs:
            row = [f"{name}, {method} of {models}"]
            row.append(f"{model.nbytes * (models + 1) / 1e12:.2f} TB")
            for storage in (1, 5, 40):
                for nodes in (1, 8):
                    own = replace(figures, storage=storage, cpu_gb=CPU_SECONDS_PER_GB[method])
                    found = estimate(model, models, nodes, own)
                    row.append(f"{minutes(found.minutes)} ({found.limit[0]})")
            rows.append(row)
    head = ["merge", "moved"]
    head += [f"{s} GB/s, {n} node{'s'[: n > 1]}" for s in (1, 5, 40) for n in (1, 8)]
    return table(head, rows)


def growth(model: Model, models: int, figures: Figures, out: float = 1) -> str:
    """One merge on ever more nodes."""
    rows = []
    for nodes in (1, 2, 4, 8, 16, 32, 64, 128):
        found = estimate(model, models, nodes, figures, out)
        rows.append([str(nodes), minutes(found.minutes), found.limit, f"{found.part_gb:.0f} GB"])
    return table(["nodes", "time", "limit", "largest part moves"], rows)


def a_number(text: str) -> float:
    """That something can be divided by."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def a_count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", choices=MODELS)
    which.add_argument("--bytes", type=a_number, help="of one model, in place of --model")
    of_one = {
        "tensors": parser.add_argument("--tensors", type=a_count, help="of --bytes; default 1000"),
        "models": parser.add_argument("--models", type=a_count, help="that are merged; default 2"),
        "method": parser.add_argument("--method", choices=CPU_SECONDS_PER_GB),
        "nodes": parser.add_argument("--nodes", type=a_count, help="default: a table over them"),
        "out": parser.add_argument(
            "--out", type=a_number, help="bytes of the output over one model's; default 1"
        ),
    }
    for field in fields(Figures):
        flag = f"--{field.name.replace('_', '-')}"
        kind = a_count if field.name == "cores" else a_number
        action = parser.add_argument(flag, type=kind, help=f"default {field.default}")
        if field.name in ("storage", "cpu_gb"):  # the tables of all models have several
            of_one[field.name] = action
    options = parser.parse_args()
    given = {f.name: getattr(options, f.name) for f in fields(Figures)}
    figures = replace(Figures(), **{name: own for name, own in given.items() if own is not None})
    if options.model is None and options.bytes is None:
        for name, action in of_one.items():
            if getattr(options, name) is not None:
                parser.error(f"{action.option_strings[0]}: of which model? give --model or --bytes")
        print(overview(figures))
        for storage in (5, 40):
            print(f"\n671b, linear of 2, storage of {storage} GB/s:\n")
            print(growth(MODELS["671b"], 2, replace(figures, storage=storage)))
        return
    if options.model is not None and options.tensors is not None:
        parser.error("--tensors: of --bytes alone; those of --model are known")
    if given["cpu_gb"] is None and options.method is not None:
        figures = replace(figures, cpu_gb=CPU_SECONDS_PER_GB[options.method])
    own = Model(options.bytes or 0, options.tensors or 1000)
    model, many, out = MODELS.get(options.model, own), options.models or 2, options.out or 1
    if options.nodes is None:
        print(growth(model, many, figures, out))
        return
    found = estimate(model, many, options.nodes, figures, out)
    print(f"{minutes(found.minutes)}; limit: {found.limit}; a part moves {found.part_gb:.0f} GB")


if __name__ == "__main__":
    main()

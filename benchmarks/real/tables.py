"""Tables from the scores by item: ``python benchmarks/real/tables.py [results/PROFILE]``.

Reads record.json, writes tables.md beside it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent / "retrograde"))

from contest import BUDGET, COLLAPSED, OPTIMISERS, WALKS
from items import COLUMNS, SKILLS, SOURCES
from stats import across_seeds

from fastmerge.evaluation.scores import Scores, TaskScore
from fastmerge.evaluation.statistics import Interval, difference, holm, interval

HERE = Path(__file__).resolve().parent
RESAMPLES = 10_000
SEED = 16
Items = Mapping[str, Sequence[float]]  # by column of a table, 0 to 1

LABELS = {
    "start": "baseline",
    "uniform": "uniform average",
    "line_search": "line search",
    "random_step": "random steps, retraced",
    "anchored": "anchored one-shot",
    "walk_linear": "DKE-RS linear",
    "walk_slerp": "DKE-RS SLERP",
    "walk_ties": "DKE-RS TIES",
    "walk_dare_ties": "DKE-RS DARE-TIES",
    "walk_slerp_layers": "DKE-RS SLERP, fractions by layer",
    "walk_slerp_best": "DKE-RS SLERP, to the best state",
    "walk_slerp_previous": "DKE-RS SLERP, to the state before",
    "walk_slerp_improve": "DKE-RS SLERP, accept if improved",
    "walk_slerp_anneal": "DKE-RS SLERP, anneal",
}
INTRODUCTION = """\
Written by `tables.py` from `record.json`; PROTOCOL.md, two folders up, says what the rows are.
Percent; differences in points, paired over items; [..] is the 95 % bootstrap interval over items.
"""


def label(family: str) -> str:
    """What a row is called."""
    return LABELS.get(family, family.replace("_", " "))


class Record:
    """One run's scores by item."""

    def __init__(self, file: Path) -> None:
        self.plain: dict[str, Any] = json.loads(file.read_text())
        self.states: dict[str, Any] = self.plain["states"]
        self.rounds: list[dict[str, Any]] = self.plain["rounds"]
        self.leaders: list[dict[str, Any]] = self.plain.get("leaders", [])

    def blocks(self, key: str) -> set[str]:
        """The blocks of test items that a model was measured on."""
        return self.states.get(key, {"scores": {}})["scores"].keys() - {"steer"}

    def tested(self, key: str, blocks: set[str] | None = None) -> Items:
        """A model's test items by column, those of all ``blocks`` or of these; MMLU's subjects
        pooled.
        """
        found: dict[str, list[float]] = {}
        titles = {source.task: source.column for source in SOURCES}
        for block in sorted(self.blocks(key) if blocks is None else blocks):
            for task, values in self.states[key]["scores"][block].items():
                name = "mmlu" if task.startswith("mmlu_") else task
                found.setdefault(titles.get(name, name), []).extend(values)
        return found

    def pair(self, a: str, b: str) -> tuple[Items, Items]:
        """Two models' test items of the blocks that both were measured on."""
        both = self.blocks(a) & self.blocks(b)
        return self.tested(a, both), self.tested(b, both)

    def steering(self, key: str) -> Items:
        """A model's steering items by task."""
        return self.states[key]["scores"]["steer"]


def scores(items: Items) -> Scores:
    """The product's own type, for its statistics."""
    return Scores(
        {
            name: TaskScore(100 * float(np.mean(v)), "", len(v), {"": tuple(100 * x for x in v)})
            for name, v in items.items()
        }
    )


def apart(ours: Items, theirs: Items, names: Sequence[str]) -> Interval | None:
    """ours - theirs over those of ``names`` that both have."""
    shared = [n for n in names if n in ours and n in theirs]
    a, b = (scores({name: items[name] for name in shared}) for items in (ours, theirs))
    return difference(a, b, resamples=RESAMPLES, seed=SEED) if shared else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def points(found: Interval | None) -> str:
    if found is None:
        return "–"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def leaderboard(record: Record) -> str:
    """The source's row: six tasks and their average, then the texts."""
    rows = [("baseline", record.plain["singles"]["start"])]
    rows += [(n, key) for n, key in record.plain["singles"].items() if n != "start"]
    for leader, what in zip(record.leaders, ("best schedule", "best one-shot"), strict=False):
        rows.append((f"{what} ({label(leader['family'])})", leader["entry"]))
        if "linear" in leader:
            rows.append(("its own linear one-shot", leader["linear"]))
        if leader.get("own", leader.get("linear")) != leader.get("linear"):
            rows.append(("its own one-shot of the same method", leader["own"]))
    for family in ("uniform", "random_step"):
        if record.rounds and family in record.rounds[0]:
            rows.append((label(family), record.rounds[0][family]["entry"]))
    lines = []
    rows = [(name, key) for name, key in rows if record.blocks(key)]
    blocks = set.intersection(*(record.blocks(key) for _, key in rows)) if rows else set()
    for name, key in rows:
        found = record.tested(key, blocks)
        cells = [f"{100 * np.mean(found[c]):.1f}" if c in found else "–" for c in COLUMNS]
        known = scores({c: found[c] for c in COLUMNS if c in found})
        around = interval(known, resamples=RESAMPLES, seed=SEED)
        average = f"{known.value:.2f}"
        if around is not None:
            average += f" [{around.low:.1f}, {around.high:.1f}]"
        if len(known.tasks) < len(COLUMNS):
            average += f" of {len(known.tasks)}"
        texts = scores({s: found[s] for s in SKILLS if s in found})
        lines.append([name, *cells, average, f"{texts.value:.2f}"])
    counts = record.tested(rows[0][1], blocks) if rows else {}
    lines.append(["*items*", *(str(len(counts.get(c, ()))) for c in COLUMNS), "", str(
        sum(len(counts.get(s, ())) for s in SKILLS))])  # fmt: skip
    return table(["model", *COLUMNS, "average", "texts"], lines)


def primary(record: Record) -> str:
    """The best schedule minus what it must beat: on the tasks, on the texts; Holm within each."""
    if not record.leaders or record.leaders[0]["family"] not in WALKS:
        return "No schedule was tested.\n"
    ours = record.leaders[0]
    opponents = {"baseline": record.plain["singles"]["start"]}
    opponents["its own linear one-shot"] = ours["linear"]
    if ours["own"] != ours["linear"]:
        opponents["its own one-shot of the same method"] = ours["own"]
    if len(record.leaders) > 1:
        leader = record.leaders[1]
        opponents[f"the best one-shot ({label(leader['family'])})"] = leader["entry"]
    for family in ("uniform", "random_step"):
        if record.rounds and family in record.rounds[0]:
            opponents[label(family)] = record.rounds[0][family]["entry"]
    return _compared(record, [("", ours["entry"], name, key) for name, key in opponents.items()])


def optimised(record: Record) -> str:
    """Each round's best schedule minus each optimiser, which measured as much as all arms."""
    pairs = []
    for number, found in enumerate(record.rounds):
        own = [found[f] for f in WALKS if f in found]
        if own:
            best = max(own, key=lambda one: one["steer"])["entry"]
            others = [(label(f), found[f]["entry"]) for f in OPTIMISERS if f in found]
            pairs += [(f"round {number}", best, name, key) for name, key in others]
    pairs = [p for p in pairs if record.tested(p[1]) and record.tested(p[3])]
    return _compared(record, pairs) if pairs else "None was tested.\n"


def _compared(record: Record, pairs: Sequence[tuple[str, str, str, str]]) -> str:
    found = []
    for names in (COLUMNS, SKILLS):
        each = [apart(*record.pair(a, b), names) for _, a, _, b in pairs]
        same = [a == b for _, a, _, b in pairs]
        adjusted = holm(
            [math.nan if f is None or s else f.p for f, s in zip(each, same, strict=True)]
        )
        found.append(
            [
                "the same model" if s else points(f) + ("" if math.isnan(p) else f", p {p:.3f}")
                for f, s, p in zip(each, same, adjusted, strict=True)
            ]
        )
    rows = [
        [*([first] if first else []), second, *cells]
        for (first, _, second, _), *cells in zip(pairs, *found, strict=True)
    ]
    header = [*(["schedule"] if pairs and pairs[0][0] else []), "minus", "tasks", "texts"]
    return table([*header[:-2], "tasks, Holm's p", "texts, Holm's p"], rows)


def arms(record: Record) -> str:
    """Each arm's entry minus its own collapsed one-shot, where both were tested."""
    pairs = []
    for number, found in enumerate(record.rounds):
        for family in WALKS:
            if family in found:
                one = found[family]
                where = f"{label(family)}, round {number}"
                pairs.append((where, one["entry"], "own one-shot", one["own"]))
    pairs = [p for p in pairs if record.tested(p[1]) and record.tested(p[3])]
    return _compared(record, pairs) if pairs else "None was tested.\n"


def paths(record: Record) -> str:
    """All measured states of a walk minus their collapsed one-shots: steering items, no choice."""
    rows = []
    for collapsed, walk in COLLAPSED.items():
        every: list[list[Items]] = []
        for number, found in enumerate(record.rounds):
            # The linear arm's states are just the merges that SLERP's collapse to.
            is_slerp = collapsed == "collapsed_slerp" and collapsed not in found
            family = "walk_linear" if is_slerp else collapsed
            if family not in found or walk not in found:
                continue
            ours, theirs = (
                [record.steering(key) for key in found[name]["measured"]] for name in (walk, family)
            )
            means = [_mean(ours), _mean(theirs)]
            every.append(means)
            rows.append([label(walk), str(number), *_cells(means)])
        if len(every) > 1:
            means = [_mean(side) for side in zip(*every, strict=True)]
            rows.append([label(walk), "all", *_cells(means)])
    header = ["schedule", "round", "minus its one-shots", "texts alone"]
    return table(header, rows) if rows else "None.\n"


def _mean(states: Sequence[Items]) -> Items:
    """Item by item."""
    return {n: np.mean([state[n] for state in states], axis=0).tolist() for n in states[0]}


def _cells(means: Sequence[Items]) -> list[str]:
    return [points(apart(*means, part)) for part in (list(means[0]), SKILLS)]


def families(record: Record) -> str:
    """What each family entered: its steering score, its test average, over rounds."""
    rows = []
    start = record.plain["singles"]["start"]
    for family in dict.fromkeys(f for found in record.rounds for f in found):
        own = [found[family] for found in record.rounds if family in found]
        entries = list(dict.fromkeys(one["entry"] for one in own if record.blocks(one["entry"])))
        against = [apart(*record.pair(entry, start), COLUMNS) for entry in entries]
        cells = [points(found) for found in against]
        if len(entries) >= 3 and all(against):
            over = across_seeds([found.value for found in against if found is not None])
            cells.append(f"rounds {over.mean:+.2f} [{over.low:+.2f}, {over.high:+.2f}]")
        steer = ", ".join(f"{one['steer']:.2f}" for one in own)
        masks = [record.tested(key) for one in own for key in one.get("masks", ())]
        values = [
            scores({c: m[c] for c in COLUMNS if c in m}).value for m in masks if m
        ]  # fmt: skip
        note = "other masks: " + ", ".join(f"{v:.2f}" for v in values) if values else ""
        rows.append([label(family), steer, "; ".join(cells) or "–", note])
    return table(["family", "steering score", "test, minus the baseline", ""], rows)


def models_table(record: Record) -> str:
    rows = [
        [
            name,
            f"{one['steps']} x {one['batch']} x 256",
            f"{one['lr']:g}",
            str(one["seed"]),
            f"{one['held_out_loss'][0]:.3f} → {one['held_out_loss'][1]:.3f}",
            f"{100 * one['relative_distance']:.2f} %",
            f"{one['seconds']:.0f}",
        ]
        for name, one in record.plain["fine_tunes"].items()
    ]
    header = ["fine-tune", "tokens", "rate", "seed", "held-out loss", "moved", "seconds"]
    return table(header, rows)


def simulated_null(record: Record, trials: int) -> str:
    """The procedure on models of equal ability: how often anything is found on these sizes."""
    sizes = {c: len(v) for c, v in record.tested(record.plain["singles"]["start"]).items()}
    sizes = {c: n for c, n in sizes.items() if c in COLUMNS and n >= 5}
    if sum(sizes.values()) < 20:
        return "Too few test items.\n"
    rng = np.random.default_rng(SEED)
    found = 0
    for trial in range(trials):
        # An item is right with its own chance, whichever model: who is chosen by steering items
        # is chosen by noise, which the test items know nothing of.
        chance = {c: rng.beta(1, 1.5, n) for c, n in sizes.items()}
        six = [
            scores(
                {c: (rng.random(n) < chance[c]).astype(float).tolist() for c, n in sizes.items()}
            )
            for _ in range(6)
        ]
        p = [difference(six[0], other, resamples=500, seed=trial) for other in six[1:]]
        found += min(holm([one.p for one in p if one is not None])) < 0.05
    share = 100 * found / trials
    error = 100 * math.sqrt(max(share / 100 * (1 - share / 100), 1e-9) / trials)
    return (
        f"{trials} simulated trials on these sizes: an effect at p < 0.05 after Holm in "
        f"{share:.1f} % (± {1.96 * error:.1f}).\n"
    )


def null(record: Record) -> str:
    apart_most = record.plain.get("null")
    if apart_most is None:
        return "The walk among copies was not reached.\n"
    rows = [[label(f), str(len(v)), f"{max(v):g}"] for f, v in apart_most.items()]
    return table(["walk among copies", "models", "largest difference of an item"], rows)


def tables(record: Record, trials: int = 1000) -> str:
    """The whole of tables.md; without ``trials`` the simulated null check is left out."""
    measured = len(record.states)
    finished = ", ".join(
        f"round {i}: {len(found)} families" for i, found in enumerate(record.rounds)
    )
    parts = [
        f"# Tables: {record.plain['profile']}\n",
        INTRODUCTION,
        f"{measured} models measured; {finished}. A family measures {BUDGET} models.\n",
        "## Models\n",
        models_table(record),
        "## The leaderboard's row\n",
        leaderboard(record),
        "## The best schedule against what it must beat (test items)\n",
        primary(record),
        "## Each round's best schedule against optimisers of equal budget (test items)\n",
        optimised(record),
        "## Every arm against its own collapsed one-shot (test items)\n",
        arms(record),
        "## All measured states against their one-shots (steering items, nothing chosen)\n",
        paths(record),
        "## Families\n",
        families(record),
        "## Null checks\n",
        null(record),
        simulated_null(record, trials) if trials else "",
    ]
    return "\n".join(parts)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results" / "demo"
    (folder / "tables.md").write_text(tables(Record(folder / "record.json")))
    print(f"wrote {folder / 'tables.md'}")


if __name__ == "__main__":
    main()

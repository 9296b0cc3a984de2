"""Tables and plots from the per-regime results: ``python benchmarks/retrograde/analyse.py``.

Writes results/tables.md, results/families.png and results/paths.png.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from protocol import ITEMS_PER_SKILL, rate
from run import RESULTS, unpack
from stats import Interval, across_seeds, holm, paired_bootstrap
from train import REGIMES

FAMILIES = {
    "best_single": "best single model",
    "line_search": "line search over t",
    "linear": "linear",
    "slerp": "SLERP",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare_ties": "DARE-TIES",
    "model_stock": "Model Stock",
    "greedy_soup": "greedy soup",
    "anchored": "anchored linear",
    "random_step": "random step, retraced",
    "collapsed_linear": "collapsed: linear",
    "collapsed_ties": "collapsed: TIES",
    "collapsed_dare_ties": "collapsed: DARE-TIES",
    "walk_linear": "DKE-RS linear",
    "walk_slerp": "DKE-RS SLERP",
    "walk_ties": "DKE-RS TIES",
    "walk_dare_ties": "DKE-RS DARE-TIES",
    "walk_ties_moving": "DKE-RS TIES, moving base",
}
# What each kind of walk is compared with, beside the line search.
OWN = {
    "linear": "linear",
    "slerp": "linear",
    "ties": "own",
    "dare_ties": "own",
    "ties_moving": "linear",
}


INTRODUCTION = """\
Written by `analyse.py`; what the rows are and what they mean is in the README one folder up.
EM = exact match on the test items, mean over skills, in percent. Differences are percentage points;
[..] is the 95 % t interval over training seeds. p is Holm-adjusted over the rows of a regime's
table, and over all cells of a question's table. *seeds up / down* counts the seeds whose paired
bootstrap interval over items excludes 0.
"""


@dataclass(frozen=True)
class Outcome:
    """One seed of one regime: its record and, per family, the hit rate per item (skills, items)."""

    record: dict[str, Any]
    rates: dict[str, NDArray[np.float64]]

    def difference(self, ours: str, theirs: str) -> float:
        return 100 * float((self.rates[ours] - self.rates[theirs]).mean())


def read(results: Path) -> dict[str, list[Outcome]]:
    """Every finished regime, seeds in order."""
    found: dict[str, list[Outcome]] = {}
    for regime in REGIMES:
        records = [json.loads(f.read_text()) for f in results.glob(f"{regime}_*.json")]
        outcomes = []
        for record in sorted(records, key=lambda r: r["seed"]):
            hits = unpack(results / f"{regime}_{record['seed']}.npz", ITEMS_PER_SKILL["test"])
            outcomes.append(Outcome(record, {family: rate(h) for family, h in hits.items()}))
        if outcomes:
            found[regime] = outcomes
    return found


def compare(outcomes: Sequence[Outcome], ours: str, theirs: str) -> Interval:
    return across_seeds([o.difference(ours, theirs) for o in outcomes])


def compare_paths(outcomes: Sequence[Outcome], method: str, other: str) -> Interval:
    """All K schedules against candidate i of another family: search items, nothing selected."""
    return across_seeds([float(np.mean(_path_gaps(o, method, other))) for o in outcomes])


def _path_gaps(outcome: Outcome, method: str, other: str) -> NDArray[np.float64]:
    families = outcome.record["families"]
    return np.subtract(families[f"walk_{method}"]["search"], families[other]["search"])


def _own_family(method: str) -> str:
    return f"collapsed_{method}" if OWN[method] == "own" else "collapsed_linear"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _points(interval: Interval) -> str:
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def regime_table(outcomes: Sequence[Outcome]) -> str:
    """Every family against the best single model; Holm over the families of the regime."""
    intervals = {
        family: compare(outcomes, family, "best_single")
        for family in FAMILIES
        if family != "best_single"
    }
    adjusted = holm({family: interval.p for family, interval in intervals.items()})
    rows = []
    for family, label in FAMILIES.items():
        test = [o.record["families"][family]["test"] for o in outcomes]
        row = [label, f"{np.mean(test):.2f}"]
        if family == "best_single":
            rows.append([*row, "0", "", ""])
            continue
        within = [
            paired_bootstrap(o.rates[family], o.rates["best_single"], o.record["seed"])
            for o in outcomes
        ]
        better, worse = sum(w.low > 0 for w in within), sum(w.high < 0 for w in within)
        rows.append([*row, _points(intervals[family]), _p(adjusted[family]), f"{better} / {worse}"])
    header = ["family", "test EM %", "minus best single [95 % t]", "p (Holm)", "seeds up / down"]
    return _table(header, rows)


def question_table(
    found: dict[str, list[Outcome]], opponents: dict[str, str], title: str
) -> tuple[str, dict[tuple[str, str], tuple[Interval, float]]]:
    """walk_method minus its opponent, all regimes; Holm over every row of the table."""
    intervals = {
        (regime, method): compare(outcomes, f"walk_{method}", opponents[method])
        for regime, outcomes in found.items()
        for method in OWN
    }
    return _render_question(intervals, title)


def _render_question(
    intervals: dict[tuple[str, str], Interval], title: str
) -> tuple[str, dict[tuple[str, str], tuple[Interval, float]]]:
    adjusted = holm({f"{r}/{m}": interval.p for (r, m), interval in intervals.items()})
    verdicts = {key: (interval, adjusted["/".join(key)]) for key, interval in intervals.items()}
    regimes = list(dict.fromkeys(regime for regime, _ in intervals))
    rows = [
        [FAMILIES[f"walk_{method}"]]
        + [
            f"{_points(verdicts[regime, method][0])} p {_p(verdicts[regime, method][1])}"
            for regime in regimes
        ]
        for method in OWN
    ]
    return f"**{title}**\n\n" + _table(["schedule", *regimes], rows), verdicts


def questions(found: dict[str, list[Outcome]]) -> str:
    """The comparisons that decide whether a schedule is more than its effective weights."""
    parts = []
    own = {m: f"walk_{m}>{OWN[m]}" for m in OWN}
    linear = {m: f"walk_{m}>linear" for m in OWN}
    for opponents, title in (
        (own, "Chosen schedule minus its own collapsed one-shot (TIES, DARE-TIES: same method)"),
        (linear, "Chosen schedule minus the linear one-shot at its effective weights"),
        (
            {m: _own_family(m) for m in OWN},
            "Schedules minus the family of collapsed one-shots, each choosing for itself",
        ),
        (dict.fromkeys(OWN, "line_search"), "Schedules minus the line search over t"),
        (
            dict.fromkeys(OWN, "anchored"),
            "Schedules minus the anchored one-shot (fresh draws of the same effective weights)",
        ),
        (dict.fromkeys(OWN, "linear"), "Schedules minus one-shot linear"),
        (dict.fromkeys(OWN, "random_step"), "Schedules minus random steps, retraced"),
    ):
        parts.append(question_table(found, opponents, title)[0])
    paths = {
        (regime, method): compare_paths(outcomes, method, _own_family(method))
        for regime, outcomes in found.items()
        for method in OWN
    }
    parts.append(
        _render_question(
            paths,
            "All K schedules minus their own collapsed one-shots (search items, no choice made)",
        )[0]
    )
    return "\n".join(parts)


def identity_table(found: dict[str, list[Outcome]]) -> str:
    rows = []
    for regime, outcomes in found.items():
        for walk in ("walk_linear", "walk_slerp"):
            pairs = [row for o in outcomes for row in o.record["identity"][walk]]
            agree = [row["agree"] for row in pairs]
            rows.append(
                [
                    regime,
                    FAMILIES[walk],
                    str(len(pairs)),
                    f"{np.mean(agree):.2f}",
                    f"{min(agree):.2f}",
                    f"{max(row['distance'] for row in pairs):.1e}",
                ]
            )
    header = ["regime", "schedule", "pairs", "items agree %", "least", "largest weight distance"]
    return _table(header, rows)


def singles_table(outcomes: Sequence[Outcome]) -> str:
    names = list(outcomes[0].record["singles"])
    rows = [
        [str(o.record["seed"])]
        + [f"{o.record['singles'][n]:.1f}{' *' if n == o.record['start'] else ''}" for n in names]
        for o in outcomes
    ]
    return _table(["seed", *names], rows)


def masks_table(found: dict[str, list[Outcome]]) -> str:
    rows = []
    for regime, outcomes in found.items():
        for family in ("dare_ties", "collapsed_dare_ties", "walk_dare_ties"):
            spread = [
                np.std(o.record["families"][family]["mask_accuracy"], ddof=1) for o in outcomes
            ]
            rows.append([regime, FAMILIES[family], f"{np.mean(spread):.2f}", f"{max(spread):.2f}"])
    return _table(["regime", "family", "sd over masks, mean of seeds", "largest"], rows)


def tables(found: dict[str, list[Outcome]]) -> str:
    """The whole of results/tables.md."""
    seeds = sorted({o.record["seed"] for outcomes in found.values() for o in outcomes})
    parts = [
        "# Tables\n",
        INTRODUCTION,
        f"Training seeds: {', '.join(map(str, seeds))}.\n",
    ]
    for regime, outcomes in found.items():
        parts += [f"## {regime}\n", regime_table(outcomes)]
        parts += ["Single models, test EM % (* = best on val, where schedules start):\n"]
        parts += [singles_table(outcomes)]
    parts += ["## Is a schedule more than its effective weights?\n", questions(found)]
    parts += ["## Walks of linear and SLERP steps against one linear merge\n"]
    parts += [identity_table(found), "## DARE: spread over mask seeds, test EM\n"]
    parts += [masks_table(found)]
    scorings = sum(o.record["evaluations"] for outcomes in found.values() for o in outcomes)
    seconds = sum(o.record["seconds"] for outcomes in found.values() for o in outcomes)
    parts += [
        f"{scorings} scorings; {seconds / 60:.0f} minutes of wall time, summed over processes.\n"
    ]
    return "\n".join(parts)


def plot_families(found: dict[str, list[Outcome]], file: Path) -> None:
    """Every family's difference to the best single model: seeds as dots, t interval as a bar."""
    from matplotlib.figure import Figure

    families = [family for family in FAMILIES if family != "best_single"]
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (regime, outcomes) in zip(panels, found.items(), strict=True):
        for row, family in enumerate(families):
            values = [o.difference(family, "best_single") for o in outcomes]
            interval = across_seeds(values)
            color = "tab:red" if family.startswith("walk_") else "tab:blue"
            if family in ("line_search", "anchored", "random_step") or "collapsed" in family:
                color = "0.45"
            axes.plot([interval.low, interval.high], [row, row], color=color, lw=2)
            axes.plot(values, [row] * len(values), ".", color=color, ms=5, alpha=0.6)
            axes.plot(interval.mean, row, "|", color=color, ms=12, mew=2)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(regime)
        axes.set_xlabel("points over the best single model")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(families)), [FAMILIES[family] for family in families])
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=90)


def plot_paths(found: dict[str, list[Outcome]], file: Path) -> None:
    """Every schedule's search score against that of its own collapsed one-shot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (regime, outcomes) in zip(panels, found.items(), strict=True):
        for method in OWN:
            pairs = [
                (a, b)
                for o in outcomes
                for a, b in zip(
                    o.record["families"][_own_family(method)]["search"],
                    o.record["families"][f"walk_{method}"]["search"],
                    strict=True,
                )
            ]
            axes.plot(*zip(*pairs, strict=True), ".", ms=5, alpha=0.7, label=method)
        low = min(axes.get_xlim()[0], axes.get_ylim()[0])
        axes.plot([low, 100], [low, 100], color="black", lw=0.8)
        axes.set_title(regime)
        axes.set_xlabel("collapsed one-shot, EM %")
    panels[0].set_ylabel("schedule, EM %")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=90)


def write_report(results: Path) -> None:
    found = read(results)
    (results / "tables.md").write_text(tables(found))
    plot_families(found, results / "families.png")
    plot_paths(found, results / "paths.png")
    print(f"wrote {results / 'tables.md'}, families.png, paths.png")


if __name__ == "__main__":
    write_report(RESULTS)

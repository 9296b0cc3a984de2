"""The method's trial on a real llama: from the package to the tables, with one resumable command.

    python benchmarks/real/run.py OUT --data DATA [--profile demo|small|full] [--minutes M]

Makes the baseline and its fine-tunes, lets schedules and one-shot merges search on the steering
items, and meets the test items with what they enter (PROTOCOL.md). DATA is a folder with
leaderboard/ and text/. The same command goes on where it stopped; ``--results`` gets the scores by
item, from which tables.py writes the tables. Scores that a record.json there has of the same models
and items are not measured again, so that a run goes on in another folder, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import items
import models
import numpy as np
from contest import COLLAPSED, OPTIMISERS, RIVALS, WALKS, Contest, Entry, linear_of

from fastmerge.errors import FastmergeError
from fastmerge.evaluation.journal import Journal, write_atomically
from fastmerge.evaluation.scorers import make_scorer
from fastmerge.evaluation.scores import TaskScore
from fastmerge.retrograde import Lab, Model, Scores, load, open_space
from fastmerge.search.expressions import Expr, as_json, is_random, reseeded
from fastmerge.search.lab import Measurement

HERE = Path(__file__).resolve().parent
# Of a round, what answers most first: a run may stop anywhere. Optimisers follow the last round:
# one of them measures as many models as all arms.
ORDER = (
    "walk_linear", "walk_slerp", "walk_ties", "uniform", "line_search", "anchored", "random_step",
    "walk_dare_ties", "linear", "walk_slerp_layers", "walk_slerp_best", "walk_slerp_previous",
    "walk_slerp_improve", "walk_slerp_anneal", "ties", "collapsed_ties", "collapsed_dare_ties",
    "collapsed_slerp", "dare_ties", "slerp", "task_arithmetic", "greedy_soup", "model_stock",
)  # fmt: skip
MASKS = 3  # of an entry that draws masks: the mean of so many is reported


@dataclass(frozen=True)
class Profile:
    """How much is measured: rounds of every search, blocks of test items."""

    rounds: int
    blocks: int
    sizes: items.Sizes
    optimised: bool = True  # whether optimisers search, too


PROFILES = {
    # Minutes on a busy machine: that everything works, and the coarsest of answers.
    "demo": Profile(
        1,
        1,
        items.Sizes(
            {"arc_challenge": 12, "hellaswag": 6, "truthfulqa_mc2": 6, "winogrande": 16,
             "texts": 3},
            {"arc_challenge": 5, "hellaswag": 5, "mmlu": 5, "truthfulqa_mc2": 10, "winogrande": 10,
             "gsm8k": 5, "texts": 8},
            subjects=4,
        ),
        optimised=False,
    ),
    # Three hours on two quiet cores.
    "small": Profile(
        3,
        6,
        items.Sizes(
            {"arc_challenge": 24, "hellaswag": 16, "truthfulqa_mc2": 16, "winogrande": 32,
             "texts": 6},
            {"arc_challenge": 10, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 24,
             "winogrande": 24, "gsm8k": 8, "texts": 16},
            subjects=8,
        ),
    ),
    # Everything, on a GPU.
    "full": Profile(
        5,
        1,
        items.Sizes(
            {"arc_challenge": 299, "hellaswag": 500, "truthfulqa_mc2": 100, "winogrande": 160,
             "texts": 50},
            {"arc_challenge": 1172, "hellaswag": 10_042, "mmlu": 2000, "truthfulqa_mc2": 717,
             "winogrande": 1267, "gsm8k": 1319, "texts": 300},
            subjects=57,
        ),
    ),
}  # fmt: skip


class Recorded(Lab):
    """A lab that notes what it scores in a record, and knows what the record has. Scores have the
    record's five digits as soon as they are measured, so that nothing depends on where they come
    from.
    """

    states: dict[str, Any]  # a record's
    block = "steer"  # of items, which the scorer scores
    # Whether what the record lacks decides nothing, and is not measured: of a one-shot search the
    # first records kept the winner alone, of a walk through noise its measured states.
    lost = False

    def score(self, state: Expr, split: str = "steer", limit: int | None = None) -> Scores:
        scores = super().score(state, split, limit)
        if limit is None and scores.tasks:
            entry = {"is": as_json(state), "scores": {}}
            of_blocks = self.states.setdefault(key_of(self, state), entry)["scores"]
            of_blocks[self.block] = compact(scores)
        return scores

    def known(self, state: Expr, split: str = "steer", limit: int | None = None) -> Scores | None:
        found = super().known(state, split, limit)
        if found is not None or limit is not None:
            return found
        state_of = self.states.get(key_of(self, state), {"scores": {}})
        if self.block in state_of["scores"]:
            return expanded(state_of["scores"][self.block])
        return Scores({}) if self.lost else None  # the mean of no task is NaN, which never wins

    def keep(
        self, state: Expr, scores: Scores, split: str = "steer", limit: int | None = None
    ) -> Scores:
        return super().keep(state, expanded(compact(scores)), split, limit)


class TimeIsUpError(Exception):
    """The minutes are used up; what was measured is kept."""


class Run:
    """A run's folder: models, items, the journal, and what was found."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.out: Path = given.out
        self.data: Path = given.data
        self.profile = PROFILES[given.profile]
        self.given = given
        self.record: dict[str, Any] = {"profile": given.profile, "states": {}, "rounds": []}
        self._begun = time.monotonic()
        self._share = 1.0

    def say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def go_on(self) -> None:
        """Takes up the record in --results, if it is of this profile, these items and models."""
        file = self.given.results / "record.json"
        if not file.is_file():
            return
        try:
            earlier = json.loads(file.read_text())
            others = [k for k in ("profile", "items", "singles") if earlier[k] != self.record[k]]
        except (ValueError, KeyError, TypeError) as error:
            raise FastmergeError(
                f"{file}: no record to go on from ({type(error).__name__}: {error}); move it away, "
                "or name another --results"
            ) from None
        if others:
            what = others[0].replace("singles", "models' weights")
            self.say(f"{file} is of other {what}: all is measured anew, and it is replaced")
            return
        self.record["states"].update(earlier.pop("states"))  # which the labs look into
        self.record |= earlier
        kinds = [len(state["scores"]) for state in self.record["states"].values()]
        self.say(f"goes on from {file}: {len(kinds)} models, {sum(kinds)} measurements")

    def make_models(self) -> None:
        """The baseline and the fine-tunes: those that are there already stay."""
        folder = self.out / "models"
        folder.mkdir(parents=True, exist_ok=True)
        models.make_baseline(self.given.package, folder / "baseline")
        for name, run in models.RUNS.items():
            models.fine_tune(name, run, folder / "baseline", self.data, folder / name, self.say)
        made = {n: json.loads((folder / n / models.RECORD).read_text()) for n in models.RUNS}
        self.record["fine_tunes"] = made

    def make_items(self) -> None:
        self.chosen = items.choose(self.data, self.profile.sizes, self.profile.blocks)
        items.write(self.data, self.chosen, self.out / "data")
        self.record["items"] = self.chosen
        self.sections = {
            name: items.evaluate(
                name, tasks, self.out / "data", self.given.device, self.given.batch
            )
            for name, tasks in self.chosen.items()
        }

    def contest(self, names: Sequence[str], round_number: int, folder: str = "models") -> Contest:
        """A round over the baseline and the models ``names``, which share a lab."""
        places = [self.out / "models" / "baseline", *(self.out / folder / n for n in names)]
        shared = {
            "baseline": {"model": str(places[0].resolve()), "name": "start"},
            "pool": [
                {"model": str(place.resolve()), "name": name}
                for place, name in zip(places[1:], names, strict=True)
            ],
            "evaluate": self.sections["steer"],
        }
        step = {"degrade": {"partner": names[0], "method": "linear", "t": 0.5}}
        schedule = load({**shared, "schedule": {"steps": [step]}})  # any of these models
        cache = self.out / f"grams-{'-'.join(names)}.npz"
        space = open_space(schedule, cache=cache, threads=self.given.threads)
        if not hasattr(self, "scorers"):
            self.load_scorers()
        lab = Recorded(
            space, schedule.evaluate, self.scorers["steer"], self.journal,
            threads=self.given.threads, folder=self.out, observe=self.observe,
        )  # fmt: skip
        lab.states = self.record["states"]
        return Contest(lab, shared, round_number, self.say)

    def load_scorers(self) -> None:
        from fastmerge.evaluation.settings import load_evaluate

        self.journal = Journal(self.out / "journal.jsonl")
        self.scorers = {
            name: make_scorer(load_evaluate(section), Path(), self.out / "models" / "baseline")
            for name, section in self.sections.items()
        }

    def observe(self, told: Measurement) -> None:
        if told.seconds is not None:
            self.say(f"  {told.what}: {told.split}, {told.seconds:.0f} s")
        elif self.given.minutes is not None:
            used = (time.monotonic() - self._begun) / 60
            if used > self.given.minutes * self._share:
                raise TimeIsUpError

    def search(self) -> None:
        """On the steering items: every family of every round, then every round's optimisers."""
        self._share = self.given.search_share
        main = self.contest(list(models.RUNS), 0)
        lab = main.lab
        self.main = lab
        self.tested: list[tuple[str, Recorded, Expr]] = []
        self.record["singles"] = {n: key_of(lab, Model(i)) for i, n in enumerate(main.names)}
        self.go_on()
        singles = main.singles()
        contests = [Contest(lab, main.shared, n, self.say) for n in range(self.profile.rounds)]
        rounds: list[dict[str, Any]] = self.record["rounds"]
        rounds += [{} for _ in contests[len(rounds) :]]
        for number, contest in enumerate(contests):
            for entry, owner in self.families(contest, number, singles):
                self.enter(number, entry, owner)
        for number, contest in enumerate(contests):
            for family in OPTIMISERS if self.profile.optimised else ():
                self.enter(number, contest.optimiser(family), contest)

    def families(
        self, contest: Contest, number: int, singles: Sequence[Scores]
    ) -> Iterator[tuple[Entry, Contest]]:
        """The families of a round, those that answer most first."""
        walks: dict[str, Entry] = {}
        lab: Recorded = contest.lab
        for family in ORDER:
            entry: Entry | None
            if family == "random_step":
                yield self.random_step(number)
                continue
            if family in WALKS:
                entry = walks[family] = contest.walk(family)
            elif family in COLLAPSED:
                entry = contest.collapsed(family, walks[COLLAPSED[family]])
            elif family == "uniform":
                entry = contest.uniform()
            else:
                # A greedy soup goes by all that it measures.
                lab.lost = family != "greedy_soup" and family in self.record["rounds"][number]
                entry = contest.rival(family, singles)
                lab.lost = False
            if entry is not None:
                yield entry, contest

    def random_step(self, number: int) -> tuple[Entry, Contest]:
        """The linear schedule with noise in place of every partner."""
        name = f"noise-{number}"
        (self.out / "noise").mkdir(exist_ok=True)
        folder = self.out / "models"
        models.make_noise(
            folder / "baseline", [folder / n for n in models.RUNS], number,
            self.out / "noise" / name,
        )  # fmt: skip
        contest = self.contest([name], number, "noise")
        lab: Recorded = contest.lab
        lab.lost = "random_step" in self.record["rounds"][number]
        entry = contest.walk("walk_linear")
        lab.lost = False
        return Entry("random_step", entry.state, entry.steer, entry.measured), contest

    def enter(self, number: int, entry: Entry, contest: Contest) -> None:
        """Notes a family's result of a round, which must be the one that the record has already."""
        found = self.noted(entry, contest)
        known = self.record["rounds"][number].setdefault(entry.family, found)
        # Those of `small` were chosen by scores before rounding, which moves a mean by up to 5e-4
        # points; it may move no choice.
        moved = abs(known["steer"] - found["steer"])
        if known | {"steer": 0} != found | {"steer": 0} or moved > 1e-3:
            raise FastmergeError(
                f"round {number}, {entry.family}: not what the record in {self.given.results} has; "
                "another version made it: name another --results"
            )
        self.write()

    def noted(self, entry: Entry, contest: Contest) -> dict[str, Any]:
        """A family's result by its states' keys."""
        lab = contest.lab
        noted: dict[str, Any] = {
            "entry": key_of(lab, entry.state),
            "steer": round(entry.steer.value, 4),
            "measured": [key_of(lab, state) for state, _ in entry.measured],
        }
        self.tested.append((entry.family, lab, entry.state))
        if is_random(entry.state):
            masks = [reseeded(entry.state, shift) for shift in range(1, MASKS)]
            noted["masks"] = [key_of(lab, state) for state in masks]
            self.tested += [(f"{entry.family} mask", lab, state) for state in masks]
        if entry.trajectory is not None:
            own = {"linear": linear_of(entry.trajectory, entry.step)}
            own["own"] = contest.own_one_shot(entry.family, entry.trajectory, entry.step)
            for kind, state in own.items():
                noted[kind] = key_of(lab, state)
                self.tested.append((f"{entry.family} > {kind}", lab, state))
        return noted

    def null(self) -> None:
        """A walk among copies of one model: its every score must be the baseline's, by item."""
        if "null" in self.record:
            return
        (self.out / "null").mkdir(exist_ok=True)
        models.copy_of(self.out / "models" / "baseline", self.out / "null" / "copy")
        contest = self.contest(["copy"], 0, "null")
        contest.lab.states = {}  # copies are no models of the trial
        baseline = compact(contest.score(Model(0), "baseline"))
        apart = {}
        for family in ("walk_slerp", "walk_ties", "walk_dare_ties"):
            entry = contest.walk(family)
            apart[family] = [
                float(max(abs(a - b) for task in baseline
                    for a, b in zip(baseline[task], compact(scores)[task], strict=True)))
                for _, scores in entry.measured
            ]  # fmt: skip
        self.record["null"] = apart

    def test(self) -> None:
        """On the test items, block by block, what the primary comparisons are of."""
        self._share = 1.0
        self.measure(self.order()[0])

    def test_others(self) -> None:
        """Every other entry on the test items, which is the most of a run."""
        self.measure(self.order()[1])

    def measure(self, contenders: Sequence[tuple[str, Recorded, Expr]]) -> None:
        self.write()
        for block in [name for name in self.chosen if name != "steer"]:
            for what, lab, state in contenders:
                lab.scorer, lab.block, lab.stage = self.scorers[block], block, what
                try:
                    lab.score(state)
                finally:
                    lab.scorer, lab.block = self.scorers["steer"], "steer"
                self.write()

    def order(self) -> tuple[list[tuple[str, Recorded, Expr]], list[tuple[str, Recorded, Expr]]]:
        """What is tested first: what the primary comparisons are of."""
        rounds = self.record["rounds"]
        leaders = []
        for group in (tuple(WALKS), (*RIVALS, "uniform")):
            scored = [(r[f]["steer"], -i, f) for i, r in enumerate(rounds) for f in group if f in r]
            if scored:
                _, i, family = max(scored, key=lambda one: one[:2])
                leaders.append({**rounds[-i][family], "family": family, "round": -i})
        self.record["leaders"] = leaders
        wanted = {key for one in leaders for key in (one["entry"], one.get("own")) if key}
        wanted |= {one["linear"] for one in leaders if "linear" in one}

        singles = [(name, self.main, Model(i)) for i, name in enumerate(self.record["singles"])]
        chosen = [one for one in self.tested if key_of(one[1], one[2]) in wanted]
        chosen += [one for one in self.tested if one[0] in ("uniform", "random_step")]
        first = [singles[0], *chosen, *singles[1:]]
        return first, [one for one in self.tested if one not in chosen]

    def write(self) -> None:
        results: Path = self.given.results
        results.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, separators=(",", ":"))
        # A line for each model, so that a difference between two runs can be read.
        text = text.replace('},"', '},\n"')
        write_atomically(results / "record.json", text + "\n")


def key_of(lab: Lab, state: Expr) -> str:
    """What a state is called in the record: a digest of what decides its weights."""
    return lab.space.fingerprint(state)[:16]


def expanded(items_of: Mapping[str, Sequence[float]]) -> Scores:
    """The inverse of `compact`, to its five digits."""
    percent = {name: tuple(100 * value for value in values) for name, values in items_of.items()}
    return Scores({n: TaskScore(float(np.mean(v)), "", len(v), {n: v}) for n, v in percent.items()})


def compact(scores: Scores) -> dict[str, list[float]]:
    """Scores by item, 0 to 1, in the order of the items."""
    found = {}
    for name, task in scores.tasks.items():
        values = [value for part in (task.items or {}).values() for value in part]
        found[name] = [round(value / 100, 5) for value in values]
    return found


def positive(text: str) -> int:
    """A number of 1 or more."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the run's folder: some 3 GB")
    parser.add_argument("--data", type=Path, required=True, help="has leaderboard/ and text/")
    parser.add_argument("--profile", choices=PROFILES, default="small")
    parser.add_argument("--package", type=Path, help=f"a folder with {models.GGUF}")
    parser.add_argument("--minutes", type=float, help="stop after so many; the command goes on")
    parser.add_argument("--search-share", type=float, default=0.5, help="of the minutes")
    parser.add_argument("--threads", type=positive, help="default: all cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=positive, default=8, help="sequences of a generation")
    parser.add_argument("--results", type=Path, help="default: results/PROFILE beside this file")
    given = parser.parse_args(argv)
    given.results = given.results or HERE / "results" / given.profile
    return given


def main() -> None:
    given = arguments()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    run = Run(given)
    items.check(given.data)
    models.check_texts(given.data, models.RUNS)
    for folder in (given.out / "models", given.results):
        models.make_folder(folder)
    run.make_models()
    run.make_items()
    for part in (run.search, run.test, run.null, run.test_others):
        try:
            part()
        except TimeIsUpError:
            run.say(f"the minutes of {part.__name__} are used up; the same command goes on")
        run.write()
    run.say(f"wrote {given.results / 'record.json'}: tables.py {given.results} makes the tables")


if __name__ == "__main__":
    try:
        main()
    except FastmergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""``fastmerge search``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastmerge.cli.app import Json, Quiet, Seed, Threads, command
from fastmerge.cli.console import Progress, pairs, print_json, put, say, table
from fastmerge.cli.options import Argument, Option
from fastmerge.cli.retrograde import Cluster, Data, DryRun, Out, about
from fastmerge.cli.signals import stopped

if TYPE_CHECKING:
    from fastmerge.search.lab import Measurement
    from fastmerge.search.study import Study

SearchPath = Annotated[Path, Argument(metavar="SPACE", help="A search in YAML.")]


@command
def search(
    space: SearchPath,
    out: Out,
    dry_run: DryRun = False,
    data: Data = None,
    resume: Annotated[
        bool, Option("--resume", help="Continue the search that OUT holds, or a larger budget.")
    ] = False,
    seed: Seed = None,
    threads: Threads = None,
    workers: Annotated[
        int | None,
        Option(help="Processes that measure side by side, instead of the file's; they share CPUs."),
    ] = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Search a recipe's ranges as SPACE says; the best model, its recipe and a report in OUT."""
    from fastmerge.search.runner import describe, run

    if dry_run:
        described = describe(space, data=data, workers=workers, cluster=cluster, threads=threads)
        if json:
            print_json(described)
        else:
            _show_dry_run(described)
        return
    silent = quiet or json
    try:
        # What a scorer prints is no part of the answer.
        with redirect_stdout(sys.stderr), Progress("reading the models", quiet=silent) as progress:
            running = _Running(quiet=silent, begin=lambda: progress.__exit__(None, None, None))
            found = run(
                space,
                out,
                resume=resume,
                seed=seed,
                threads=threads,
                data=data,
                workers=workers,
                cluster=cluster,
                progress=progress,
                on_trial=running.tried,
                on_note=partial(say, quiet=silent),
                on_score=running.measuring,
            )
    except KeyboardInterrupt:
        stopped("; the same command with --resume continues")
    from fastmerge.search.report import BEST_FILE, as_json, lines_for, sentences, verdict

    lines = lines_for(found)
    if json:
        print_json(as_json(found, lines))
    if silent:
        return
    for note in found.report.notes:
        say(f"note: {note}")
    put(verdict(found.study, lines))
    for sentence in sentences(lines):
        put(sentence.removeprefix("- "))
    where = found.study.ranges.shown(found.best.point)
    put(f"seed {found.study.seed}; the best, candidate {found.best.number}: {where}")
    put(f"the model: {out / 'model'}; its recipe: {out / BEST_FILE}")
    put(f"report: {out / 'report.html'}")


class _Running:
    """Lines on stderr: what is being measured, once a second at most, how much of the budget is
    spent, how long the rest of it takes; and each candidate that is the best so far.
    """

    def __init__(self, *, quiet: bool, begin: Callable[[], None]) -> None:
        """``begin`` is called before the first line."""
        self._quiet, self._begin = quiet, begin
        self._best: int | None = None
        self._study: Study | None = None
        self._begun: tuple[float, int] | None = None  # when, and what had been spent
        self._said = -math.inf

    def measuring(self, told: Measurement) -> None:
        """Before a measurement and after it."""
        now = time.monotonic()
        if self._quiet or told.seconds is not None or now - self._said < 1:
            return
        self._begin()
        self._said = now
        where = " on the hold-out" if told.split == "holdout" else ""
        spent = self._spent(now) if told.what.startswith("candidate") else ""
        say(f"measuring {told.what}{where}{spent}")

    def _spent(self, now: float) -> str:
        if self._study is None:
            return ""
        spent, budget = self._study.spent, self._study.file.budget
        if self._begun is None:
            self._begun = now, spent  # of this run, which may go on where another ended
        text = f": {spent} of {budget.most} {budget.unit}"
        since, before = self._begun
        if spent > before:
            left = (now - since) / (spent - before) * (budget.most - spent)
            text += f", at most {about(left)} left"
        return text

    def tried(self, study: Study) -> None:
        """Before every candidate but the first, and at the end."""
        self._study = study
        best = study.best
        if self._quiet or best is None or best.number == self._best:
            return
        from fastmerge.search.rows import measured

        self._best = best.number
        budget = study.file.budget
        say(
            f"candidate {best.number}: {measured(best.scores)}, the best so far; "
            f"{study.spent} of {budget.most} {budget.unit}"
        )


def _show_dry_run(found: dict[str, Any]) -> None:
    table(
        ["number", "from", "to", "start"],
        [
            [
                own["name"],
                "-" if own["choices"] else f"{own['from']:g}",
                " | ".join(map(str, own["choices"])) or f"{own['to']:g}",
                f"{own['start']:g}" if isinstance(own["start"], float) else own["start"],
            ]
            for own in found["dimensions"]
        ],
        right=["from", "to", "start"],
    )
    if found["tasks"]:
        table(
            ["task", "items", "tokens, about"],
            [[row["task"], row["items"], row["tokens"]] for row in found["tasks"]],
            right=["items", "tokens, about"],
        )
    shown = [("models", ", ".join(found["models"])), ("optimiser", found["optimiser"])]
    shown += [("budget", f"{most} {unit}") for unit, most in found["budget"].items()]
    for key in ("items of a candidate", "candidates on all items, about", "items held out"):
        shown.append((key, "shows after the first" if found[key] is None else str(found[key])))
    seconds = found["seconds"]
    time_for = "shows after the first" if seconds is None else f"at most about {about(seconds)}"
    shown.append(("time for all", time_for))
    pairs(shown)
    pairs(("note", note) for note in found["notes"])

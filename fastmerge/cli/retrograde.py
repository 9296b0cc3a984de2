"""``fastmerge retrograde`` and ``fastmerge sweep``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastmerge.cli.app import Json, Quiet, RecipePath, Seed, Threads, command
from fastmerge.cli.console import Progress, pairs, print_json, put, say, table
from fastmerge.cli.options import Argument, Option
from fastmerge.cli.signals import stopped
from fastmerge.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from fastmerge.retrograde.walking import Trajectory
    from fastmerge.search.lab import Measurement

SchedulePath = Annotated[Path, Argument(metavar="SCHEDULE", help="Schedule in YAML.")]
Data = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        help="JSON lines for the harness's own tasks, instead of evaluate.data or FASTMERGE_DATA.",
    ),
]
Cluster = Annotated[
    str | None,
    Option(
        metavar="ADDRESS",
        help="Measure on a Ray cluster: auto, local (this machine), ray://HOST:PORT.",
    ),
]
Out = Annotated[Path, Argument(metavar="OUT", help="Folder to write.")]
DryRun = Annotated[
    bool, Option("--dry-run", help="Check everything, say what would be done, stop.")
]


@command
def retrograde(
    schedule: SchedulePath,
    out: Out,
    dry_run: DryRun = False,
    no_evaluate: Annotated[
        bool, Option("--no-evaluate", help="Walk and write the model; measure nothing.")
    ] = False,
    data: Data = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run that OUT holds.")] = False,
    seed: Seed = None,
    threads: Threads = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Walk between strong and weak models as SCHEDULE says; measure, compare, report in OUT."""
    from fastmerge.retrograde.runner import describe, run

    if dry_run:
        described = describe(schedule, evaluate=not no_evaluate, data=data, cluster=cluster)
        if json:
            print_json(described)
            return
        _show_dry_run(described)
        return
    try:
        # What a scorer prints is no part of the answer.
        with (
            redirect_stdout(sys.stderr),
            Progress("reading the models", quiet=quiet or json) as progress,
        ):
            # The bar ends where the table begins.
            steps = _Steps(quiet=quiet or json, begin=lambda: progress.__exit__(None, None, None))
            result = run(
                schedule,
                out,
                evaluate=not no_evaluate,
                resume=resume,
                seed=seed,
                threads=threads,
                data=data,
                cluster=cluster,
                progress=progress,
                on_step=steps,
                on_row=lambda name: say(f"comparing with {name}", quiet=quiet or json),
                on_score=Measured(quiet=quiet or json, begin=steps.begin),
                on_note=partial(say, quiet=quiet or json),
            )
    except KeyboardInterrupt:
        stopped("; the same command with --resume continues")
    from fastmerge.retrograde.findings import compare_lines, copy_text, finding, verdict_on_path
    from fastmerge.retrograde.record import as_json
    from fastmerge.search.tables import leaderboard

    lines = compare_lines(result)
    if json:
        print_json(as_json(result, lines))
    if quiet or json:
        return
    for note in result.report.notes if result.report is not None else ():
        say(f"note: {note}")
    trajectory = result.trajectory
    settings = trajectory.schedule.evaluate
    if settings is not None and settings.preset is not None:
        put(*leaderboard(lines, settings).split("\n"))
    if copy_text(trajectory, lines):
        put(copy_text(trajectory, lines))
    if verdict_on_path(lines):
        put(verdict_on_path(lines))
    for sentence in finding(lines):
        put(sentence.removeprefix("- "))
    put(f"seed {trajectory.seed}; the model is state {trajectory.final}: {out / 'model'}")
    put(f"report: {out / 'report.html'}")


class _Steps:
    """A table on stderr that grows by a line with each step."""

    def __init__(self, *, quiet: bool, begin: Callable[[], None]) -> None:
        self._quiet = quiet
        self.begin = begin
        self._began = False

    def __call__(self, trajectory: Trajectory) -> None:
        from fastmerge.retrograde import words
        from fastmerge.retrograde.words import other_label, step_text

        if self._quiet:
            return
        title = words.score_title(trajectory).removesuffix(", %")
        columns = f"{'step':>4}  {'kind':8}  {'with':16}  {'method':34}  {title:>7}  verdict"
        if not self._began:
            self._began = True
            self.begin()
            say(columns)
            score = words.measured(trajectory.scores[0], trajectory.state.baseline_score)
            say(_line(0, "baseline", trajectory.schedule.labels[0], "", score, ""))
            return
        record = trajectory.state.records[-1]
        say(
            _line(
                record.move.number,
                record.move.step.kind,
                other_label(trajectory, record),
                step_text(record.move.step),
                words.measured(trajectory.scores[record.move.number], record.score),
                words.verdict(record),
            )
        )


def _line(number: int, kind: str, other: str, method: str, score: str, verdict: str) -> str:
    return f"{number:>4}  {kind:8}  {other:16.16}  {method:34.34}  {score:>7}  {verdict}".rstrip()


class Measured:
    """A line on stderr for what is being measured, what is left and how long that takes; at most
    one a second.
    """

    def __init__(self, *, quiet: bool, begin: Callable[[], None]) -> None:
        self._quiet, self._begin = quiet, begin
        self._seconds: list[float] = []
        self._said = -math.inf

    def __call__(self, told: Measurement) -> None:
        if told.seconds is not None:
            self._seconds.append(told.seconds)
            return
        now = time.monotonic()
        if self._quiet or now - self._said < 1:
            return
        self._begin()
        self._said = now
        where = " on the hold-out" if told.split == "holdout" else ""
        text = f"measuring {told.what}{where}: {told.number}"
        if told.most is not None and told.most >= told.number:
            text += f" of at most {told.most}"
            # The first imports what scores, too: seconds, of models that are read in less.
            known = self._seconds[1:] or self._seconds or [told.expected or 0.0]
            left = sum(known) / len(known) * (1 + told.most - told.number)
            if left > 0:
                text += f", at most {'' if self._seconds[1:] else 'about '}{about(left)} left"
        say(text)


def _show_dry_run(described: dict[str, Any]) -> None:
    table(
        ["model", "reference", "given, %"],
        [
            [m["label"], m["reference"], "-" if m["accuracy"] is None else m["accuracy"]]
            for m in described["models"]
        ],
        right=["given, %"],
    )
    table(
        ["step", "kind", "with", "method", "measured"],
        [
            [s["step"], s["kind"], s["with"], s["method"], "yes" if s["measured"] else "no"]
            for s in described["steps"]
        ],
        right=["step"],
    )
    pairs(described["costs"].items())
    _show_measurements(described["measurements"])
    pairs(("note", note) for note in described["notes"])


class Written(Enum):
    """Which of a sweep's models become folders."""

    ALL, BEST, NONE = "all", "best", "none"


def about(seconds: float) -> str:
    """A time that is known to a tenth at best: no seconds from an hour on."""
    if seconds < 3600:
        return format_seconds(seconds)
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def _show_measurements(found: dict[str, Any] | None) -> None:
    if found is None:
        return
    if found["tasks"]:
        table(
            ["task", "split", "items", "tokens, about", "times, at most"],
            [[t["task"], t["split"], t["items"], t["tokens"], t["times"]] for t in found["tasks"]],
            right=["items", "tokens, about", "times, at most"],
        )
    seconds = found["seconds"]
    shown = "shows after the first" if seconds is None else f"at most about {about(seconds)}"
    pairs(
        [
            ("measurements in all, at most", found["at most"]),
            ("of them of", ", ".join(f"{what} {n}" for what, n in found["of"].items())),
            ("of them one after another", f"{found['one after another']} on any cluster"),
            ("time for them", shown),
        ]
    )


@command
def sweep(
    recipe: RecipePath,
    out: Out,
    t: Annotated[str, Option("--t", help="first:last:step, or a list: 0.2,0.5")] = "0:1:0.1",
    evaluate: Annotated[
        Path | None,
        Option(help="File with a schedule's evaluate keys: scores, and the best model."),
    ] = None,
    data: Data = None,
    write: Annotated[
        Written | None,
        Option(help="Which models become folders; without it the best, or all if none is scored."),
    ] = None,
    resume: Annotated[bool, Option("--resume", help="Continue the sweep that OUT holds.")] = False,
    threads: Threads = None,
    cluster: Cluster = None,
    quiet: Quiet = False,
) -> None:
    """Merge RECIPE at many t from one reading of the inner products; models or scores in OUT."""
    from fastmerge.search.rows import measured
    from fastmerge.search.sweep import BEST, Outlook, Point, best_of, parse_range
    from fastmerge.search.sweep import sweep as run

    def begin(outlook: Outlook) -> None:
        scored = f"scores {outlook.scored} values of t; " if evaluate is not None else ""
        models = "1 model" if outlook.written == 1 else f"{outlook.written} models"
        say(f"{scored}writes {models}, {format_bytes(outlook.nbytes)}, in {out}", quiet=quiet)
        for note in outlook.notes:
            say(note, quiet=quiet)

    def shown(point: Point) -> str:
        return str(point.out) if point.scores is None else measured(point.scores)

    def show(point: Point) -> None:
        if not quiet:
            put(f"t = {point.t:<8g} {shown(point)}")

    values = parse_range(t)
    try:
        with Progress("reading the models", quiet=quiet) as progress:
            points = run(
                recipe,
                out,
                values,
                evaluate=evaluate,
                data=data,
                write=None if write is None else write.value,
                resume=resume,
                threads=threads,
                cluster=cluster,
                progress=progress,
                on_start=begin,
                on_point=show,
            )
    except KeyboardInterrupt:
        stopped("; the same command with --resume continues")
    best = best_of(points)
    if best is None and evaluate is not None and not quiet:
        put("no score is a number: there is no best model")
    if best is not None and not quiet:
        put(f"best: t = {best.t:g}, {shown(best)}; plot: {out / 'sweep.png'}")
        if write in (None, Written.BEST):
            put(f"the model at t = {best.t:g}: {out / BEST}")

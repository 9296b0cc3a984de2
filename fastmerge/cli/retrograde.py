"""``fastmerge retrograde`` and ``fastmerge sweep``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastmerge.cli.app import INTERRUPTED, Json, Quiet, RecipePath, Seed, Threads, command, fail
from fastmerge.cli.console import Progress, pairs, print_json, put, say, table
from fastmerge.cli.options import Argument, Option

if TYPE_CHECKING:
    from fastmerge.retrograde.walking import Trajectory

SchedulePath = Annotated[Path, Argument(metavar="SCHEDULE", help="Schedule in YAML.")]
Data = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        help="JSON lines for the harness's own tasks, instead of evaluate.data or FASTMERGE_DATA.",
    ),
]
Out = Annotated[Path, Argument(metavar="OUT", help="Folder to write.")]


@command
def retrograde(
    schedule: SchedulePath,
    out: Out,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check everything, say what would be done, stop.")
    ] = False,
    no_evaluate: Annotated[
        bool, Option("--no-evaluate", help="Walk and write the model; measure nothing.")
    ] = False,
    data: Data = None,
    resume: Annotated[bool, Option("--resume", help="Continue the run that OUT holds.")] = False,
    seed: Seed = None,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Walk between strong and weak models as SCHEDULE says; measure, compare, report in OUT."""
    from fastmerge.retrograde.runner import describe, run

    if dry_run:
        described = describe(schedule, evaluate=not no_evaluate, data=data)
        if json:
            print_json(described)
            return
        _show_dry_run(described)
        return
    try:
        with Progress("reading the models", quiet=quiet or json) as progress:
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
                progress=progress,
                on_step=steps,
                on_row=lambda name: say(f"comparing with {name}", quiet=quiet or json),
            )
    except KeyboardInterrupt:
        fail("interrupted; the same command with --resume continues", INTERRUPTED)
    from fastmerge.retrograde.findings import compare_lines, finding, verdict_on_path
    from fastmerge.retrograde.record import as_json
    from fastmerge.retrograde.report import leaderboard

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
        put(*leaderboard(lines, settings.limit).split("\n"))
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
        self._begin = begin
        self._began = False

    def __call__(self, trajectory: Trajectory) -> None:
        from fastmerge.retrograde import words
        from fastmerge.retrograde.words import other_label, step_text

        if self._quiet:
            return
        columns = f"{'step':>4}  {'kind':8}  {'with':16}  {'method':34}  {'score':>7}  verdict"
        if not self._began:
            self._began = True
            self._begin()
            say(columns)
            score = trajectory.state.baseline_score
            say(_line(0, "baseline", trajectory.schedule.labels[0], "", score, ""))
            return
        record = trajectory.state.records[-1]
        say(
            _line(
                record.move.number,
                record.move.step.kind,
                other_label(trajectory, record),
                step_text(record.move.step),
                record.score,
                words.verdict(record),
            )
        )


def _line(
    number: int, kind: str, other: str, method: str, score: float | None, verdict: str
) -> str:
    value = "-" if score is None else f"{score:.2f}"
    return f"{number:>4}  {kind:8}  {other:16.16}  {method:34.34}  {value:>7}  {verdict}".rstrip()


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
    pairs(("note", note) for note in described["notes"])


@command
def sweep(
    recipe: RecipePath,
    out: Out,
    t: Annotated[str, Option("--t", help="first:last:step, or a list: 0.2,0.5")] = "0:1:0.1",
    evaluate: Annotated[
        Path | None,
        Option(help="File with a schedule's evaluate keys: write scores, not models."),
    ] = None,
    data: Data = None,
    resume: Annotated[bool, Option("--resume", help="Continue the sweep that OUT holds.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Merge RECIPE at many t from one reading of the inner products; models or scores in OUT."""
    from fastmerge.search.sweep import Point, parse_range
    from fastmerge.search.sweep import sweep as run

    def show(point: Point) -> None:
        what = str(point.out) if point.scores is None else f"{point.scores.value:.2f} %"
        if not quiet:
            put(f"t = {point.t:<8g} {what}")

    values = parse_range(t)
    try:
        with Progress("reading the models", quiet=quiet) as progress:
            points = run(
                recipe,
                out,
                values,
                evaluate=evaluate,
                data=data,
                resume=resume,
                threads=threads,
                progress=progress,
                on_point=show,
            )
    except KeyboardInterrupt:
        fail("interrupted; the same command with --resume continues", INTERRUPTED)
    scored = [(point.scores.value, -point.t) for point in points if point.scores is not None]
    if scored and not quiet:
        best, t_best = max(scored, key=lambda pair: (pair[0] == pair[0], *pair))
        put(f"best: t = {-t_best:g}, {best:.2f} %; plot: {out / 'sweep.png'}")

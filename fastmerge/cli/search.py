"""``fastmerge search``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastmerge.cli.app import Json, Quiet, Seed, Threads, command
from fastmerge.cli.console import Progress, pairs, print_json, put, say, table
from fastmerge.cli.options import Argument, Option
from fastmerge.cli.retrograde import Cluster, Data, DryRun, Measured, Out
from fastmerge.cli.signals import stopped

if TYPE_CHECKING:
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
        with Progress("reading the models", quiet=silent) as progress:
            trials = _Trials(quiet=silent)
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
                on_trial=trials,
                on_note=partial(say, quiet=silent),
                on_score=Measured(quiet=silent, begin=lambda: progress.__exit__(None, None, None)),
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


class _Trials:
    """A line on stderr for each candidate that is the best so far."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._best: int | None = None

    def __call__(self, study: Study) -> None:
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
    pairs(shown)
    pairs(("note", note) for note in found["notes"])

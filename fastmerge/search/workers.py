"""Who measures a search's candidates: this process, processes beside it, or a cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastmerge.arguments import a_text
from fastmerge.errors import FastmergeError, argument, brief, is_whole
from fastmerge.evaluation.scorers import Scoring
from fastmerge.search.document import SearchFile
from fastmerge.search.lab import LabMaker
from fastmerge.search.optimisers import BATCHED, ONE_AT_A_TIME
from fastmerge.search.study import Study


def with_workers(file: SearchFile, workers: int | None, cluster: str | None) -> SearchFile:
    """The file with the caller's ``workers``; FastmergeError where they cannot be."""
    if workers is not None:
        if cluster is not None:
            raise FastmergeError(
                f"{argument('workers')}: a cluster has its own; give it or {argument('cluster')}"
            )
        if not is_whole(workers) or workers < 1:
            raise FastmergeError(
                f"{argument('workers')}: {brief(workers)} is not a number of workers of 1 or more"
            )
        file = file.replace(workers=int(workers))
    if cluster is not None:
        a_text(cluster, argument("cluster"))
    elif file.workers > 1:
        from fastmerge.evaluation.processes import check_script

        check_script()
    return file


def give_evaluators(
    study: Study,
    scoring: Scoring,
    out: Path,
    cluster: str | None,
    threads: int | None,
    say: Callable[[str], None],
    kept: ExitStack,
) -> None:
    """Lets others measure, until ``kept`` ends, where the caller or the file asks for them."""
    lab, count = study.lab, study.file.workers
    assert lab.scorer is not None
    if cluster is None and count == 1:
        return
    make = LabMaker(lab.space, scoring, lab.scorer.key, out.absolute())
    if cluster is not None:
        from fastmerge.evaluation.on_ray import evaluators_on

        device = scoring.settings.device
        found: Any = evaluators_on(cluster, make, out, device=device, threads=threads)
    else:
        from fastmerge.evaluation.processes import evaluators_here

        found = evaluators_here(make, out, count, threads=threads, say=say)
    evaluators = kept.enter_context(found)
    lab.evaluators = evaluators
    for note in notes_on(study.file, evaluators.count, evaluators.threads):
        say(note)


def notes_on(file: SearchFile, count: int, threads: int) -> list[str]:
    """What several workers come to with the optimiser of ``file``."""
    name, batch = file.optimiser.name, file.optimiser.batch or 1
    each = f"{threads} thread{'s'[: threads != 1]}"
    found = [f"{count} workers, {each} and a model each"]
    if name in ONE_AT_A_TIME:
        found.append(
            f"{name} asks for one candidate at a time: beside it workers measure only what the "
            "best is compared with"
        )
    elif name in BATCHED and batch < count:
        found.append(
            f"{name} asks for {batch} at a time; `optimiser: {{name: {name}, batch: {count}}}` "
            "gives every worker one"
        )
    return found

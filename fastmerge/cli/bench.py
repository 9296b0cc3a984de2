"""``fastmerge bench``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

from fastmerge.cli.app import PROGRAM, Quiet, Threads, command
from fastmerge.cli.console import put, say
from fastmerge.cli.options import Argument, Option
from fastmerge.errors import OutputError, printable


class Kind(str, Enum):
    """What is measured."""

    all = "all"
    kernels = "kernels"
    merge = "merge"
    ops = "ops"
    walk = "walk"
    fold = "fold"


class Cache(str, Enum):
    """The state of the input files."""

    warm = "warm"
    cold = "cold"
    both = "both"


_REPEAT = 3


@command
def bench(
    job: Annotated[
        Kind, Argument(help="kernels, merge, ops, walk, fold or all (merge, with --models).")
    ] = Kind.all,
    models: Annotated[
        list[str] | None,
        Option(several=True, metavar="MODEL", help="Your own, the base first; only read."),
    ] = None,
    size: Annotated[
        str | None,
        Option(
            metavar="S,S,...",
            help="Of models made for it: tiny, 0.2b (else this one), 0.5b, 1.1b, 3b, 7b.",
        ),
    ] = None,
    methods: Annotated[
        str | None, Option(metavar="M,M,...", help="Of merges; else linear,ties.")
    ] = None,
    count: Annotated[
        str | None, Option(metavar="N,N,...", help="Models of a merge, instead of 2 or 3.")
    ] = None,
    steps: Annotated[str | None, Option(metavar="N,N,...", help="Of a walk; else 10.")] = None,
    against: Annotated[
        str | None, Option(metavar="P,P,...", help="mergekit, torch, peft: run them too.")
    ] = None,
    cache: Annotated[
        Cache | None, Option(help="Input files in memory or not; merges by default in both ways.")
    ] = None,
    repeat: Annotated[int, Option(help="Runs of each.", min=1)] = _REPEAT,
    folder: Annotated[
        Path, Option(help="Where models and outputs go meanwhile: the disk that is measured.")
    ] = Path(),
    threads: Threads = None,
    json: Annotated[Path | None, Option(metavar="FILE", help="Every run, as JSON.")] = None,
    plot: Annotated[Path | None, Option(metavar="FILE", help="A PNG of the figures.")] = None,
    quiet: Quiet = False,
) -> None:
    """Measure merges on this machine beside what it can do at best, as Markdown."""
    from fastmerge.bench import request as asked
    from fastmerge.bench.report import as_json, markdown
    from fastmerge.bench.run import run
    from fastmerge.cli.files import check_file, write_result
    from fastmerge.compute.cpu import thread_count
    from fastmerge.models.adapter import is_adapter

    check_file(json, "--json")
    check_file(plot, "--plot")
    if json is not None and plot is not None and json.resolve() == plot.resolve():
        raise OutputError(f"--json and --plot: both are {json}; give two files")
    if plot is not None:
        from fastmerge.search.figures import require

        require()
    opened = asked.opened(models or ())
    kinds = asked.KINDS if job is Kind.all else (job.value,)
    if job is Kind.all and opened:
        kinds = ("fold",) if len(opened) == 2 and is_adapter(opened[1]) else ("merge",)
    given: dict[str, object] = {
        "--size": size, "--methods": methods, "--count": count, "--steps": steps,
        "--against": against, "--cache": None if cache is None else cache.value,
        "--repeat": None if repeat == _REPEAT else repeat, "--threads": threads,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    asked.refuse_idle(given, kinds, opened)
    wanted = asked.Request(
        kinds=kinds,
        models=opened,
        sizes=asked.sizes("0.2b" if size is None else size),
        methods=asked.methods("linear,ties" if methods is None else methods),
        counts=() if count is None else asked.counts(count),
        steps=asked.steps("10" if steps is None else steps),
        against=() if against is None else asked.peer_names(against),
        repeat=repeat,
        caches=None if cache is None else asked.CACHES if cache is Cache.both else (cache.value,),
        threads=thread_count(threads),
        folder=folder,
    )
    report = run(wanted, lambda text: say(f"bench: {text}", quiet=quiet))
    report["command"] = _words(job, opened, given)
    try:
        put(*markdown(report).splitlines())
    finally:  # what took minutes is not lost with a terminal or a full disk
        if json is not None:
            write_result(json, as_json(report).encode())
    if plot is not None:
        from fastmerge.bench.plots import report_png

        if not report["jobs"]:
            raise OutputError(f"--plot: {plot}: not written: no figure to draw; the notes say why")
        write_result(plot, report_png(report))


def _words(job: Kind, models: Sequence[Path], options: Mapping[str, object]) -> str:
    """The command that measures the same, for whoever reads its figures: without this machine's
    paths, of which a model's folder alone has a name.
    """
    words = [PROGRAM, "bench", *([] if job is Kind.all else [job.value])]
    words += ["--models"] * bool(models) + [printable(model.name) for model in models]
    return shlex.join([*words, *(str(word) for pair in options.items() for word in pair)])

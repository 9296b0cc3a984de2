"""``fastmerge verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from fastmerge.cli.app import DIFFERS, Json, Quiet, Threads, command
from fastmerge.cli.console import Progress, print_json, put, say
from fastmerge.cli.options import Argument, Option
from fastmerge.errors import FastmergeError


@command
def verify(
    folder: Annotated[Path, Argument(help="Folder that a merge wrote.")],
    against: Annotated[
        Path | None, Option(metavar="RECIPE", help="Compare it with what RECIPE makes too.")
    ] = None,
    sample: Annotated[
        int | None, Option(help="Make N tensors of RECIPE again, drawn at random.", min=0)
    ] = None,
    every: Annotated[bool, Option("--all", help="Make all tensors of RECIPE again.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Say whether FOLDER is as a merge wrote it; exit code 1 if not."""
    from fastmerge import api

    if against is None and (every or sample is not None):
        raise FastmergeError("--sample and --all: tensors of which recipe? add --against RECIPE")
    if every and sample is not None:
        raise FastmergeError("--sample and --all: give one of the two")
    number = api.SAMPLE if sample is None else sample
    drawn = None if every else number
    with Progress("verifying", quiet=quiet or json) as progress:
        found = api.verify(folder, against, sample=drawn, threads=threads, progress=progress)
    if json:
        print_json(found.as_dict())
        return 0 if found.whole else DIFFERS
    for difference in found.differences:
        put(str(difference))
    if found.more_differences:
        put(f"and {found.more_differences} more differences")
    for what in found.unchecked:
        say(f"note: not checked: {what}")
    count = len(found.differences) + found.more_differences
    again = f", {len(found.recomputed)} made again from {against}" if against else ""
    verdict = "as written" if found.whole else f"{count} difference{'s'[: count != 1]}"
    put(
        f"{folder}: {verdict} ({found.checked} of {found.tensors} tensors by their checksums"
        f"{again}; {found.files} files)"
    )
    return 0 if found.whole else DIFFERS

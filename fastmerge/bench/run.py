"""A request to a report."""

from __future__ import annotations

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmerge.bench import ceilings, kernels, tensors, wholes
from fastmerge.bench.checkpoints import SHAPES, write_set
from fastmerge.bench.machine import machine
from fastmerge.bench.peers import MODULES
from fastmerge.bench.request import WHOLES, Request, refuse
from fastmerge.bench.rows import Row
from fastmerge.compute.cpu import isa
from fastmerge.errors import OutputError
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.output.disk import remove_tree
from fastmerge.output.place import explain
from fastmerge.units import format_count

Tell = Callable[[str], None]
FORMAT = 1


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder of its own in ``folder``, which is gone afterwards, however it ends: on Ctrl-C too,
    and on the signals that the command line takes for it.
    """
    try:
        made = Path(tempfile.mkdtemp(prefix="fastmerge-bench-", dir=folder))
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror}); give --folder"
        ) from error
    try:
        yield made
    except OSError as error:
        if error.filename is not None:
            raise
        # A disk that another program fills meanwhile, of which a write names no file.
        raise explain(error, folder) from error
    finally:
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if main else ()
        # A second Ctrl-C would leave half of it.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        remove_tree(made, ignore_errors=True)
        for number, handler in before.items():
            # None: whoever embeds Python set it, and it cannot be put back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def run(request: Request, tell: Tell = lambda text: None) -> dict[str, Any]:
    """Measures everything that is asked for; ``tell`` hears what is going on, a line at a time.

    Raises `WrongResultError` where a result is not what NumPy says, and whatever stands in the way:
    before anything is written, where that can be known.
    """
    isa()
    request = refuse(request)
    with workplace(request.folder) as place:
        report: dict[str, Any] = {
            "format": FORMAT, "repeat": request.repeat,
            "peer_repeat": min(request.repeat, request.peer_repeat), "threads": request.threads,
            "machine": machine(place, [m for name in request.against for m in MODULES[name]]),
            "ceilings": [], "jobs": [], "notes": request.notes,
        }  # fmt: skip
        if request.sparse:
            report["notes"].append("the models are holes, read as zeros: their seconds say nothing")
        if request.models:
            # Before minutes go into ceilings: what cannot be merged is refused.
            _planned(request.models, request, place)
        tell("the machine's ceilings")
        how = request.threads, min(request.repeat, 5), request.ceiling_bytes
        report["ceilings"] = ceilings.of_memory(*how)
        if set(request.kinds) & set(WHOLES):
            report["ceilings"] += ceilings.of_disk(place, *how)
        report["ceilings"] += ceilings.of_devices(how[1])
        if "kernels" in request.kinds:
            report["jobs"] += kernels.bench(
                request.kernel_entries, request.dtypes, request.isas or (isa(),),
                max(5, request.repeat), tell,
            )  # fmt: skip
        if "ops" in request.kinds:
            report["jobs"] += _ops(request, tell)
        if set(request.kinds) & set(WHOLES):
            for rows, notes in _wholes(request, place, tell):
                report["jobs"] += rows
                report["notes"] += notes
    return report


def _ops(request: Request, tell: Tell) -> list[Row]:
    against = "torch" in request.peers_of("ops")
    rows: list[Row] = []
    for dtype in request.dtypes:
        # NumPy has no bfloat16 of its own.
        named = dtype if against or dtype != "BF16" else "F32"
        for size in request.op_tensors:
            tell(f"ops, {named}, {size}: compared with NumPy, then timed")
            rows += tensors.bench(
                size, named, request.ops, request.seconds, threads=request.threads, torch=against
            )
    return rows


Part = tuple[list[Row], list[str]]


def _wholes(request: Request, place: Path, tell: Tell) -> Iterator[Part]:
    if request.models:
        for whole in _planned(request.models, request, place):
            yield wholes.run(whole, place, request, tell)
        return
    for number, size in enumerate(request.sizes):
        own = request.of_further_sizes if number else request
        folder = request.sets / size if request.sets else place / size
        parameters = SHAPES[size].parameters
        count = f"{own.most_models} model{'s'[: own.most_models != 1]}"
        tell(f"{count} of {format_count(parameters)} parameters: being made")
        models = write_set(folder, size, own.most_models, sparse=request.sparse)
        about = {"size": size, "parameters": parameters}
        for whole in _listed(models, own, place, "bfloat16", about):
            yield wholes.run(whole, place, own, tell)
        if request.sets is None:
            remove_tree(folder)


def _planned(models: Sequence[Path], request: Request, place: Path) -> list[wholes.Whole]:
    parameters = sum(info.count for info in Checkpoint.open(models[0]).tensors.values())
    names = [model.name for model in models]
    about: Row = {"size": format_count(parameters), "parameters": parameters, "names": names}
    return _listed(models, request, place, None, about)


def _listed(
    models: Sequence[Path], request: Request, place: Path, dtype: str | None, about: Row
) -> list[wholes.Whole]:
    made: list[wholes.Whole] = []
    for kind in ("merge", "walk"):
        if kind in request.kinds:
            wholes.refuse_adapters(models, kind)
    if "merge" in request.kinds:
        made += wholes.merges(models, request, place, dtype, about)
    if "walk" in request.kinds:
        made += wholes.walks(models, request, place, dtype, about)
    if "fold" in request.kinds:
        made += wholes.folds(models, request, place, about)
    return made

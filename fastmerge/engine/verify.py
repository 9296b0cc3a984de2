"""Whether a written folder is what its lineage says, and what its recipe makes."""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge import _C
from fastmerge.compute.cpu import cpu, isa, thread_count
from fastmerge.engine.executor import Local
from fastmerge.errors import FastmergeError, ModelError, UnsupportedError, argument, in_a_line
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.folder import INDEX, find_files
from fastmerge.models.header import open_regular, read_object, show
from fastmerge.models.links import Home
from fastmerge.models.side_files import LINEAGE_FILE, OURS
from fastmerge.output.checksum import sha256_of
from fastmerge.output.provenance import names
from fastmerge.output.sink import Arrays
from fastmerge.output.whole import (
    Difference,
    Findings,
    Lineage,
    check_added,
    check_folder,
    in_words,
    read_headers,
)
from fastmerge.planning.inputs import TensorPlan
from fastmerge.planning.plan import Plan
from fastmerge.progress import Progress, Told

Planner = Callable[[int | None], Plan]  # of a seed, or of the recipe's own


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    ``folder``: that was looked at. ``differences``: one for each file or tensor, its name and what
    is wrong. ``more_differences``: how many beyond the 10 000 that are kept. ``unchecked``: what
    could not be checked, and why, a sentence each. ``files``: compared with what the lineage says
    of them, or the recipe where there is none. ``tensors``: in the folder. ``checked``: tensors of
    which every byte was read for its checksum. ``recomputed``: names of tensors that were made
    again from the recipe. ``version``: of fastmerge, that wrote the folder, or None.
    """

    folder: Path
    differences: tuple[Difference, ...]
    more_differences: int
    unchecked: tuple[str, ...]
    files: int
    tensors: int
    checked: int
    recomputed: tuple[str, ...]
    version: str | None

    def __repr__(self) -> str:
        return in_a_line(
            self, "folder", "whole", "differences", "unchecked", "files", "tensors", "checked"
        )

    @property
    def whole(self) -> bool:
        """Whether everything that could be checked is as it was written."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """Returns the findings as JSON can hold them."""
        values = asdict(self)
        values["folder"] = str(self.folder)
        return values | {"whole": self.whole}


def verify_folder(
    folder: Path,
    planner: Planner | None = None,
    *,
    sample: int | None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """``folder``, a model or an adapter, against its own lineage and, with a ``planner``, a model
    against the recipe's plan: ``sample`` tensors, or all where it is None, are made again and
    compared bit for bit.
    """
    isa()
    count = thread_count(threads)
    if not os.path.isdir(folder):
        raise ModelError(f"{folder}: not a folder; give one that fastmerge wrote")
    found = Findings()
    lineage = None
    try:
        lineage = Lineage.read(folder)
        if lineage is None and planner is None:
            raise ModelError(
                f"{folder}: has no {LINEAGE_FILE}, so fastmerge did not write it, or it was "
                f"removed; give the recipe ({argument('against')}) to compare with"
            )
        if lineage is not None and lineage.is_of_adapter and planner is not None:
            raise UnsupportedError(
                f"{folder}: an adapter, whose last bits follow from NumPy's BLAS; only models are "
                f"compared with recipes ({argument('against')})"
            )
        if lineage is not None:
            found = check_folder(folder, lineage, cpu(count).pool, progress)
        else:
            found.unchecked.append(f"the folder's own lineage: it has no {LINEAGE_FILE}")
            read_headers(folder, found)
    except OSError as error:
        where = error.filename or folder
        raise ModelError(f"{where}: cannot be read ({error.strerror or error})") from error
    made: tuple[str, ...] = ()
    if planner is not None:
        plan = _plan(planner, lineage)
        made = _Comparison(folder, plan, lineage, found).run(sample, count, progress)
    return Verification(
        folder=folder,
        differences=tuple(found.differences),
        more_differences=found.more,
        unchecked=tuple(found.unchecked),
        files=found.files,
        tensors=found.tensors,
        checked=found.checked,
        recomputed=made,
        version=lineage.version if lineage else None,
    )


def _plan(planner: Planner, lineage: Lineage | None) -> Plan:
    """With the seed that was given when the folder was written, where the recipe has none."""
    plan = planner(None)
    said = lineage.said.get("fastmerge_seed") if lineage else None
    if not plan.seed_derived or not isinstance(said, str):
        return plan
    given = re.fullmatch(r"\d{1,19}", said, re.ASCII) and int(said) != plan.seed
    return planner(int(said)) if given else plan


class _Comparison:
    def __init__(self, folder: Path, plan: Plan, lineage: Lineage | None, found: Findings) -> None:
        self._folder, self._plan, self._lineage, self._found = folder, plan, lineage, found

    def run(self, sample: int | None, threads: int, progress: Progress | None) -> tuple[str, ...]:
        self._inputs()
        self._side_files()
        self._added()
        try:
            model = Checkpoint.open(self._folder)
        except FastmergeError:
            self._found.unchecked.append(
                "tensors against the recipe: the weight files cannot be opened"
            )
            return ()
        alike = self._tensors(model)
        if sample is not None and sample < len(alike):
            # Not the same every time: who changes a folder must not know what will be looked at.
            chosen = set(random.SystemRandom().sample(range(len(alike)), sample))
            alike = [item for number, item in enumerate(alike) if number in chosen]
        self._recompute(model, alike, threads, progress)
        return tuple(item.name for item in alike)

    def _inputs(self) -> None:
        said = self._lineage.said.get("fastmerge_inputs") if self._lineage else None
        if not isinstance(said, dict):
            return
        called = zip(names(self._plan), self._plan.models, strict=True)
        ours = {name: model.fingerprint for name, model in called}
        if sorted(ours.values()) == sorted(map(str, said.values())):
            return
        other = [show(name) for name, found in ours.items() if said.get(name) != found][:3]
        self._found.differ(
            LINEAGE_FILE,
            f"was made of other models than the recipe's, by their fingerprints: "
            f"{', '.join(other) or 'of one more'}",
        )

    def _side_files(self) -> None:
        """The config's values, and the bytes of what lies beside the weights."""
        files = self._plan.side_files()
        if self._plan.config:
            files.pop("config.json", None)
            self._compare("config.json", self._config, self._plan.config)
        for name, content in files.items():
            self._compare(name, partial(self._sha256_in, name), _sha256(content))

    def _added(self) -> None:
        """Files that the recipe does not make: fastmerge.json may list what somebody added."""
        made = {*self._plan.side_files(), *OURS}
        made |= {"config.json"} if self._plan.config else set()
        try:
            files, weight_map = find_files(self._folder)
        except (FastmergeError, OSError):  # told where the weights are opened
            return
        made |= {file.relative_to(self._folder).as_posix() for file in files}
        made |= {INDEX} if weight_map is not None else set()
        check_added(self._folder, made, "is not in what the recipe makes", self._found)

    def _config(self) -> dict[str, Any]:
        return read_object(Home(self._folder).inside(self._folder / "config.json"))

    def _sha256_in(self, name: str) -> str:
        return _sha256(Home(self._folder).inside(self._folder / name))

    def _compare(self, name: str, read: Callable[[], Any], wanted: Any) -> None:
        if self._lineage is None:
            self._found.files += 1
        if name in self._found.faulty:
            return
        path = self._folder / name
        try:
            what = "is not what the recipe makes" if read() != wanted else None
        except (FastmergeError, OSError) as error:
            missing = not os.path.lexists(path)
            what = "is missing; the recipe makes it" if missing else in_words(error, path)
        if what:
            self._found.differ(name, what)

    def _tensors(self, model: Checkpoint) -> list[TensorPlan]:
        """The plan's tensors that the folder has in the same type and shape."""
        other: set[str] = set()
        wanted = {part.name: part for item in self._plan.tensors for part in item.written}
        for name, item in wanted.items():
            info = model.tensors.get(name)
            if info is None:
                self._found.differ(".", "is missing; the recipe makes it", name)
                other.add(name)
            elif (info.dtype, info.shape) != (item.dtype, item.shape):
                self._found.differ(
                    model.files[info.file].name,
                    f"is {info.dtype.code} {list(info.shape)}, the recipe makes {item.dtype.code} "
                    f"{list(item.shape)}",
                    name,
                )
                other.add(name)
        for name in model.tensors.keys() - wanted.keys():
            self._found.differ(".", "is not in what the recipe makes", name)
        items = self._plan.tensors
        return [item for item in items if all(part.name not in other for part in item.written)]

    def _recompute(
        self,
        model: Checkpoint,
        items: list[TensorPlan],
        threads: int,
        progress: Progress | None,
    ) -> None:
        pool, sink = cpu(threads).pool, Arrays({item.name for item in items})
        told = Told(progress, sum(item.bytes_moved for item in items))
        with closing(Local(self._plan, threads=threads).run(sink)) as finished:
            for item, _ in finished:
                for part in item.written:
                    array = np.ascontiguousarray(sink.take(part)).reshape(-1).view(np.uint8)
                    made = _C.View(array.ctypes.data, array.size, "RAW", array)
                    if not _C.equal(pool, made, model.view(part.name, raw=True)):
                        file = model.files[model.info(part.name).file]
                        what = "has other bytes than the recipe makes"
                        where = file.relative_to(self._folder).as_posix()
                        self._found.differ(where, what, part.name)
                    model.drop(part.name)
                told.add(item.bytes_moved, item.name)
        self._plan.check_unchanged()
        model.check_unchanged()


def _sha256(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open_regular(content) as file:
        return sha256_of(file)

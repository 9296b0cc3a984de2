"""What is asked of a benchmark, and everything that is refused before it starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from fastmerge.bench import peers
from fastmerge.bench.checkpoints import SHAPES, bytes_of_size
from fastmerge.bench.expressions import WHOLE
from fastmerge.bench.kernels import ENTRIES
from fastmerge.bench.recipes import JOBS, Job
from fastmerge.bench.tensors import OPS, SIZES
from fastmerge.errors import FastmergeError, ModelError, OutputError, ResourceError, nearest
from fastmerge.extras import install
from fastmerge.models.adapter import is_adapter
from fastmerge.models.checkpoint import Checkpoint
from fastmerge.models.hub import is_remote, resolve
from fastmerge.output.place import check_space

KINDS = ("kernels", "merge", "ops", "walk", "fold")
CACHES = ("warm", "cold")
PEERS = {  # what each kind can be compared with
    "kernels": (), "merge": ("mergekit", "torch"), "ops": ("torch",), "walk": ("mergekit",),
    "fold": ("peft",),
}  # fmt: skip
WHOLES = ("merge", "walk", "fold")  # those of models on disk
WALKED = 3  # models of a walk, the baseline among them
CEILING_BYTES = 1 << 28
_MOST_STEPS, _MOST_MODELS = 1000, 64
_SPARE = 64 << 20


@dataclass(frozen=True)
class Request:
    """What to measure. ``models``: the user's, in place of llama-shaped ones of ``sizes``."""

    kinds: tuple[str, ...] = KINDS
    models: tuple[Path, ...] = ()
    sizes: tuple[str, ...] = ("0.2b",)
    methods: tuple[str, ...] = ("linear", "ties")
    counts: tuple[int, ...] = ()  # of models, in place of a method's own
    steps: tuple[int, ...] = (10,)
    against: tuple[str, ...] = ()
    repeat: int = 3
    peer_repeat: int = 1  # mergekit's TIES takes minutes at 1.1 B
    caches: tuple[str, ...] | None = None  # None: of merges both, else warm
    threads: int = 1
    folder: Path = Path()  # where the temporary files go
    rank: int = 16  # of the adapter that is folded
    entries: int | None = None  # of a kernel's tensors; None: 4 Mi, or as many as a model has
    dtypes: tuple[str, ...] = ("BF16",)
    isas: tuple[str, ...] = ()  # none: the one in use
    tensors: tuple[str, ...] | None = None  # of ops; None: 1 and 16 MiB, or what a model has
    ops: tuple[str, ...] = OPS
    seconds: float = 0.5  # of each op
    sparse: bool = False  # holes for weights: for memory, not for time
    sets: Path | None = None  # where models are kept for other runs

    def caches_of(self, kind: str) -> tuple[str, ...]:
        if self.sparse:
            return ("warm",)
        return self.caches or (CACHES if kind == "merge" else CACHES[:1])

    def peers_of(self, kind: str) -> tuple[str, ...]:
        return tuple(name for name in self.against if name in PEERS[kind])

    @property
    def merges(self) -> list[Job]:
        """Of one size: each method with its own number of models, or with those asked for."""
        own = [JOBS[name] for name in self.methods]
        if self.models:
            given = len(self.models)
            fit = [job.of(given) for job in own if not job.most or given <= job.most]
            return fit + [job for job in own if job.most and given > job.most]
        if not self.counts:
            return own
        # A delta method of a base and one model is something, but not what is asked for.
        return [job.of(n) for job in own for n in self.counts if not job.most or n <= job.most]

    @property
    def unfit(self) -> list[str]:
        """Of what is asked for, in words, what has no figure, and why."""
        said = []
        for job in (JOBS[name] for name in self.methods if "merge" in self.kinds):
            more = [str(n) for n in self.counts if job.most and n > job.most]
            if more:
                said.append(f"{job.method}: takes {job.most} models, not {' or '.join(more)}")
        if "walk" in self.kinds and len(self.models) > WALKED:
            said.append(f"walk: of the {len(self.models)} models the first {WALKED} are used")
        return said

    @property
    def of_further_sizes(self) -> Request:
        """What is measured of each size after the first: of several numbers of models, or of steps,
        that one alone has all.
        """
        counts = self.counts if len(self.counts) == 1 else ()
        return replace(self, counts=counts, steps=self.steps[:1])

    @property
    def notes(self) -> list[str]:
        """Of what is asked for, in words, what is left out, and why."""
        several = [
            f"--{name} {','.join(map(str, given))}"
            for name, given, kind in (
                ("count", self.counts, "merge"),
                ("steps", self.steps, "walk"),
            )
            if len(given) > 1 and kind in self.kinds
        ]
        if not several or len(self.sizes) < 2 or self.models:
            return self.unfit
        first = f"{' and '.join(several)}: of {self.sizes[0]} alone, the first size"
        return [*self.unfit, first]

    @property
    def most_models(self) -> int:
        """Of a set."""
        needed = [1]
        if "merge" in self.kinds:
            needed += [job.models for job in self.merges]
        if "walk" in self.kinds:
            needed.append(WALKED)
        return max(needed)

    @property
    def ceiling_bytes(self) -> int:
        """Of the buffers and the file that the ceilings are measured with: small for models that
        are small, as in tests.
        """
        return max(1 << 23, min(CEILING_BYTES, self._largest >> 20 << 20))

    @property
    def kernel_entries(self) -> int:
        return self.entries or min(ENTRIES, self._largest // 2)

    @property
    def op_tensors(self) -> tuple[str, ...]:
        fit = tuple(name for name in ("1M", "16M") if SIZES[name] <= self._largest)
        return self.tensors or fit or ("64K",)

    @property
    def _largest(self) -> int:
        """Bytes of a model."""
        return CEILING_BYTES if self.models else max(map(bytes_of_size, self.sizes))


def words(text: str, known: Iterable[str], what: str) -> tuple[str, ...]:
    """The words between commas, each of ``known``."""
    names, found = tuple(known), []
    for word in text.split(","):
        name = word.strip().lower()
        if name not in names:
            raise FastmergeError(f"{what}: unknown '{word.strip()}'; {nearest(name, names)}")
        found.append(name)
    return tuple(dict.fromkeys(found))


def numbers(text: str, least: int, most: int, what: str) -> tuple[int, ...]:
    """The whole numbers between commas, in the order given."""
    found = []
    for word in text.split(","):
        if not word.strip().isdecimal() or not least <= int(word) <= most:
            raise FastmergeError(
                f"{what}: '{word.strip()}' is not a whole number from {least} to {most}; write "
                "them with commas: 2,4,8"
            )
        found.append(int(word))
    return tuple(dict.fromkeys(found))


def sizes(text: str) -> tuple[str, ...]:
    return words(text, SHAPES, "--size")


def methods(text: str) -> tuple[str, ...]:
    return words(text, JOBS, "--methods")


def peer_names(text: str) -> tuple[str, ...]:
    return words(text, peers.NAMES, "--against")


def counts(text: str) -> tuple[int, ...]:
    return numbers(text, 2, _MOST_MODELS, "--count")


def steps(text: str) -> tuple[int, ...]:
    return numbers(text, 1, _MOST_STEPS, "--steps")


def opened(models: Sequence[str]) -> tuple[Path, ...]:
    """The user's models as absolute paths; ModelError for one that is not there or not whole."""
    found = []
    for reference in models:
        if is_remote(reference):
            raise ModelError(f"{reference}: benchmarks read local files; download it first")
        path = resolve(reference).resolve()
        if not is_adapter(path):
            Checkpoint.open(path)
        found.append(path)
    return tuple(found)


_OPTIONS_OF = {"--methods": ("merge",), "--steps": ("walk",), "--cache": WHOLES}


def refuse_idle(options: Iterable[str], kinds: Sequence[str], models: Sequence[Path]) -> None:
    """FastmergeError for one of the ``options`` given that nothing measured would follow."""
    for name in options:
        if name == "--size" and models:
            raise FastmergeError("--size: of models made for it, and --models are yours; leave one")
        able = _OPTIONS_OF.get(name, kinds)
        if not set(kinds) & set(able):
            raise FastmergeError(
                f"{name}: says nothing about {', '.join(kinds)}; it is for {', '.join(able)}"
            )


def refuse(request: Request) -> Request:
    """The request with its folder absolute; raises what stands in its way, in one line, before
    anything is written.
    """
    _peers(request)
    kinds = set(request.kinds)
    if request.models:
        if not kinds & set(WHOLES):
            raise FastmergeError(
                f"--models: {' and '.join(request.kinds)} measure tensors in memory; models are "
                f"for {', '.join(WHOLES)}"
            )
        if request.counts:
            raise FastmergeError("--count: the number of models follows from --models")
        if kinds == {"fold"}:
            _of_fold(request.models)
        elif len(request.models) < 2:
            raise FastmergeError("--models: give two or more; of a fold, the base and an adapter")
    if request.counts and "merge" not in kinds:
        raise FastmergeError(
            f"--count: of {', '.join(request.kinds)} the number of models is fixed"
        )
    if "merge" in kinds and not request.merges:
        raise FastmergeError(f"--count: {'; '.join(request.unfit)}")
    folder = request.folder.resolve()
    if not folder.is_dir():
        raise OutputError(f"{request.folder}: no such folder; create it, or give --folder another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"{request.folder}: not writable, and the temporary files go there; give --folder "
            "another"
        )
    _space(request, folder)
    return replace(request, folder=folder)


def _of_fold(models: Sequence[Path]) -> None:
    """FastmergeError for a model that would not be looked at."""
    for model in models[1:]:
        if not is_adapter(model) or len(models) > 2:
            raise FastmergeError(
                f"--models: {model}: a fold is of a base and one adapter; give those, or the base "
                "alone, for which one is made"
            )


def _peers(request: Request) -> None:
    for name in request.against:
        if not any(name in PEERS[kind] for kind in request.kinds):
            able = [kind for kind, known in PEERS.items() if name in known]
            raise FastmergeError(
                f"--against {name}: {', '.join(request.kinds)} cannot be compared with it; "
                f"{' and '.join(able)} can"
            )
        missing = [module for module in peers.MODULES[name] if find_spec(module) is None]
        if missing:
            alone = [module for module in missing if module == "peft"]  # which no extra brings
            how = f"pip install {' '.join(alone)}"
            if missing != alone:
                how = install("bench" if name == "mergekit" else "llama", *alone)
            raise ResourceError(f"--against {name}: {missing[0]} is not installed; {how}")
    if "torch" in request.against and "merge" in request.kinds and "ops" not in request.kinds:
        absent = [name for name in request.methods if name not in WHOLE]
        if len(absent) == len(request.methods):
            raise FastmergeError(
                f"--against torch: there is no plain torch for {', '.join(absent)}; "
                f"{', '.join(WHOLE)} have one"
            )


def _space(request: Request, folder: Path) -> None:
    """Models and output at their most; of a walk by mergekit two states besides."""
    needed = request.ceiling_bytes
    if set(request.kinds) & set(WHOLES):
        if request.models:
            size = max(
                Checkpoint.open(model).total_bytes
                for model in request.models
                if not is_adapter(model)
            )
            made = 0
        else:
            size = max(bytes_of_size(name) for name in request.sizes)
            made = 0 if request.sets or request.sparse else size * request.most_models
        outputs = 3 if "walk" in request.kinds and "mergekit" in request.against else 1
        needed = max(needed, made + outputs * size + size // 8)
    check_space(folder, needed + _SPARE)

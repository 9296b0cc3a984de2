"""Whole processes over models on disk, from start to exit, each beside the floor of its bytes.

Every repetition runs the floor, fastmerge and the peers one after another on files in the same
state, so that a noisy neighbour hits all of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastmerge.bench import check, recipes
from fastmerge.bench.checkpoints import write_adapter
from fastmerge.bench.expressions import WHOLE
from fastmerge.bench.floor import run_floor
from fastmerge.bench.pagecache import HOW_COLD, bytes_of, clear, evict, files_of, warm
from fastmerge.bench.peers import run_peer
from fastmerge.bench.process import Run, measure
from fastmerge.bench.request import WALKED, Request
from fastmerge.bench.rows import Row, WrongResultError, row_of_processes
from fastmerge.errors import ResourceError, UnsupportedError
from fastmerge.models.adapter import is_adapter
from fastmerge.output.disk import remove_tree
from fastmerge.search.folder import MODEL_FOLDER

Tell = Callable[[str], None]
Peer = Callable[[Path], Run]  # of the output


@dataclass(frozen=True)
class Whole:
    """One thing to run: ``command`` without the output, which goes last but for ``options``.
    ``checked``: what a written model is compared with, in words. ``inside``: where in the output
    the model is.
    """

    kind: str
    job: str
    inputs: tuple[Path, ...]
    bytes_out: int
    command: tuple[str | Path, ...]
    options: tuple[str, ...]
    checked: Callable[[Path], str]
    peers: Mapping[str, Peer] = field(default_factory=dict)
    inside: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        return sum(map(bytes_of, self.inputs)) + self.bytes_out


def fastmerge(*words: str | Path) -> tuple[str | Path, ...]:
    return (sys.executable, "-m", "fastmerge", *words)


def run(whole: Whole, place: Path, request: Request, tell: Tell) -> tuple[list[Row], list[str]]:
    """A row for each state of the page cache, and notes about those that could not be had."""
    rows, notes = [], []
    first: Any = None
    for cache in request.caches_of(whole.kind):
        runner = _Runner(whole, place, request, cache, tell)
        runner.first = first
        rows += runner.rows()
        notes += runner.notes
        first = runner.first
    return rows, notes


class _Runner:
    """The repetitions of one thing in one state of the page cache."""

    def __init__(self, whole: Whole, place: Path, request: Request, cache: str, tell: Tell) -> None:
        self._whole, self._place, self._request = whole, place, request
        self._cache, self._tell = cache, tell
        self._files = [file for model in whole.inputs for file in files_of(model)]
        self._outputs = [place / name for name in ("out", "floor.bin", "peer")]
        self._warm_share = 1.0
        self._why_not_cold = ""
        self.first: Any = None  # the checksums that every repetition comes to
        self.notes: list[str] = []

    def rows(self) -> list[Row]:
        runs: dict[str, list[Run]] = {"floor": [], "fastmerge": []}
        said = ""
        for number in range(self._request.repeat):
            floor = []
            if not self._request.sparse:  # holes are read at no speed that means anything
                if not self._ready():
                    break
                floor.append(self._floor())
            if not self._ready():
                break
            out = self._outputs[0]
            command = [*self._whole.command, out, *self._whole.options]
            runs["fastmerge"].append(measure(command, folder=self._place).run)
            runs["floor"] += floor
            said = self._check(out / self._whole.inside) or said
            for name, peer in self._whole.peers.items():
                if (number < self._request.peer_repeat or name == "one-shot") and self._ready():
                    runs.setdefault(name, []).extend(self._of_peer(name, peer))
            shown = ", ".join(
                f"{name} {own[-1].seconds:.2f} s" for name, own in runs.items() if own
            )
            of = f"{number + 1} of {self._request.repeat}"
            self._tell(f"{self._whole.job}, {self._cache}, {of}: {shown}")
        clear(self._outputs)
        done = len(runs["fastmerge"])
        if self._why_not_cold:
            left = f"{done} of {self._request.repeat} cold runs" if done else "no cold figure"
            self._note(
                f"{left}, as the models cannot be made cold ({HOW_COLD}): {self._why_not_cold}"
            )
        if not done:
            return []
        about = {"cache": self._state, "checked": said, **self._whole.about}
        return [
            row_of_processes(self._whole.kind, self._whole.job, runs, self._whole.moved, **about)
        ]

    def _of_peer(self, name: str, peer: Peer) -> list[Run]:
        """Its run; none, and a note, where another program cannot do it: what was measured before
        is not lost with it.
        """
        try:
            return [peer(self._outputs[2])]
        except ResourceError as error:
            if name == "one-shot":  # which is fastmerge
                raise
            self._note(f"no figure of {name}: {str(error).rstrip('.')}")
            return []

    def _note(self, text: str) -> None:
        self.notes.append(f"{self._whole.job}: {text}")

    @property
    def _state(self) -> str:
        if self._request.sparse:
            return "holes"
        if self._cache == "warm" and self._warm_share < 1:
            return f"{self._warm_share:.0%} warm"
        return self._cache

    def _ready(self) -> bool:
        """Old outputs away and the inputs in the state; False where that cannot be."""
        clear(self._outputs)
        if self._cache == "cold":
            state = evict(self._files)
            if not state.is_cold:
                self._why_not_cold = state.why_not_cold
            return state.is_cold
        if not self._request.sparse:
            state = warm(self._whole.inputs)
            if not state.is_warm:
                self._warm_share = min(self._warm_share, state.share)
        return True

    def _floor(self) -> Run:
        return run_floor(
            self._files, self._outputs[1], self._whole.bytes_out,
            threads=self._request.threads, cold=self._cache == "cold",
        )  # fmt: skip

    def _check(self, model: Path) -> str:
        """The first result is compared with NumPy's, the others with the first."""
        found = check.checksums(model)
        if self.first is None:
            said = self._whole.checked(model)
            self.first = found, said
            return said
        if found != self.first[0]:
            changed = sorted(name for name in found if found[name] != self.first[0].get(name))
            raise WrongResultError(
                f"{self._whole.job}: wrong: another run wrote other bits ({changed[0]}); no figure "
                "is given. This is a defect of fastmerge, or of this machine's memory: please "
                "report it"
            )
        return str(self.first[1])


# --- what is run ---


def merges(
    models: Sequence[Path], request: Request, place: Path, dtype: str | None, about: Row
) -> list[Whole]:
    """Each of the request's merges of a set of models; everything is planned, so that what cannot
    be merged is refused here.
    """
    from fastmerge import api

    made = []
    for job in request.merges:
        recipe = job.recipe(models, dtype)
        plan = api.plan(recipe)
        path = _recipe(place / f"{job.method}-{job.models}.yml", recipe)
        peers: dict[str, Peer] = {}
        for name in request.peers_of("merge"):
            if name != "torch" or job.method in WHOLE:
                peers[name] = partial(run_peer, name, path)
        made.append(
            Whole(
                "merge", job.title, tuple(models[: job.models]), plan.bytes_out,
                fastmerge("merge", path), _options(request, "--fresh"),
                partial(check.written, recipe=recipe), peers,
                about={**about, "method": job.method, "models": job.models},
            )
        )  # fmt: skip
    return made


def walks(
    models: Sequence[Path], request: Request, place: Path, dtype: str | None, about: Row
) -> list[Whole]:
    """A walk of each number of steps, beside a one-shot merge of the same models."""
    from fastmerge import api

    used = models[:WALKED]
    recipe = recipes.one_shot(used, dtype)
    plan, path = api.plan(recipe), _recipe(place / "one-shot.yml", recipe)
    made = []
    for steps in request.steps:
        schedule = _recipe(place / f"walk-{steps}.yml", recipes.walk(used, steps))
        peers: dict[str, Peer] = {"one-shot": partial(_one_shot, path, request)}
        if "mergekit" in request.peers_of("walk"):
            peers["mergekit"] = partial(_by_mergekit, used, steps, dtype)
        made.append(
            Whole(
                "walk", f"walk of {steps} SLERP step{'s'[: steps != 1]}, {len(used)} models",
                tuple(used), plan.bytes_out, fastmerge("retrograde", schedule),
                _options(request, "--no-evaluate"),
                partial(check.walked, models=used, steps=steps), peers, MODEL_FOLDER,
                {**about, "models": len(used), "steps": steps},
            )
        )  # fmt: skip
    return made


def folds(models: Sequence[Path], request: Request, place: Path, about: Row) -> list[Whole]:
    """An adapter into the first model: the second, if it is one, else one on all linear layers."""
    from fastmerge import api

    base, adapter = models[0], place / "adapter"
    if len(models) > 1 and is_adapter(models[1]):
        adapter = models[1]
        title = f"fold, {adapter.name}"
    else:
        write_adapter(adapter, base, request.rank)
        title = f"fold, rank {request.rank}"
    recipe = api.fold_recipe(str(base), str(adapter))
    plan = api.plan(recipe)
    peers: dict[str, Peer] = {}
    if "peft" in request.peers_of("fold"):
        peers["peft"] = partial(run_peer, "peft", base, adapter)
    return [
        Whole(
            "fold", title, (base, adapter), plan.bytes_out, fastmerge("fold", base, adapter),
            _options(request, "--fresh"), partial(check.written, recipe=recipe), peers,
            about={**about, "models": 1},
        )
    ]  # fmt: skip


def _options(request: Request, *more: str) -> tuple[str, ...]:
    return ("--quiet", "--threads", str(request.threads), *more)


def _recipe(path: Path, recipe: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(recipe))  # which is YAML
    return path


def _one_shot(recipe: Path, request: Request, out: Path) -> Run:
    command = [*fastmerge("merge", recipe), out, *_options(request, "--fresh")]
    return measure(command, folder=out.parent).run


def _by_mergekit(models: Sequence[Path], steps: int, dtype: str | None, out: Path) -> Run:
    """The walk as one merge after another through the disk; two states at most stay there."""
    state, seconds, cpu_seconds, rss, anonymous = models[0], 0.0, 0.0, 0, 0
    out.mkdir()
    for number in range(steps):
        other = models[recipes.partner_of(number, len(models))]
        if other == state:
            continue
        recipe = _recipe(out / "step.yml", recipes.step(state, other, number, dtype))
        made = out / f"state{number}"
        done = run_peer("mergekit", recipe, made)
        seconds, cpu_seconds = seconds + done.seconds, cpu_seconds + done.cpu_seconds
        rss = max(rss, done.peak_rss_bytes)
        anonymous = max(anonymous, done.peak_anonymous_bytes)
        if state != models[0]:
            remove_tree(state)
        state = made
    return Run(seconds, cpu_seconds, rss, anonymous)


def refuse_adapters(models: Sequence[Path], kind: str) -> None:
    """UnsupportedError for an adapter among what is merged or walked over."""
    for model in models:
        if is_adapter(model):
            raise UnsupportedError(
                f"{model}: an adapter; {kind} takes models. `bench fold` folds it"
            )

"""Evaluators as actors of a Ray cluster: one that is lost is started again, and what it was
measuring is measured again.

Ray's own restarts are not used: an actor whose node is gone waits for another with room, while one
that is idle beside it could measure what the lost one did.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastmerge.compute.cpu import thread_count
from fastmerge.engine.cluster import RETRIES, Started, connected, nodes_of, refusal_of
from fastmerge.errors import ResourceError, UnsupportedError
from fastmerge.evaluation.evaluators import Evaluators, Make, within

PLACE_SECONDS = 300.0  # in which a cluster without any evaluator must find room for one


def evaluators_on(
    cluster: str, make: Make, folder: Path, *, device: str = "cpu", threads: int | None = None
) -> AbstractContextManager[RayEvaluators]:
    """`RayEvaluators` `within` the run's ``folder``."""
    return within(folder, lambda: RayEvaluators(make, cluster, device=device, threads=threads))


class RayEvaluators(Evaluators):
    """`Evaluators` on a Ray cluster, as many as its CPUs or GPUs allow; started as they are needed.

    A request goes to one evaluator; if that is lost, to another, three times at most.
    """

    def __init__(
        self, make: Make, cluster: str, *, device: str = "cpu", threads: int | None = None
    ) -> None:
        """``cluster``: see `connected`; ``device``: what evaluators compute on, "cpu" or "cuda";
        ``threads``: of each, by default those of the smallest node, or its GPU's share of them.
        Raises FastmergeError.
        """
        super().__init__()
        if device.partition(":")[2]:
            raise UnsupportedError(
                f"cluster: each evaluator has a GPU of its own; write device: cuda, not {device}"
            )
        gpus = int(device == "cuda")
        ray = connected(cluster)
        nodes = nodes_of(ray, cluster)
        if gpus:
            nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
            if not nodes:
                raise ResourceError(
                    f"cluster: {cluster} has no node with a GPU; use device: cpu, or start one"
                )
        share = min(node["CPU"] / (node["GPU"] if gpus else 1) for node in nodes)
        self.threads = max(1, int(share) if threads is None else thread_count(threads))
        cpus = min(self.threads, int(min(node["CPU"] for node in nodes)))
        self.count = int(sum(_room(node, cpus, gpus) for node in nodes))
        self._actor = ray.remote(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )(_Evaluator)
        self._ray, self._cluster, self._started = ray, cluster, Started()
        self._make = ray.put(make)
        self._numbers = 0
        self._actors: list[Any] = []
        self._idle: list[Any] = []
        # What has been asked of actors: to find a place; to be made (key None) or to measure; to
        # show that they are there.
        self._placing: dict[Any, tuple[Any, int]] = {}
        self._busy: dict[Any, tuple[Any, str | None]] = {}
        self._alive: dict[Any, Any] = {}
        self._lost: dict[str | None, int] = {}
        self._seen = time.monotonic()  # when an actor was at work last

    def close(self) -> None:
        """See `Evaluators`."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._idle = [], []

    def _given(self, answer: Any) -> Any:
        if not isinstance(answer, self._ray.exceptions.RayTaskError):
            return answer
        refusal = refusal_of(answer)
        if refusal is not None:
            raise refusal from None
        raise answer

    def _feed(self) -> None:
        """See `Evaluators`."""
        while self._idle and self._left:
            actor, key = self._idle.pop(), self._next()
            self._busy[actor.measure.remote(self._requests[key])] = actor, key
        coming = len(self._placing) + sum(key is None for _, key in self._busy.values())
        while coming < self._left and len(self._actors) < self.count:
            self._numbers += 1
            coming += 1
            actor = self._actor.remote()
            self._actors.append(actor)
            self._placing[actor.enter.remote(self._started)] = actor, self._numbers

    def _turn(self) -> None:
        """See `Evaluators`."""
        ray = self._ray
        ended, _ = ray.wait([*self._placing, *self._busy, *self._alive], timeout=1.0)
        if self._busy or ended:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > PLACE_SECONDS:
            raise ResourceError(
                f"cluster: no node of {self._cluster} had room for an evaluator in "
                f"{PLACE_SECONDS:.0f} s; see what else is running there"
            )
        for done in ended:
            placed, number = self._placing.pop(done, (None, 0))
            actor, key = self._busy.pop(done, (placed, None))
            idle = self._alive.pop(done, None)
            try:
                found = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                found = error
            except ray.exceptions.RayError as error:
                self._drop(idle or actor)
                if idle is None:
                    self._again(key, error)
                continue
            if key is not None:
                self._answers[key] = found
            else:
                self._given(found)
            if placed is None:
                self._idle.append(idle or actor)
                self._lost.pop(None, None)  # what starts now may be lost as often again
            else:
                self._busy[actor.make.remote(self._make, number, self.threads)] = actor, None

    def _drop(self, actor: Any) -> None:
        """Forgets a lost actor; asks those that are idle whether they went with it."""
        self._actors.remove(actor)
        self._ray.kill(actor)  # of one that only cannot be reached
        self._alive |= {other.enter.remote(self._started): other for other in self._idle}
        self._idle = []

    def _again(self, key: str | None, error: Exception) -> None:
        """Puts what a lost actor was measuring where the next one takes it."""
        self._lost[key] = self._lost.get(key, 0) + 1
        if self._lost[key] > RETRIES:
            what = "starting" if key is None else "measuring one candidate"
            raise ResourceError(
                f"cluster: evaluators were lost {RETRIES + 1} times while {what} "
                f"({type(error).__name__}); is there memory for a model on each?"
            ) from error
        if key is not None:
            self._waiting.appendleft(key)


class _Evaluator:
    """An actor: one evaluator. It is made by a method: what that raises reaches who asked."""

    def enter(self, started: Started) -> None:
        started.enter()

    def make(self, make: Make, number: int, threads: int) -> None:
        self._measure = make(number, threads)

    def measure(self, request: Any) -> Any:
        return self._measure(request)


def _room(node: Mapping[str, float], cpus: int, gpus: int) -> int:
    free = int(node["CPU"] // cpus)
    return min(free, int(node["GPU"])) if gpus else free

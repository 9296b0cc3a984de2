"""A merge on a cluster: its parts as Ray tasks, which Ray starts again where a node is lost.

The plan is made once, here, and travels. The parts meet in the output's folder, which all nodes
must see under the same path, as they must the models; everything that makes parts safe (claims,
journals, one plan) is theirs, so that a task that is started twice, or a driver that is killed,
costs no more than what was not finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmerge.compute.cpu import thread_count
from fastmerge.engine.cluster import RETRIES, Started, connected, nodes_of, refusal_of
from fastmerge.engine.join import finish
from fastmerge.engine.merge import merge_plan
from fastmerge.engine.report import MergeReport
from fastmerge.errors import ResourceError
from fastmerge.output.claim import WATCH_SECONDS, AtWorkError
from fastmerge.output.layout import Layout
from fastmerge.output.share import Part
from fastmerge.planning.plan import Plan
from fastmerge.progress import Progress

_TELL_SECONDS = 0.2  # between two words of a part on how far it is
_PARTS_A_NODE = 4  # so that a node that is lost or slow leaves the others little


def merge_on_cluster(
    plan: Plan,
    out: Path,
    cluster: str,
    *,
    max_shard_bytes: int,
    overwrite: bool = False,
    fresh: bool = False,
    progress: Progress | None = None,
    threads: int | None = None,
    **options: Any,
) -> MergeReport:
    """`merge_plan` in parts on the Ray cluster at ``cluster``: "auto" (the one that is here, else
    one of this machine alone) or an address. ``threads``: of each part, by default a node's least.
    The bytes are those of one merge. Raises FastmergeError.
    """
    begun = time.perf_counter()
    ray = connected(cluster)
    nodes = nodes_of(ray, cluster)
    fewest = int(min(node["CPU"] for node in nodes))
    each = max(1, fewest if threads is None else thread_count(threads))
    shards = len(Layout.plan(plan.written, max_shard_bytes=max_shard_bytes).shards)
    count = min(shards, _PARTS_A_NODE * len(nodes))
    bar = _bar(ray)
    shared, started = ray.put(plan), Started()
    common = {"max_shard_bytes": max_shard_bytes, "overwrite": overwrite, "fresh": fresh}
    common |= {"threads": each, **options}
    task = ray.remote(
        max_retries=RETRIES, num_cpus=min(each, fewest), scheduling_strategy="SPREAD"
    )(_merge_part)
    waiting = [
        task.remote(started, shared, str(out.absolute()), Part(number, count), common, bar)
        for number in range(1, count + 1)
    ]
    reports: list[MergeReport] = []
    far = 0
    total = sum(item.bytes_moved for item in plan.tensors)
    try:
        while waiting:
            ended, waiting = ray.wait(waiting, timeout=_TELL_SECONDS)
            reports += [_result(ray, done) for done in ended]
            if progress is not None:
                far, name = _heard(ray, bar, far)
                progress(min(far, total), total, name)
    finally:
        for left in waiting:
            ray.cancel(left, force=True)
        ray.kill(bar)
    joined = finish(out, overwrite=overwrite)
    first = reports[0]
    return replace(
        first,
        out=out,
        seconds=time.perf_counter() - begun,
        bytes_read=sum(report.bytes_read for report in reports),
        bytes_written=joined.bytes_written,
        tensors=joined.tensors,
        resumed=sum(report.resumed for report in reports),
        peak_anonymous_bytes=max(report.peak_anonymous_bytes for report in reports),
        nonfinite=joined.nonfinite,
        notes=(
            *dict.fromkeys(note for report in reports for note in report.notes),
            *joined.notes,
            f"{count} part{'s'[: count != 1]} on {len(nodes)} node{'s'[: len(nodes) != 1]}",
        ),
        part="",
    )


def _result(ray: Any, done: Any) -> MergeReport:
    try:
        report: MergeReport = ray.get(done)
    except ray.exceptions.RayTaskError as error:
        refusal = refusal_of(error)
        if refusal is not None:
            raise refusal from None
        raise
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"cluster: a part was lost {RETRIES + 1} times ({type(error).__name__}); the same "
            "command goes on where the others are"
        ) from error
    return report


def _heard(ray: Any, bar: Any, far: int) -> tuple[int, str]:
    """How far all parts are, never less than ``far``, and what one of them is at."""
    try:
        done, name = ray.get(bar.said.remote())
    except ray.exceptions.RayActorError:  # lost with its node; the next one is told anew
        return far, ""
    return max(far, done), name


class _Bar:
    """How far all parts are; an actor beside the driver."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}
        self._name = ""

    def tell(self, part: int, done: int, name: str) -> None:
        self._done[part], self._name = done, name

    def said(self) -> tuple[int, str]:
        return sum(self._done.values()), self._name


def _bar(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(_Bar).remote()


def _merge_part(
    started: Started, plan: Plan, out: str, part: Part, options: Mapping[str, Any], bar: Any
) -> MergeReport:
    """A task: one part, as `fastmerge merge --part` does it."""
    started.enter()
    told = 0.0

    def tell(done: int, total: int, name: str) -> None:
        nonlocal told
        if done == total or time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            bar.tell.remote(part.number, done, name)

    until = time.monotonic() + 2 * WATCH_SECONDS
    while True:
        try:
            return merge_plan(plan, Path(out), part=part, progress=tell, **options)
        except AtWorkError:  # the run that was lost with its node may take a while to end
            if time.monotonic() > until:
                raise
            time.sleep(1)

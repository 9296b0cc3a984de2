"""Merges, walks and sweeps on a Ray cluster of several nodes, which are killed in the middle."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge import api
from fastmerge.engine import on_ray
from fastmerge.errors import ResourceError
from fastmerge.evaluation.on_ray import RayEvaluators
from fastmerge.retrograde import run
from fastmerge.search.sweep import sweep
from tests.cluster_runs import MARKS, files, recipe, tree, within_its_limits
from tests.cluster_runs import score as scored
from tests.test_remote import recipe as slerp
from tests.test_remote import server, upload  # noqa: F401 (a fixture)

ray = pytest.importorskip("ray", reason="ray is 200 MB on the disk: not in the extra test")
pytest_plugins = "tests.cluster_runs"

NODES, GPUS = 3, 2


@pytest.fixture(scope="module")
def nodes(server: Any) -> Iterator[Any]:  # noqa: F811
    """A head without CPUs, and nodes with one each."""
    from ray.cluster_utils import Cluster

    assert server  # whose address and credentials the nodes inherit
    own = {"num_cpus": 0, "include_dashboard": False}
    with ExitStack() as ends:
        with within_its_limits():
            found = Cluster(initialize_head=True, head_node_args=own)
            ends.callback(found.shutdown)
            for _ in range(NODES):
                found.add_node(num_cpus=1)
            ray.init(found.address, log_to_driver=False, logging_level="ERROR")
            ends.callback(ray.shutdown)
        yield found


@pytest.fixture
def whole(nodes: Any) -> Iterator[Any]:
    """All nodes, again after a test that killed some."""
    yield nodes
    for node in list(nodes.worker_nodes):
        if node.all_processes["raylet"][0].process.poll() is not None:
            nodes.remove_node(node, allow_graceful=False)
            nodes.add_node(num_cpus=1)


def kill_this_node() -> None:
    """Ends Ray's process of the node that this runs on, and what it has started."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def score(model: Any, split: str = "steer", limit: int | None = None) -> Mapping[str, Any]:
    """That of cluster_runs; the node of the first to find the mark is gone."""
    folder = Path(os.environ[MARKS])
    try:
        (folder / "kill node").rename(folder / "killed node")
    except FileNotFoundError:
        return scored(model, split, limit)
    kill_this_node()
    raise AssertionError("killed")


def dying(started: Any, plan: Any, out: str, part: Any, options: Any, bar: Any) -> Any:
    """A part whose node is killed at its first tensor; the first part that comes to that."""
    merge, mark = on_ray.merge_plan, Path(out).parents[1] / "kill node"

    def slow(*args: Any, progress: Any, **others: Any) -> Any:
        def tell(*how_far: Any) -> None:
            try:
                mark.rename(mark.with_name("killed node"))
            except FileNotFoundError:
                progress(*how_far)
            else:
                kill_this_node()

        return merge(*args, progress=tell, **others)

    on_ray.merge_plan = slow
    try:
        return on_ray._merge_part(started, plan, out, part, options, bar)
    finally:
        on_ray.merge_plan = merge


@pytest.mark.usefixtures("whole")
def test_a_merge_whose_node_is_killed(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = recipe(zoo)
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    fastmerge.merge(said, tmp_path / "one" / "out", max_shard_bytes=10_000)
    (tmp_path / "kill node").touch()
    monkeypatch.setattr(on_ray, "_merge_part", dying)
    report = fastmerge.merge(
        said, tmp_path / "many" / "out", max_shard_bytes=10_000, cluster="auto", threads=1
    )
    assert files(tmp_path / "one" / "out") == files(tmp_path / "many" / "out")
    assert (tmp_path / "killed node").exists() and f"on {NODES} nodes" in report.notes[-1]
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["out"]


@pytest.mark.usefixtures("whole")
def test_a_walk_whose_evaluators_node_is_killed(
    schedule: dict[str, Any], tmp_path: Path, marks: Path
) -> None:  # fmt: skip
    for name, cluster in (("one", None), ("many", "auto")):
        (tmp_path / name).mkdir()
        (marks / "kill node").touch() if cluster else None
        run(schedule, tmp_path / name / "out", score=score, threads=1, cluster=cluster)
    assert (marks / "killed node").exists()
    assert tree(tmp_path / "one" / "out") == tree(tmp_path / "many" / "out")


@pytest.mark.usefixtures("whole")
def test_a_sweep_whose_evaluators_node_is_killed(
    schedule: dict[str, Any], tmp_path: Path, marks: Path
) -> None:  # fmt: skip
    said = {
        "merge_method": "slerp", "base_model": schedule["baseline"]["model"],
        "models": [{"model": schedule["baseline"]["model"]}, {"model": schedule["pool"][0]}],
        "parameters": {"t": 0.5}, "dtype": "float32",
    }  # fmt: skip
    for name, cluster in (("one", None), ("many", "auto")):
        (tmp_path / name).mkdir()
        (marks / "kill node").touch() if cluster else None
        sweep(
            said, tmp_path / name / "out", [0.0, 0.25, 0.5, 1.0], score=score, cluster=cluster,
            evaluate={"callable": "stand:in"}, threads=1,
        )  # fmt: skip
    assert (marks / "killed node").exists()
    assert tree(tmp_path / "one" / "out") == tree(tmp_path / "many" / "out")


@pytest.mark.usefixtures("whole")
def test_models_by_url_on_a_cluster(zoo: Any, tmp_path: Path) -> None:
    base = zoo.base("base", shards=3)
    urls = [upload(base), upload(zoo.tune(base, "tune"))]
    assert b"very-secret" not in pickle.dumps(api.plan(slerp(urls)))
    for name, cluster in (("one", None), ("many", "auto")):
        (tmp_path / name).mkdir()
        fastmerge.merge(
            slerp(urls), tmp_path / name / "out", cluster=cluster, max_shard_bytes=20_000
        )
    assert files(tmp_path / "one" / "out") == files(tmp_path / "many" / "out")


def places(_: int, threads: int) -> Any:
    def measure(_: Any) -> Any:
        time.sleep(0.3)  # for another to take the next
        node = ray.get_runtime_context().get_node_id()
        return node, os.environ.get("CUDA_VISIBLE_DEVICES"), threads

    return measure


def test_each_evaluator_has_a_gpu_of_its_own(nodes: Any) -> None:
    """By what Ray is asked for: it counts GPUs that a node says it has."""
    with pytest.raises(ResourceError, match="no node with a GPU"):
        RayEvaluators(places, "auto", device="cuda")
    node = nodes.add_node(num_cpus=5, num_gpus=GPUS)
    found = RayEvaluators(places, "auto", device="cuda")
    try:
        assert (found.count, found.threads) == (GPUS, 2)
        for key in range(6):
            found.begin(str(key), key)
        seen = {found.answer(str(key), key) for key in range(6)}
        assert seen == {(node.node_id, str(gpu), 2) for gpu in range(GPUS)}
    finally:
        found.close()
        nodes.remove_node(node)

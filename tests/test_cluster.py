"""Parts, walks and sweeps on a Ray cluster of this machine, whose workers are killed meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge import FastmergeError, api
from fastmerge.engine import on_ray
from fastmerge.errors import ResourceError, UnsupportedError
from fastmerge.evaluation import on_ray as evaluators_on_ray
from fastmerge.evaluation.on_ray import RayEvaluators
from fastmerge.retrograde import driver, load, run
from fastmerge.retrograde.runner import describe
from fastmerge.search.families import BASELINES
from fastmerge.search.sweep import sweep
from tests.cluster_runs import files, recipe, score, tree, within_its_limits

ray = pytest.importorskip("ray", reason="ray is 200 MB on the disk: not in the extra test")
pytest_plugins = "tests.cluster_runs"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with within_its_limits():
        ray.init(
            "local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_the_bytes_of_one_merge_though_workers_are_killed(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = recipe(zoo)
    told: list[Any] = []
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
    fastmerge.merge(said, tmp_path / "one" / "out", max_shard_bytes=10_000)
    monkeypatch.setattr(on_ray, "_merge_part", killed_once)
    report = fastmerge.merge(
        said, tmp_path / "many" / "out", max_shard_bytes=10_000, cluster="auto", threads=1,
        progress=lambda *each: told.append(each),
    )  # fmt: skip
    assert files(tmp_path / "one" / "out") == files(tmp_path / "many" / "out")
    assert len(list(tmp_path.glob("killed-*"))) == 2
    assert report.tensors == len(api.plan(said).tensors) and "on 1 node" in report.notes[-1]
    assert told and told[-1][0] <= told[-1][1] and not report.part
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["out"]


def killed_once(version: str, plan: Any, out: str, part: Any, options: Any, bar: Any) -> Any:
    """A part whose process is killed at its first tensor, the first time; of parts 1 and 2."""
    merge = on_ray.merge_plan

    def dying(*args: Any, progress: Any, **others: Any) -> Any:
        def tell(*how_far: Any) -> None:
            mark = Path(out).parents[1] / f"killed-{part.number}"
            if part.number < 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            progress(*how_far)

        return merge(*args, progress=tell, **others)

    on_ray.merge_plan = dying
    try:
        return on_ray._merge_part(version, plan, out, part, options, bar)
    finally:
        on_ray.merge_plan = merge


@pytest.mark.usefixtures("cluster")
def test_a_refusal_of_a_part_is_one_line(zoo: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FastmergeError, match="out: exists; choose another output") as no:
        fastmerge.merge(recipe(zoo), tmp_path / "out", cluster="auto")
    assert "\n" not in str(no.value)


def test_what_a_cluster_does_not_take_is_one_line(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedError, match="part and cluster: a cluster merges all parts"):
        fastmerge.merge(recipe(zoo), tmp_path / "new", cluster="auto", part=(1, 2))
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ResourceError, match=r"a cluster is reached by Ray; run: pip install"):
        fastmerge.merge(recipe(zoo), tmp_path / "out", cluster="auto")


def test_a_node_that_cannot_load_what_it_is_sent_is_one_line() -> None:
    said = RuntimeError("The remote function failed to import on the worker.\n\nTraceback ...")
    error = ray.exceptions.RayTaskError("_merge_part", "Traceback ...", said)

    class Lost:
        exceptions = ray.exceptions

        def get(self, _: Any) -> Any:
            raise error

    with pytest.raises(ResourceError, match="cluster: a node cannot load what it was sent") as no:
        on_ray._result(Lost(), None)
    assert "\n" not in str(no.value)


def test_an_address_with_a_password_is_not_shown(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(FastmergeError, match="an address with a name or a password") as no:
        fastmerge.merge(recipe(zoo), tmp_path / "out", cluster="ray://me:secret@head:10001")
    assert "secret" not in str(no.value)


# --- measurements side by side ---


def at_work(marks: Path) -> set[int]:
    found = {int(path.name.partition("-")[2]) for path in marks.glob("evaluator-*")}
    return found - {os.getpid()}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("rule", ["always", "improve"])
def test_every_file_is_that_of_a_run_without(
    schedule: dict[str, Any], tmp_path: Path, marks: Path, rule: str
) -> None:
    schedule["accept"] = {"rule": rule}
    schedule["compare"] = {"methods": list(BASELINES), "seeds": 2, "budget": 3}
    schedule["evaluate"] |= {"stages": [4]}
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    run(schedule, tmp_path / "one" / "out", score=score, threads=1)
    assert not at_work(marks)
    (marks / "kill").touch()
    run(schedule, tmp_path / "many" / "out", score=score, threads=1, cluster="auto")
    assert (marks / "killed").exists() and len(at_work(marks)) >= 2
    one, many = tree(tmp_path / "one" / "out"), tree(tmp_path / "many" / "out")
    assert one.keys() == many.keys()
    assert [name for name in one if one[name] != many[name]] == []


@pytest.mark.usefixtures("cluster")
def test_a_sweep_s_files_are_those_of_one_without(
    schedule: dict[str, Any], tmp_path: Path, marks: Path
) -> None:
    recipe = {
        "merge_method": "slerp", "base_model": schedule["baseline"]["model"],
        "models": [{"model": schedule["baseline"]["model"]}, {"model": schedule["pool"][0]}],
        "parameters": {"t": 0.5}, "dtype": "float32",
    }  # fmt: skip
    for name, cluster in (("one", None), ("many", "auto")):
        (tmp_path / name).mkdir()
        (marks / "kill").touch() if cluster else None
        sweep(
            recipe, tmp_path / name / "out", [0.0, 0.25, 0.5, 1.0], score=score, cluster=cluster,
            evaluate={"callable": "stand:in"}, threads=1,
        )  # fmt: skip
    assert tree(tmp_path / "one" / "out") == tree(tmp_path / "many" / "out")
    assert (marks / "killed").exists() and len(at_work(marks)) >= 2


@pytest.mark.usefixtures("cluster", "marks")
def test_a_run_that_was_begun_alone_goes_on_on_a_cluster(
    schedule: dict[str, Any], tmp_path: Path
) -> None:
    def stops(trajectory: Any) -> None:
        if len(trajectory.states) == 3:
            raise KeyboardInterrupt

    run(schedule, tmp_path / "a" / "out", score=score, threads=1)
    with pytest.raises(KeyboardInterrupt):
        run(schedule, tmp_path / "b" / "out", score=score, threads=1, on_step=stops)
    run(schedule, tmp_path / "b" / "out", score=score, threads=1, cluster="auto", resume=True)
    assert tree(tmp_path / "a" / "out") == tree(tmp_path / "b" / "out")


@pytest.mark.usefixtures("cluster", "marks")
def test_what_an_evaluator_refuses_is_one_line(schedule: dict[str, Any], tmp_path: Path) -> None:
    def broken(_: Any) -> float:
        raise ValueError("not this one")

    with pytest.raises(FastmergeError, match="ValueError: not this one") as no:
        run(schedule, tmp_path / "out", score=broken, threads=1, cluster="auto")
    assert "\n" not in str(no.value)
    schedule["evaluate"]["device"] = "cuda"
    with pytest.raises(ResourceError, match="has no node with a GPU; use device: cpu"):
        run(schedule, tmp_path / "out", score=score, threads=1, cluster="auto")
    schedule["evaluate"]["device"] = "cuda:1"
    with pytest.raises(UnsupportedError, match="write device: cuda, not cuda:1"):
        run(schedule, tmp_path / "out", score=score, threads=1, cluster="auto")
    with pytest.raises(UnsupportedError, match="cluster: measures, and this run measures nothing"):
        run(schedule, tmp_path / "out", evaluate=False, cluster="auto")


def makes(number: int, threads: int) -> Any:
    def measure(request: Any) -> Any:
        if request == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if request == "who":
            time.sleep(0.3)  # for another to take the next
            return os.getpid()
        return number, threads, request

    return measure


@pytest.mark.usefixtures("cluster")
def test_what_is_lost_again_and_again_is_given_up_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluators_on_ray, "RETRIES", 1)
    found = RayEvaluators(makes, "auto", threads=1)
    try:
        found.begin("well", "well")
        with pytest.raises(ResourceError, match="lost 2 times while measuring one candidate") as no:
            found.answer("dies", "dies")
        assert "\n" not in str(no.value)
        number, threads, request = found.answer("well", "well")
        assert number >= 1 and (threads, request) == (1, "well")
    finally:
        found.close()


@pytest.mark.usefixtures("cluster")
def test_those_lost_while_they_were_idle_cost_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluators_on_ray, "RETRIES", 1)
    found = RayEvaluators(makes, "auto", threads=1)
    try:
        keys = [f"{number}" for number in range(12)]
        for key in keys:
            found.begin(key, "who")
        there = {found.answer(key, "who") for key in keys}
        assert len(there) == 2
        for one in there:
            os.kill(one, signal.SIGKILL)
        assert found.answer("well", "well")[2] == "well"
    finally:
        found.close()


def test_how_much_of_a_walk_waits(schedule: dict[str, Any]) -> None:
    def rounds(**changed: Any) -> int:
        return driver.rounds(load(schedule | changed))

    assert rounds(accept={"rule": "always"}) == 1
    assert rounds(accept={"rule": "improve"}) == 2  # a cycle's two steps side by side
    assert rounds(accept={"rule": "improve", "judge": "step"}) == 4
    assert rounds(accept={"rule": "always"}, stop={"patience": 2}) == 4
    degrade = {"partner": "nearest", "method": "slerp", "t": 0.3}
    near = schedule["schedule"] | {"degrade": degrade}
    assert rounds(accept={"rule": "always"}, schedule=near) == 2


def test_a_dry_run_says_what_waits(
    schedule: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand.py").write_text("def score(model):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    schedule["evaluate"] = {"callable": "stand:score"}
    found = describe(schedule | {"accept": {"rule": "improve"}}, cluster="auto")["measurements"]
    assert (found["at most"], found["one after another"]) == (3 + 4 + 1, 1 + 2 + 1)

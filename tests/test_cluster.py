"""Parts as Ray tasks on a cluster of this machine, whose workers are killed in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastmerge
from fastmerge import FastmergeError, api
from fastmerge.engine import on_ray
from fastmerge.errors import ResourceError, UnsupportedError

ray = pytest.importorskip("ray", reason="ray is 200 MB on the disk: not in the extra test")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray's is a bare one
        if "timed out" not in str(error):
            raise
        pytest.skip(f"Ray's own processes did not start within its limits: {str(error)[:80]}")
    yield
    ray.shutdown()


def recipe(zoo: Any) -> dict[str, Any]:
    base = zoo.base("base", shards=3)
    models = [{"model": str(m)} for m in (base, zoo.tune(base, "tune"))]
    return {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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

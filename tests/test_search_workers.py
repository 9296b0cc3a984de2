"""Workers of a search: processes that measure side by side, and change nothing else."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmerge import search
from fastmerge.errors import FastmergeError
from fastmerge.evaluation.processes import Processes
from tests.test_search_study import file_of, models

__all__ = ["models"]  # the fixture


MODULE = '''
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np

from fastmerge.errors import FastmergeError

IDS = np.random.default_rng(0).integers(1, 39, (80, 8))


def likelihood(model, split="steer", limit=None):
    """Two tasks of 20 items a split."""
    import torch

    rows = torch.tensor(IDS[:40] if split == "steer" else IDS[40:])
    with torch.no_grad():
        logits = model(input_ids=rows, use_cache=False).logits.log_softmax(-1)
    chosen = logits[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].mean(1)
    values = (1000 * chosen.exp()).tolist()
    return {"a": values[:20][:limit], "b": values[20:][:limit]}


def killed_once(model, split="steer", limit=None):
    """Of a process that the system kills at its third measurement, once in all."""
    folder = Path(os.environ["KILLED"])
    (folder / f"{os.getpid()}-{len(list(folder.iterdir()))}").touch()
    if len(list(folder.glob(f"{os.getpid()}-*"))) == 3 and not (folder / "done").exists():
        (folder / "done").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return likelihood(model, split, limit)


def refused(_model):
    raise ValueError("no such score")


class Numbered:
    """Evaluators that say which of them measured what, and do what else is asked for."""

    def __call__(self, number, threads):
        def measure(request):
            if request == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if request == "refuse":
                raise FastmergeError("a line")
            if request == "fail":
                raise ValueError("of whoever wrote it")
            if request == "lock":
                self.lock = multiprocessing.RLock()
            return number, threads, request

        return measure
'''


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module: processes import it, which the suite's own modules are not there for."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "side_by_side_scores.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "beside")
    sys.modules.pop("side_by_side_scores", None)
    return importlib.import_module("side_by_side_scores")


FILES = ("search.json", "recipe.yml", "report.md", "journal.jsonl", "model/model.safetensors")


def test_workers_change_nothing_but_the_time(
    models: list[Path], tmp_path: Path, scores: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pids").mkdir()
    monkeypatch.setenv("KILLED", str(tmp_path / "pids"))
    file = file_of(models, optimiser={"name": "cma", "population": 6}, budget={"items": 300})
    file["evaluate"]["stages"] = [4]
    (tmp_path / "pids" / "done").touch()  # the one process of this run is this one
    search.run(file, tmp_path / "one", score=scores.killed_once, threads=1)
    (tmp_path / "pids" / "done").unlink()
    notes: list[str] = []
    search.run(
        file,
        tmp_path / "two",
        score=scores.killed_once,
        threads=2,
        workers=2,
        on_note=notes.append,
    )
    assert notes[0] == "2 workers, 1 thread and a model each"
    assert len(notes) == 2 and notes[1].startswith("worker ")
    assert notes[1].endswith("SIGKILL while it measured a candidate; another measures it once more")
    for name in FILES:
        one, two = ((tmp_path / run / name).read_bytes() for run in ("one", "two"))
        assert one == two, name
    assert not (tmp_path / "two" / ".scored").exists()
    processes = {name.name.partition("-")[0] for name in (tmp_path / "pids").glob("*-*")}
    assert len(processes) >= 3  # this one, and two or, where the third had to, three
    # A search that is over goes on with others, and measures nothing twice.
    count = len(list((tmp_path / "pids").iterdir()))
    search.run(file, tmp_path / "two", score=scores.killed_once, threads=1, resume=True, workers=2)
    assert len(list((tmp_path / "pids").iterdir())) == count


def test_what_cannot_be_sent_is_one_line(models: list[Path], tmp_path: Path, scores: Any) -> None:
    file = file_of(models, budget={"candidates": 5})
    with pytest.raises(FastmergeError, match="workers: what scores cannot be sent to another"):
        search.run(file, tmp_path / "out", score=lambda model: 1.0, workers=2)
    for workers in (0, 1.5, "2"):
        with pytest.raises(FastmergeError, match=r"workers: .* is not a number of workers"):
            search.run(file, tmp_path / "no", score=scores.refused, workers=workers)  # type: ignore[arg-type]
    with pytest.raises(FastmergeError, match="workers: a cluster has its own; give it or cluster"):
        search.run(file, tmp_path / "no", score=scores.refused, workers=2, cluster="local")
    assert not (tmp_path / "no").exists()


@pytest.mark.usefixtures("scores")
def test_a_dry_run_says_what_workers_come_to(models: list[Path]) -> None:
    file = file_of(models, optimiser="tpe", workers=4)
    file["evaluate"] = {"callable": "side_by_side_scores:likelihood"}
    notes = search.describe(file, threads=8)["notes"]
    assert "4 workers, 2 threads and a model each" in notes
    assert any(
        "`optimiser: {name: tpe, batch: 4}` gives every worker one" in note for note in notes
    )
    notes = search.describe(file | {"optimiser": "walk"}, threads=2)["notes"]
    assert "4 workers, 1 thread and a model each" in notes
    assert any("walk asks for one candidate at a time" in note for note in notes)
    assert "4 workers" not in json.dumps(search.describe(file, workers=1))


def test_processes_are_started_as_they_are_needed_and_replaced(scores: Any) -> None:
    said: list[str] = []
    pool = Processes(scores.Numbered(), 2, threads=5, say=said.append)
    try:
        assert pool.answer("a", 1) == (1, 2, 1)
        assert len(pool._workers) == 1
        pool._workers[0].process.kill()
        pool._workers[0].process.join()
        assert pool.answer("b", 2) == (2, 2, 2)
        assert said == ["worker 1 was killed by SIGKILL while it waited; another is started"]
        for i in range(5):
            pool.begin(str(i), i, later=i == 0)
        assert [pool.answer(str(i), i)[2] for i in range(5)] == list(range(5))
        with pytest.raises(FastmergeError, match=r"^a line$"):
            pool.answer("refuse", "refuse")
        with pytest.raises(
            RuntimeError, match=r"side_by_side_scores\.py(.|\n)*of whoever wrote it"
        ):
            pool.answer("fail", "fail")
        message = "workers: the second process that measured it was killed by SIGKILL, too; is"
        with pytest.raises(FastmergeError, match=message) as caught:
            pool.answer("die", "die")
        assert "\n" not in str(caught.value)
    finally:
        pool.close()
    assert pool._workers == []


def test_a_process_that_is_ended_leaves_no_lock(scores: Any, tmp_path: Path) -> None:
    """Of a library's locks (tqdm's) Python warned at the end of every search with workers."""
    program = tmp_path / "program.py"
    program.write_text(
        f"from {scores.__name__} import Numbered\n"
        "from fastmerge.evaluation.processes import Processes\n"
        "if __name__ == '__main__':\n"
        "    pool = Processes(Numbered(), 1)\n"
        "    pool.answer('a', 'lock')\n"
        "    pool.close()\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path / "beside"), *sys.path]))
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")

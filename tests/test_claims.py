"""Two processes that claim one part at the same moment: one of them has it, by either way."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from fastmerge.output import claim
from fastmerge.output.working import WorkingFolder

ROUNDS = 60
PART = "part-00001"


def racer(base: Path, renames: bool, barrier: Any, said: Any) -> None:
    if not renames:  # as NFS, and FUSE without rename2
        claim.take_name = lambda *_: False
    found: list[str] = []
    for number in range(ROUNDS):
        folder, own = WorkingFolder(base / f"{number}"), None
        barrier.wait()
        try:
            own = claim.Claim(folder, PART, "part 1/1")
            found.append(f"run {own.number}")
        except claim.AtWorkError:
            found.append("refused")
        barrier.wait()
        if own is not None:
            own.end()
        folder.close()
    said.put(found)


@pytest.mark.parametrize("ways", [(True, True), (False, False), (True, False)])
def test_one_of_two_at_once_has_the_part(
    tmp_path: Path, ways: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last pair: one machine's kernel has renameat2 there, the other's has not."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)  # the processes import this file
    for number in range(ROUNDS):
        (tmp_path / f"{number}").mkdir(mode=0o700)
    context = multiprocessing.get_context("spawn")
    barrier, said = context.Barrier(2, timeout=100), context.SimpleQueue()
    racing = [
        context.Process(target=racer, args=(tmp_path, renames, barrier, said)) for renames in ways
    ]
    for process in racing:
        process.start()
    for process in racing:
        process.join()
    assert [process.exitcode for process in racing] == [0, 0]
    rounds = zip(said.get(), said.get(), strict=True)
    assert {tuple(sorted(each)) for each in rounds} == {("refused", "run 1")}
    # Nothing is left under a name of its own, and what has the name says whose it is.
    left = [file.name for file in tmp_path.rglob("*") if file.is_file()]
    assert left == [f"{PART}.0001.run"] * ROUNDS

"""Small immutable things: equal and hashed as frozen dataclasses are."""

import pickle
from dataclasses import dataclass, replace

from fastmerge.models.model import TensorInfo
from fastmerge.records import record
from fastmerge.tree.nodes import Merge, Stored


@record(slots=True)
class Pair:
    one: int
    two: str = "b"


def test_records_are_compared_and_hashed_by_their_fields() -> None:
    @dataclass(frozen=True)
    class Frozen:
        one: int
        two: str = "b"

    assert Pair(1) == Pair(1, "b") != Pair(2)
    assert hash(Pair(1)) == hash(Frozen(1))
    assert {Pair(1): 5}[Pair(1)] == 5
    assert replace(Pair(1), two="c") == Pair(1, "c")
    assert pickle.loads(pickle.dumps(Pair(3))) == Pair(3)


def test_a_records_own_hash_stays_and_merges_are_themselves_alone() -> None:
    assert Stored(0, "x") == Stored(0, "x", (2,)) != Stored(1, "x")
    assert hash(Stored(0, "x")) == hash(Stored(0, "x", (2,)))
    method = object()
    a, b = (Merge(method, (Stored(0, "x"),)) for _ in range(2))  # type: ignore[arg-type]
    assert a == a != b
    assert len({a, b}) == 2


def test_tensors_of_a_model_have_no_other_fields() -> None:
    assert not hasattr(TensorInfo("x", None, (1,), 4, 1), "__dict__")  # type: ignore[arg-type]

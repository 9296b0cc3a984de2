"""A window of tensors in flight, and how rarely Python's collector looks at what a plan makes."""

import gc
import threading

import pytest

from fastmerge.collector import rarely_collected
from fastmerge.engine.window import in_order


@pytest.mark.parametrize("sizes", [[1] * 200, [1 << 20] * 20, [1, 1 << 20, 1, 1, 1 << 20] * 9, []])
def test_results_come_in_order_whatever_shares_a_turn(sizes: list[int]) -> None:
    items = list(enumerate(sizes))
    got = list(in_order(lambda item: item[0] * 2, items, 4, lambda item: item[1]))
    assert got == [(item, item[0] * 2) for item in items]


def test_small_neighbours_share_a_turn_and_large_ones_do_not() -> None:
    threads: dict[int, int] = {}
    barrier = threading.Barrier(4, timeout=60)

    def work(item: tuple[int, int]) -> None:
        number, size = item
        threads[number] = threading.get_ident()
        if size > 1000 or number == 0:
            barrier.wait()  # four turns at once: the small ones' and three large ones'

    items = [(n, 10) for n in range(20)] + [(n, 1 << 30) for n in range(20, 23)]
    list(in_order(work, items, 4, lambda item: item[1]))
    assert len({threads[n] for n in range(20)}) == 1
    assert len(set(threads.values())) == 4


def test_what_raises_ends_its_turn_and_all_later_ones() -> None:
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        if item == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        list(in_order(work, range(10_000), 1, lambda _: 1))
    assert begun == [0, 1, 2, 3, 4, 5]


def test_the_collectors_thresholds_come_back() -> None:
    before = gc.get_threshold()
    with rarely_collected(5000):
        assert gc.get_threshold()[0] == 5000
        with rarely_collected(70_000):
            assert gc.get_threshold()[0] == 70_000
        assert gc.get_threshold()[0] == 5000
    assert gc.get_threshold() == before
    with pytest.raises(KeyError), rarely_collected(5000):
        raise KeyError
    assert gc.get_threshold() == before


def test_the_collectors_thresholds_come_back_whoever_ends_first() -> None:
    before = gc.get_threshold()
    first, second = rarely_collected(5000), rarely_collected(6000)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold()[0] == 6000
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before


def test_a_collector_that_is_off_stays_off() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with rarely_collected(5000):
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_what_was_made_meanwhile_is_among_the_old() -> None:
    assert gc.get_freeze_count() < 1000  # Python 3.12 has some of its own
    with rarely_collected(1_000_000):
        made = [[] for _ in range(1000)]
    old = {id(each) for each in gc.get_objects(generation=2)}
    assert all(id(each) in old for each in made)


def test_what_others_have_frozen_stays_so() -> None:
    gc.freeze()
    try:
        with rarely_collected(5000):
            pass
        assert gc.get_freeze_count() > 10_000  # freed since, some; never all
    finally:
        gc.unfreeze()

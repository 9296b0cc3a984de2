"""Reading ahead: neighbours in one request, memory bounded, faults told to those who wait."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fastmerge.dtypes import BY_CODE
from fastmerge.engine.inputs import Room
from fastmerge.models import ahead
from fastmerge.models.ahead import Ahead
from fastmerge.models.header import FileTensor

DATA = np.random.default_rng(0).integers(0, 256, 40_000, np.uint8)


def tensors(sizes: list[int], gap: int = 0) -> dict[str, FileTensor]:
    found, at = {}, 0
    for number, size in enumerate(sizes):
        name = f"t{number}"
        found[name] = FileTensor(name, BY_CODE["U8"], (size,), size, size, 0, at)
        at += size + gap
    return found


class Store:
    """Notes what is asked for; ``fault`` is raised once."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.fault: Exception | None = None

    def read(self, file: int, begin: int, end: int) -> Any:
        assert file == 0
        self.asked.append((begin, end))
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        return DATA[begin:end].tobytes()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(ahead, "_LEAST_BYTES", 1000)
    monkeypatch.setattr(ahead, "_MOST_BYTES", 1000)
    monkeypatch.setattr(ahead, "_GAP_BYTES", 10)
    return Store()


def settled(store: Store, count: int) -> None:
    end = time.monotonic() + 10
    while len(store.asked) < count and time.monotonic() < end:
        time.sleep(0.001)


def test_neighbours_come_in_one_request_and_as_memory_allows(store: Store) -> None:
    infos = tensors([100] * 50, gap=5)
    with ThreadPoolExecutor(4) as pool:
        reader = Ahead(infos, store.read, lambda: pool)
        reader.expect(list(infos), 2100)
        settled(store, 2)
        assert sorted(store.asked) == [(0, 940), (945, 1885)] and reader.held == 1880
        most = 0
        for name, info in infos.items():
            got = reader.start(name).result()
            assert np.array_equal(got, DATA[info.begin : info.begin + 100])
            most = max(most, reader.held)
            reader.drop(name)
        assert most <= 2100 and reader.held == 0 and len(store.asked) == 6


def test_a_large_tensor_comes_by_several_requests(store: Store) -> None:
    infos = tensors([300, 5500, 0, 20])
    with ThreadPoolExecutor(4) as pool:
        reader = Ahead(infos, store.read, lambda: pool)
        reader.expect(list(infos), 100)  # no room ahead for any of them: all on demand
        for name, info in infos.items():
            got = reader.start(name).result()
            assert np.array_equal(got, DATA[info.begin : info.begin + info.nbytes])
        reader.expect((), 0)
        assert reader.held == 0 and len(store.asked) == 8


def test_out_of_turn_twice_and_never_taken(store: Store) -> None:
    infos = tensors([400] * 12)
    with ThreadPoolExecutor(4) as pool:
        reader = Ahead(infos, store.read, lambda: pool)
        reader.expect(list(infos), 1000)
        for name in ("t9", "t2", "t9"):
            assert np.array_equal(reader.start(name).result(), DATA[infos[name].begin :][:400])
            reader.drop(name)
        for name in infos:
            reader.start(name).result()
        reader.expect(("t3",), 1000)
        assert reader.held == 800  # its span's neighbour is gone, their memory is one
        reader.drop("t3")
        assert reader.held == 0


def test_who_waits_is_answered_though_another_lets_go_before_the_request(store: Store) -> None:
    infos = tensors([900] * 3)
    waiting = []
    with ThreadPoolExecutor(1) as pool:

        def between() -> ThreadPoolExecutor:
            """What another thread does after a span is begun and before its request is sent."""
            if not waiting:
                waiting.append(reader.start("t1"))
                reader.drop("t1")
            return pool

        reader = Ahead(infos, store.read, between)
        reader.expect(list(infos), 1800)
        assert np.array_equal(waiting[0].result(timeout=10), DATA[900:1800])


def test_a_fault_reaches_all_who_wait_and_may_be_mended(store: Store) -> None:
    infos = tensors([100] * 5)
    store.fault = OSError("cut")
    with ThreadPoolExecutor(1) as pool:
        gate = threading.Event()
        pool.submit(gate.wait)
        reader = Ahead(infos, store.read, lambda: pool)
        reader.expect(list(infos), 1000)
        waiting = [reader.start(name) for name in infos]
        gate.set()
        for future in waiting:
            with pytest.raises(OSError, match="cut"):
                future.result()
        assert reader.held == 0
        assert np.array_equal(reader.start("t1").result(), DATA[100:200])


def test_what_is_larger_than_the_room_goes_alone() -> None:
    room, inside, most = Room(100), [0], [0]
    lock = threading.Lock()

    def work(nbytes: int) -> None:
        with room.taken(nbytes):
            with lock:
                inside[0] += nbytes
                assert inside[0] <= 100 or inside[0] == 300  # beside it only one of no bytes
                most[0] = max(most[0], inside[0])
            time.sleep(0.001)
            with lock:
                inside[0] -= nbytes

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [50, 60, 40, 300, 10, 0, 20, 50, 300, 50] * 3))
    assert most[0] == 300

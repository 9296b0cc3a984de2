"""A window of tensors in flight, results in order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

from fastmerge.errors import ResourceError, argument

_TURN_BYTES, _TURN_ITEMS = 256 << 10, 64


def window_size(threads: int) -> int:
    """Tensors in flight: enough that small ones and the ends of large ones leave no worker idle."""
    return 4 + threads // 8


def in_order(
    work: Callable[[Any], Any],
    items: Sequence[Any],
    window: int,
    nbytes: Callable[[Any], int] | None = None,
) -> Generator[tuple[Any, Any], None, None]:
    """(item, work(item)) in order, with up to ``window`` of them running or waiting to be taken.

    ``nbytes`` says what an item moves: neighbours that move little share a turn. When one raises,
    or the generator is closed, no further item starts and the running ones are waited for.
    """
    stop = False
    small = threading.Lock()

    def turn(batch: Sequence[Any]) -> list[tuple[Any, Any]]:
        # Small items are the interpreter's work: several turns of them fight over its lock, and
        # take twice the CPU time of one after another.
        with small if len(batch) > 1 else nullcontext():
            return [(item, work(item)) for item in batch if not stop]

    with ThreadPoolExecutor(window, thread_name_prefix="fastmerge") as pool:
        running: list[Future[list[tuple[Any, Any]]]] = []
        try:
            for batch in _batches(items, nbytes) if nbytes else ([item] for item in items):
                if len(running) == window:
                    yield from running.pop(0).result()
                running.append(_submit(pool, turn, batch))
            while running:
                yield from running.pop(0).result()
        finally:
            stop = True
            for future in running:
                future.cancel()


def _batches(items: Sequence[Any], nbytes: Callable[[Any], int]) -> Iterator[list[Any]]:
    """Neighbours together until they move `_TURN_BYTES`: handing a turn over costs 40 us with its
    two switches of threads, as much as a small tensor's own work.
    """
    batch: list[Any] = []
    moved = 0
    for item in items:
        size = nbytes(item)
        if batch and (moved + size > _TURN_BYTES or len(batch) == _TURN_ITEMS):
            yield batch
            batch, moved = [], 0
        batch.append(item)
        moved += size
    if batch:
        yield batch


def _submit(pool: ThreadPoolExecutor, work: Callable[[Any], Any], item: Any) -> Future[Any]:
    try:
        return pool.submit(work, item)
    except RuntimeError as error:
        raise ResourceError(
            f"the system refuses another thread ({error}); give fewer "
            f"{argument('threads')}, or raise ulimit -u"
        ) from error

"""A window of tensors in flight, results in order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastmerge.errors import ResourceError


def window_size(threads: int) -> int:
    """Tensors in flight: enough that small ones and the ends of large ones leave no worker idle."""
    return 4 + threads // 8


def in_order(
    work: Callable[[Any], Any], items: Sequence[Any], window: int
) -> Generator[tuple[Any, Any], None, None]:
    """(item, work(item)) in order, with up to ``window`` of them running or waiting to be taken.

    When one raises, or the generator is closed, no further item starts and the running ones are
    waited for.
    """
    with ThreadPoolExecutor(window, thread_name_prefix="fastmerge") as pool:
        running: list[tuple[Any, Future[Any]]] = []
        try:
            for item in items:
                if len(running) == window:
                    first, future = running.pop(0)
                    yield first, future.result()
                running.append((item, _submit(pool, work, item)))
            while running:
                first, future = running.pop(0)
                yield first, future.result()
        finally:
            for _, future in running:
                future.cancel()


def _submit(pool: ThreadPoolExecutor, work: Callable[[Any], Any], item: Any) -> Future[Any]:
    try:
        return pool.submit(work, item)
    except RuntimeError as error:
        raise ResourceError(
            f"the system refuses another thread ({error}); give fewer --threads, or raise ulimit -u"
        ) from error

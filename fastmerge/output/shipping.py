"""Weight files that leave one by one, for outputs larger than the disk they are merged on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol


class Destination(Protocol):
    """Takes finished weight files, of one job; an earlier run of it may have sent some."""

    def sent(self) -> Mapping[str, int]:
        """The bytes of the files that are there, by name."""
        ...

    def send(self, path: Path) -> None:
        """Returns when the file is there for good. Raises OutputError."""
        ...


class Shipping:
    """Sends files in turn from a thread of its own, and removes each when it is there.

    A file waits to be made until it is one of ``most`` from the first on that is still here. Files
    are made nearly in order, what belongs to two of them to neighbours: with 2 or more the first
    never waits for another, so that nothing waits for ever.
    """

    def __init__(self, to: Destination, numbers: Iterable[int], most: int) -> None:
        """``numbers``: of the files that are to be sent."""
        self._to, self._most = to, most
        self._left = sorted(numbers)
        self._given: set[int] = set()
        self._error: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="fastmerge-sender")

    def may(self, number: int, seconds: float) -> bool:
        """Whether the file may be made now, or in so many seconds. Raises what sending another one
        did.
        """
        return self._until(lambda: number in self._left[: self._most], seconds)

    def give(self, number: int, finish: Callable[[], Path]) -> None:
        """The file is complete; ``finish`` brings it to the disk, from the sender's thread."""
        with self._changed:
            if self._stopped:
                return
            self._given.add(number)
            sending = self._sender.submit(self._send, finish)
        sending.add_done_callback(lambda ended: self._ended(number, ended))

    def is_given(self, number: int) -> bool:
        return number in self._given

    def finish(self) -> None:
        """Waits until every file that was given is there. Raises what sending one did."""
        self._until(lambda: self._given.isdisjoint(self._left))
        self.stop()

    def stop(self) -> None:
        """Sends no further file; waits for the one on its way."""
        with self._changed:
            self._stopped = True
        self._sender.shutdown(cancel_futures=True)

    def _until(self, ready: Callable[[], bool], seconds: float | None = None) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._error or ready(), seconds)
            if self._error:
                raise self._error
            return ready()

    def _send(self, finish: Callable[[], Path]) -> None:
        if self._error is None:
            path = finish()
            self._to.send(path)
            path.unlink()

    def _ended(self, number: int, sending: Future[None]) -> None:
        with self._changed:
            if not sending.cancelled():  # whatever ends one: nobody may wait for ever
                self._error = self._error or sending.exception()
            if self._error is None and not sending.cancelled():
                self._left.remove(number)
            self._changed.notify_all()

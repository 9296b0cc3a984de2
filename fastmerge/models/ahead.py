"""Ranges of one model's files, asked for before they are wanted: several requests at a time, each
of neighbouring tensors together, in bounded memory.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmerge.models.header import FileTensor

Bytes = NDArray[np.uint8]

# Of one request: large, since each waits some 20 ms for its first byte, but a tensor is asked for
# by several too, or four in flight would be four connections.
_LEAST_BYTES, _MOST_BYTES, _REQUESTS = 1 << 20, 8 << 20, 8
# Between two tensors of one request: what brings them together costs less than another request.
_GAP_BYTES = 64 << 10


class _Span(NamedTuple):
    """Consecutive bytes of a file and the tensors in them, which come and go together."""

    file: int
    begin: int
    end: int
    names: tuple[str, ...]
    step: int  # bytes a request
    left: set[str]  # those of the names that are still held

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Ahead:
    """The tensors of one model by name, in memory from their request until they are let go of.

    Safe to share between threads; what a request raises, every caller that waits for its tensors
    is raised.
    """

    def __init__(
        self,
        tensors: Mapping[str, FileTensor],
        read: Callable[[int, int, int], Any],
        pool: Callable[[], Executor],
    ) -> None:
        """``read(file, begin, end)``: those bytes, as a buffer; called from ``pool()``'s threads,
        of which none waits for another.
        """
        self.tensors, self.read, self.pool = tensors, read, pool
        self._lock = threading.Lock()
        self._queue: deque[_Span] = deque()
        self._expected: dict[str, _Span] = {}  # of the queue, by tensor
        self._held: dict[str, tuple[_Span, Future[Bytes]]] = {}
        self._bytes = self._budget = 0

    def expect(self, names: Sequence[str], nbytes: int) -> None:
        """Those will be wanted, in this order; until then they are read ahead, as long as no more
        than ``nbytes`` are held. What was expected before and never taken is let go of.
        """
        with self._lock:
            for span in self._queue:
                span.left.clear()
            wanted = set(names)
            for name in [n for n in self._held if n not in wanted]:
                self._let_go(name)
            spans = _spans([self.tensors[n] for n in names if n not in self._held], nbytes)
            self._queue = deque(spans)
            self._expected = {name: span for span in spans for name in span.names}
            self._budget = nbytes
            begun = self._advance()
        _submit(begun)

    def start(self, name: str) -> Future[Bytes]:
        """The tensor's bytes, once they are there; asked for now, if they are not yet."""
        begun: list[_Reading] = []
        with self._lock:
            if name not in self._held:
                span = self._expected.get(name)
                if span is None or name not in span.left:
                    span = _alone(self.tensors[name])
                begun = [self._begin(span), *self._advance()]
            future = self._held[name][1]
        _submit(begun)
        return future

    def drop(self, name: str) -> None:
        """The tensor is not wanted again soon: its memory is free once no array of it is left."""
        with self._lock:
            self._let_go(name)
            begun = self._advance()
        _submit(begun)

    @property
    def held(self) -> int:
        """Bytes held, or asked for."""
        return self._bytes

    # --- under the lock ---

    def _let_go(self, name: str) -> None:
        held = self._held.pop(name, None)
        if held is not None:
            span = held[0]
            span.left.discard(name)
            if not span.left:
                self._bytes -= span.nbytes

    def _advance(self) -> list[_Reading]:
        begun = []
        while self._queue:
            span = self._queue[0]
            if self._expected.get(span.names[0]) is not span:  # taken out of its turn
                self._queue.popleft()
            elif self._bytes + span.nbytes <= self._budget:
                begun.append(self._begin(self._queue.popleft()))
            else:
                break
        return begun

    def _begin(self, span: _Span) -> _Reading:
        # The reading keeps the futures: a tensor may be let go of before its requests are sent.
        futures: dict[str, Future[Bytes]] = {}
        for name in span.names:
            self._expected.pop(name, None)
            if name in self._held:
                span.left.discard(name)
            else:
                futures[name] = Future()
                self._held[name] = (span, futures[name])
        self._bytes += span.nbytes
        return _Reading(self, span, futures)

    # --- outside it ---

    def failed(self, span: _Span) -> None:
        """Those who wait are told; who asks again is read for again."""
        with self._lock:
            for name in span.names:
                if name in self._held and self._held[name][0] is span:
                    self._let_go(name)


class _Reading:
    """The requests of one span; the last to end hands its tensors out."""

    def __init__(self, ahead: Ahead, span: _Span, futures: Mapping[str, Future[Bytes]]) -> None:
        self._ahead, self._span, self._futures = ahead, span, futures
        self._lock = threading.Lock()
        self._begins = range(span.begin, span.end, span.step) if span.nbytes else range(1)
        self._missing = len(self._begins)
        self._data = np.empty(span.nbytes if self._missing > 1 else 0, np.uint8)

    def submit(self) -> None:
        for begin in self._begins:
            # Whatever ends a request: nobody may wait for ever.
            asked = self._ahead.pool().submit(self._request, begin)
            asked.add_done_callback(lambda done: self._end(done.exception()))

    def _request(self, begin: int) -> None:
        span = self._span
        if not span.nbytes:
            return
        end = min(begin + span.step, span.end)
        got = np.frombuffer(self._ahead.read(span.file, begin, end), np.uint8)
        if len(self._begins) == 1:
            self._data = got
        else:
            self._data[begin - span.begin : end - span.begin] = got

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            self._missing -= 1
            if self._missing < 0 or (self._missing and error is None):
                return
            self._missing = 0 if error is None else -1
        if error is not None:
            self._ahead.failed(self._span)
        for name, future in self._futures.items():
            if error is not None:
                future.set_exception(error)
            else:
                info = self._ahead.tensors[name]
                at = info.begin - self._span.begin
                future.set_result(self._data[at : at + info.nbytes])


def _submit(readings: Iterable[_Reading]) -> None:
    for reading in readings:
        reading.submit()


def _alone(info: FileTensor) -> _Span:
    step = max(_LEAST_BYTES, min(_MOST_BYTES, -(-info.nbytes // _REQUESTS)))
    return _Span(info.file, info.begin, info.begin + info.nbytes, (info.name,), step, {info.name})


def _spans(tensors: Sequence[FileTensor], nbytes: int) -> list[_Span]:
    """Neighbours of one file together, up to a request's bytes. One request a span: its bytes stay
    where they were received, those of several are copied once more.
    """
    most = max(_LEAST_BYTES, min(_MOST_BYTES, nbytes // 4))
    found: list[list[FileTensor]] = []
    for info in tensors:
        last = found[-1] if found else []
        if last and last[0].file == info.file:
            end = last[-1].begin + last[-1].nbytes
            together = info.begin + info.nbytes - last[0].begin <= most
            if together and 0 <= info.begin - end <= _GAP_BYTES:
                last.append(info)
                continue
        found.append([info])
    spans = []
    for group in found:
        names = tuple(info.name for info in group)
        begin, end = group[0].begin, group[-1].begin + group[-1].nbytes
        spans.append(_Span(group[0].file, begin, end, names, most, set(names)))
    return spans

"""Evaluators as processes of this machine, which share its cores; one that dies is replaced, and
what it was measuring is measured once more.

Spawned, not forked: a fork of a process whose torch has computed waits for threads that it lacks.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from multiprocessing import (
    connection,
    current_process,
    get_context,
    parent_process,
    set_start_method,
)
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fastmerge.compute.cpu import thread_count
from fastmerge.errors import FastmergeError, ResourceError, enough_memory
from fastmerge.evaluation.evaluators import Evaluators, Make, within

_TRIES = 2  # of one measurement, each in a process that died of it or beside it


def evaluators_here(
    make: Make,
    folder: Path,
    count: int,
    *,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> AbstractContextManager[Processes]:
    """`Processes` `within` the run's ``folder``."""
    return within(folder, lambda: Processes(make, count, threads=threads, say=say))


@dataclass(eq=False)
class _Worker:
    """One process; ``key``: what it is measuring, None while it makes its evaluator."""

    number: int
    process: BaseProcess
    link: Connection
    key: str | None = None
    is_idle: bool = False


class Processes(Evaluators):
    """`Evaluators` in ``count`` processes, started as they are needed."""

    def __init__(
        self,
        make: Make,
        count: int,
        *,
        threads: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """``threads``: of all together; each has its share, one at least. ``say`` is told in one
        line of a process that died. Raises FastmergeError where ``make`` cannot be sent to one.
        """
        super().__init__()
        self.count = count
        self.threads = share(count, threads)
        self._say = say
        try:
            self._make = pickle.dumps(make)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise FastmergeError(_cannot_be_sent(error)) from error
        self._numbers = 0
        self._workers: list[_Worker] = []
        self._lost: dict[str | None, int] = {}

    def close(self) -> None:
        """See `Evaluators`."""
        for worker in self._workers:
            worker.link.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
        self._workers = []

    def _feed(self) -> None:
        """See `Evaluators`."""
        for worker in list(self._workers):
            if worker.is_idle and self._left:
                key = self._next()
                try:
                    worker.link.send(self._requests[key])
                except (BrokenPipeError, ConnectionResetError):
                    self._waiting.appendleft(key)
                    self._replace(worker)
                    continue
                worker.key, worker.is_idle = key, False
        coming = sum(worker.key is None and not worker.is_idle for worker in self._workers)
        for _ in range(min(self._left - coming, self.count - len(self._workers))):
            self._start()

    def _given(self, answer: _Outcome) -> Any:
        return answer.given()

    def _start(self) -> None:
        self._numbers += 1
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        given = (theirs, self._make, self._numbers, self.threads)
        process = context.Process(target=_serve, args=given, daemon=True)
        process.start()
        theirs.close()  # theirs alone: its end is the process's
        self._workers.append(_Worker(self._numbers, process, ours))

    def _turn(self) -> None:
        """See `Evaluators`."""
        ready = connection.wait([worker.link for worker in self._workers])
        for worker in [one for one in self._workers if one.link in ready]:
            try:
                found: _Outcome = worker.link.recv()
            except (EOFError, ConnectionResetError):
                self._replace(worker)
                continue
            if worker.key is None:
                found.given()
            else:
                self._answers[worker.key] = found
            worker.key, worker.is_idle = None, True

    def _replace(self, worker: _Worker) -> None:
        """Puts what a dead process was measuring where the next one takes it."""
        self._workers.remove(worker)
        worker.link.close()
        worker.process.join()
        died, key = _ending(worker.process.exitcode), worker.key
        if worker.is_idle:
            doing, again = "it waited", "another is started"
        elif key is None:
            doing, again = "it began", "another is started"
        else:
            doing, again = "it measured a candidate", "another measures it once more"
            self._waiting.appendleft(key)
        if self._say is not None:
            self._say(f"worker {worker.number} {died} while {doing}; {again}")
        self._lost[key] = self._lost.get(key, 0) + (not worker.is_idle)
        if self._lost[key] == _TRIES:
            raise ResourceError(
                f"workers: the second process that {'began' if key is None else 'measured it'} "
                f"{died}, too; is there memory for {self.count} models at once? With fewer "
                "workers the same goes on where this ended"
            )


@dataclass(frozen=True)
class _Outcome:
    """What a worker's call came to."""

    value: Any = None
    error: Exception | None = None

    @classmethod
    def of(cls, call: Callable[[], Any]) -> _Outcome:
        """Runs ``call``; an error of ours travels as it is, any other as its own text."""
        try:
            with enough_memory("workers"):
                return cls(call())
        except FastmergeError as error:
            return cls(error=error)
        except Exception as error:  # noqa: BLE001 - raised where it was asked for
            text = "".join(traceback.format_exception(error))
            return cls(error=RuntimeError(f"in a worker:\n{text}"))

    def given(self) -> Any:
        """The value; raises the error."""
        if self.error is not None:
            raise self.error
        return self.value


def _cannot_be_sent(error: Exception) -> str:
    return (
        f"workers: what scores cannot be sent to another process ({error}); define it at the top "
        "of a module that Python finds, or score with one worker"
    )


def share(count: int, threads: int | None) -> int:
    """The threads of each of ``count`` evaluators that have ``threads`` together."""
    return max(1, thread_count(threads) // count)


def check_script() -> None:
    """Raises FastmergeError in a process of a script that starts processes as it is imported."""
    if getattr(current_process(), "_inheriting", False):  # what multiprocessing itself looks at
        raise FastmergeError(
            "workers: each worker imports the script that was run; write what it does under "
            '`if __name__ == "__main__":`'
        )


def _ending(code: int | None) -> str:
    """How a process ended, in words."""
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _serve(link: Connection, made: bytes, number: int, threads: int) -> None:
    """A process: one evaluator."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's is for all, and theirs to answer
    sys.stdout = sys.stderr  # what a scorer prints is no part of a command's answer
    # Locks that libraries make here (tqdm's) have no name then, so that a process which is killed
    # leaves none behind: Python warned of them at the end of every run.
    set_start_method("fork", force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    measures: list[Any] = []

    def begin() -> None:
        try:
            make = pickle.loads(made)
        except (ImportError, AttributeError) as error:
            raise FastmergeError(_cannot_be_sent(error)) from error
        measures.append(make(number, threads))

    link.send(_Outcome.of(begin))
    while measures:
        try:
            request = link.recv()
        except EOFError:
            return
        link.send(_Outcome.of(partial(measures[0], request)))


def _end_with_parent() -> None:
    """A killed run's processes measure no more."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)

"""Ctrl-C, and what ends a command from outside: SIGTERM, which batch systems send before they kill,
and SIGHUP, when its terminal or connection is gone.

Each ends it as Ctrl-C does: what was begun is put away, and one line says what continues.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import NoReturn

from fastmerge.cli.console import say

_WORDS = {
    signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up",
}  # fmt: skip

_last = signal.SIGINT


def listen() -> None:
    """From here on SIGTERM and SIGHUP raise KeyboardInterrupt, unless they are ignored (nohup) or a
    program that calls the command line has its own use for them.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    own = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        global _last
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait
        if os.getpid() != own:  # a forked child's end is not the command's
            os.kill(os.getpid(), number)
        _last = signal.Signals(number)
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


def stopped(then: str = "") -> NoReturn:
    """Ends the process after a KeyboardInterrupt: a line with what continues, and the exit code
    that a shell has for the signal, 128 and its number.
    """
    say(f"error: {_WORDS[_last]}{then}")
    raise SystemExit(128 + _last)

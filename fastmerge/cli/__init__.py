"""The command line: ``fastmerge merge | finish | plan | verify | average | fold | moe |
extract-lora | info | diff | methods | retrograde | sweep | search | bench | completion``, and
mergekit's ``mergekit-yaml | mergekit-multi | mergekit-moe | mergekit-extract-lora``.

Answers go to stdout, progress and remarks to stderr. A user's mistake is one line on stderr and
exit code 2, Ctrl-C one line and exit code 130, as
SIGTERM (143) and SIGHUP (129). A command imports what it needs when it runs: a tiny merge, whole
process, takes twice as long as to import NumPy (benchmarks/startup.py), and a merge on the CPU
never imports torch.

Adding a command: a module here with functions decorated by `app.command`, its name in `_MODULES`.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

# In the order of their commands in --help.
_MODULES = (
    "merge", "verify", "average", "fold", "moe", "loras", "models", "methods", "retrograde",
    "search", "bench", "completion", "mergekit", "mergekit_moe", "mergekit_loras",
)  # fmt: skip


def _end() -> None:
    """Spares a small command Python's last look for cycles in all that it imported: 30 ms of a
    tiny merge's 220. At the exit, as whoever calls `main` in a process of theirs wants their
    garbage collected; not where Triton is (torch brings it): it counts and names what that look
    would have freed.
    """
    if not {"torch", "triton"} & sys.modules.keys():
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the ``fastmerge`` command; ends the process with its exit code."""
    # The matrices here are k x k; OpenBLAS's waiting threads would spin for 0.1 s of a 1 s merge.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    atexit.register(_end)
    try:
        from fastmerge.cli.streams import prepare

        prepare()
        from fastmerge.cli.signals import listen

        listen()
        for name in _MODULES:
            import_module(f"fastmerge.cli.{name}")
        from fastmerge.cli.app import run

        run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        from fastmerge.cli.signals import stopped

        stopped()
    raise SystemExit

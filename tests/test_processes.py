"""What other processes see: forked children, and ends that are not clean."""

from __future__ import annotations

import subprocess
import sys

import pytest

PRELUDE = """
import os, signal, sys, threading, time
import numpy as np
from fastmerge import ops
a = np.arange(600_000, dtype=np.float32)
expected = ops.linear([a, a], [1, 3], threads=2)
"""

CHILD_USES_IT = """
pid = os.fork()
if pid == 0:
    got = []
    def work():
        got.append((ops.linear([a, a], [1, 3], threads=2) == expected).all())
    threads = [threading.Thread(target=work) for _ in range(4)]  # all find the pool without threads
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    sys.exit(0 if all(got) and len(got) == 4 else 3)
"""

CHILD_ONLY_ENDS = """
pid = os.fork()
if pid == 0:
    sys.exit(0)  # runs destructors, unlike os._exit
"""

WAIT = """
for _ in range(300):
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(pid, signal.SIGKILL)
sys.exit("the child hangs")
"""


@pytest.mark.parametrize("child", [CHILD_USES_IT, CHILD_ONLY_ENDS], ids=["uses it", "only ends"])
def test_a_forked_child_does_not_wait_for_its_parents_threads(child: str) -> None:
    command = [sys.executable, "-c", PRELUDE + child + WAIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_pools_of_many_sizes_do_not_pile_up() -> None:
    code = (
        PRELUDE
        + """
for n in range(1, 33):
    ops.linear([a, a], [1, 3], threads=n)
sys.exit(0 if len(os.listdir("/proc/self/task")) < 150 else 3)
"""
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0

"""What other processes see: forked children, and ends that are not clean."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

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


@pytest.mark.parametrize("count", [5000, 3_000_000])
def test_a_program_ends_while_its_daemon_threads_merge(count: int) -> None:
    """Python unwinds them as they take the GIL again; it was the process that ended, by SIGABRT."""
    code = f"""
        import sys, threading, time
        import numpy as np
        from fastmerge import ops

        def work():
            while True:
                ops.ties(None, [x, y], [0.5, 0.5], density=0.3, threads=2)
                ops.gram([x, y])

        sys.setswitchinterval(1e-5)
        x, y = np.random.default_rng(0).standard_normal((2, {count}), dtype=np.float32)
        for _ in range(8):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, b"")


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


ENDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


@pytest.mark.parametrize("number", ENDS)
def test_a_signal_ends_a_command_in_one_line(number: signal.Signals, tmp_path: Path) -> None:
    """While it reads a recipe from a pipe that nobody writes to."""
    recipe = tmp_path / "recipe.yml"
    os.mkfifo(recipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "fastmerge", "merge", recipe, tmp_path / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    pipe = None
    while pipe is None and process.poll() is None:
        time.sleep(0.01)
        with suppress(OSError):  # until there is a reader
            pipe = os.open(recipe, os.O_WRONLY | os.O_NONBLOCK)
    # Python sees a signal that comes just before it waits only when it has waited.
    while process.poll() is None and not _is_asleep(process.pid):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", f"error: {ENDS[number]}\n")
    assert pipe is not None
    os.close(pipe)
    assert process.returncode == 128 + number


def _is_asleep(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    code = (
        "import os, signal\n"
        "from fastmerge.cli.signals import listen\n"
        "listen()\n"
        "os.kill(os.getpid(), signal.SIGHUP)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=60, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert done.returncode == 0

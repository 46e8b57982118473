"""Threads that wait passively where other programs use the cores.

OpenMP's threads spin while they wait for one another. On shared cores they spin away the time that
the thread they wait for would need. The policy is read when torch is loaded, so a process that has
loaded it starts anew.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

POLICY = "OMP_WAIT_POLICY"

SAMPLE = 0.2
"""Seconds for which the other programs are watched."""

BUSY = 0.25
"""Cores that other programs use at least where waiting passively pays."""

STAT = Path("/proc/stat")


def wait_passively_on_shared_cores(arguments: Sequence[str]) -> None:
    """Starts this process anew, as it was started, with passive threads if the cores are shared.

    It does nothing where the policy is set, and where ``arguments`` are not those of this process,
    as in a call of :func:`dsnet.cli.main` by another program.
    """
    if POLICY in os.environ or list(arguments) != sys.argv[1:]:
        return
    if busy_cores() < BUSY:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, POLICY: "PASSIVE"}
    # ``-m dsnet`` would import a checkout in the current folder in place of the installed package.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def busy_cores() -> float:
    """Cores that other programs use now; 0 where the system does not tell."""
    try:
        wall, own, before = time.perf_counter(), time.process_time(), _busy_seconds()
        time.sleep(SAMPLE)
        seconds = _busy_seconds() - before - (time.process_time() - own)
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, seconds / (time.perf_counter() - wall))


def _busy_seconds() -> float:
    """CPU time of all programs since the machine started: user, nice, system."""
    _, *ticks = STAT.read_text().split("\n", 1)[0].split()
    return sum(map(int, ticks[:3])) / os.sysconf("SC_CLK_TCK")

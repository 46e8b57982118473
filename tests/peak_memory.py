"""How much memory parts of a script add to the peak of a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import dsnet_kernels

PROLOGUE = """
import torch, dsnet_kernels
def peak():
    # Not getrusage's, which begins at the parent's.
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0])
"""


def printed_by(script: str, folder: Path) -> tuple[int, ...]:
    """The numbers that ``script`` prints, whose ``peak()`` is the process's so far in KiB.

    The peak never falls: what a script allocates and gives back before ``peak()`` hides as much
    after it. ``folder`` is the working directory.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + script],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(dsnet_kernels.__file__).parents[1]),
            # Each thread has scratch of its own.
            "OMP_NUM_THREADS": "2",
        },
        # Not the repository: its sources must not hide an installed package.
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return tuple(int(value) for value in done.stdout.split())

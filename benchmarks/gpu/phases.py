"""Phases: one program each, run in turn, so that a failure in one stops no other.

Nothing here imports torch: the parent process runs while the build replaces the libraries.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

LIMITS = {
    "build": 240,
    "roofs": 30,
    "models": 450,
    "ops": 550,
    "tests": 330,
    "sanitizer": 300,
}
"""Seconds that each phase may take, in order. The total budget shortens the later ones."""

BUDGET = 570.0
"""Seconds for the whole command: under ten minutes."""

COMMANDS = (("build", "roofs", "models"), ("ops",), ("tests", "sanitizer"))
"""The phases of three commands that together do everything, the most important first."""

ENDING = ((signal.SIGINT, 8.0), (signal.SIGTERM, 2.0), (signal.SIGKILL, None))
"""How a phase is ended: a signal, and the seconds it has before the next. Pytest reports what it
has on SIGINT, and our programs write their results."""

GRACE = sum(seconds for _, seconds in ENDING if seconds is not None)

DRY_SETTINGS = {"OMP_NUM_THREADS": "1"}
"""Several threads gain nothing on small inputs, and lose much on shared cores."""

POLL = 0.5
"""Seconds between two looks at the results of a running phase."""

SHORTEST = 5.0
"""Seconds: with less left of its limit a phase is not started."""

Command = Callable[[str, Path, bool, float], list[str]]
"""(phase, result file, dry run, limit) → what to execute."""


@dataclass(frozen=True)
class Phase:
    """What became of one phase.

    Args:
        name: of :data:`LIMITS`.
        status: ``passed``, ``failed``, ``timeout``, ``missing`` for an absent tool, ``running``,
            or ``not started`` where the budget was spent.
        seconds: it took.
        limit: seconds it had.
        log: name of the file with its output, beside the record.
        detail: why it did not pass.
        results: its figures, up to the point that it reached.
    """

    name: str
    status: str
    seconds: float
    limit: float
    log: str
    detail: str | None = None
    results: dict[str, Any] = field(default_factory=dict)


def program(phase: str, result: Path, dry_run: bool, limit: float) -> list[str]:
    """The command of a phase's own program."""
    module = [sys.executable, "-m", "benchmarks.gpu.program", phase]
    flags = ["--dry-run"] if dry_run else []
    return [*module, "--result", str(result), "--limit", f"{limit:g}", *flags]


def run_phase(
    name: str,
    folder: Path,
    scratch: Path,
    *,
    limit: float,
    dry_run: bool,
    command: Command = program,
    progress: Callable[[Phase], None] = lambda phase: None,
) -> Phase:
    """Runs one phase in a session of its own and ends all its processes at ``limit`` seconds.

    ``progress`` receives the phase as far as it is, each time that its results change.
    """
    result, log = scratch / f"{name}.json", folder / f"{name}.log"
    start = time.monotonic()

    def phase(status: str, detail: str | None = None) -> Phase:
        seconds, found = round(time.monotonic() - start, 1), _written(result).get("results", {})
        return Phase(name, status, seconds, limit, log.name, detail, found)

    with open(log, "wb") as output:
        process = subprocess.Popen(
            command(name, result, dry_run, limit),
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | (DRY_SETTINGS if dry_run else {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(process, start + limit, result, lambda: progress(phase("running")))
        finally:
            _end(process)
    return phase(*_verdict(code, limit, _written(result)))


def signal_group(process: subprocess.Popen, sign: signal.Signals) -> None:
    """Sends a signal to a process that leads a session, and to all in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sign)


def shortened(limit: float, left: float) -> float | None:
    """The limit of a phase with ``left`` seconds of the budget; None where it is too short.

    The time that it takes to end a phase belongs to the budget.
    """
    short = round(min(limit, left - GRACE), 1)
    return short if short >= min(limit, SHORTEST) else None


def _wait(
    process: subprocess.Popen, deadline: float, result: Path, changed: Callable[[], None]
) -> int | None:
    """The exit status, or None at the deadline."""
    seen = None
    while True:
        left = deadline - time.monotonic()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, min(POLL, left)))
        if left <= POLL:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(max(0.0, left))
            return None
        # Written by rename: either there and whole, or not there.
        stamp = result.stat().st_mtime_ns if result.exists() else None
        if stamp != seen:
            seen = stamp
            changed()


def _written(result: Path) -> Mapping[str, Any]:
    return json.loads(result.read_text("utf-8")) if result.exists() else {}


def _verdict(code: int | None, limit: float, written: Mapping[str, Any]) -> tuple[str, str | None]:
    if code is None:
        return "timeout", f"ended after its limit of {limit:g} s"
    if "status" in written:
        return written["status"], written["detail"]
    return "failed", f"the phase ended with exit status {code} before it wrote a verdict"


def _end(process: subprocess.Popen) -> None:
    """Ends the process and all its children: asks twice, then kills."""
    for sign, patience in ENDING:
        signal_group(process, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)

"""Phases: a program each, run one after the other, whatever becomes of the others."""

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

LIMITS = {"build": 110, "tests": 90, "sanitizer": 80, "roofs": 20, "ops": 180, "models": 100}
"""Seconds that each phase may take, in order; all together fit in ten minutes."""

GRACE = 5.0
"""Seconds between the request to end and the kill."""

Command = Callable[[str, Path, bool], list[str]]
"""(phase, result file, dry run) → what to execute."""


@dataclass(frozen=True)
class Phase:
    """What became of one phase.

    Args:
        name: of :data:`LIMITS`.
        status: ``passed``, ``failed``, ``timeout``, or ``missing`` for an absent tool.
        seconds: it took.
        limit: seconds it had.
        log: name of the file with its output, beside the record.
        detail: why it did not pass.
        results: its figures, as far as it came.
    """

    name: str
    status: str
    seconds: float
    limit: float
    log: str
    detail: str | None = None
    results: dict[str, Any] = field(default_factory=dict)


def program(phase: str, result: Path, dry_run: bool) -> list[str]:
    """The command of a phase's own program."""
    flags = ["--dry-run"] if dry_run else []
    return [sys.executable, "-m", "benchmarks.gpu.program", phase, "--result", str(result), *flags]


def run_phase(
    name: str,
    folder: Path,
    scratch: Path,
    *,
    limit: float,
    dry_run: bool,
    command: Command = program,
) -> Phase:
    """Runs one phase in a session of its own and ends all its processes at ``limit`` seconds."""
    result, log = scratch / f"{name}.json", folder / f"{name}.log"
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command(name, result, dry_run),
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    written = json.loads(result.read_text("utf-8")) if result.exists() else {}
    status, detail = _verdict(code, limit, written)
    return Phase(
        name=name,
        status=status,
        seconds=round(time.monotonic() - start, 1),
        limit=limit,
        log=log.name,
        detail=detail,
        results=written.get("results", {}),
    )


def _verdict(code: int | None, limit: float, written: Mapping[str, Any]) -> tuple[str, str | None]:
    if code is None:
        return "timeout", f"ended after its limit of {limit:g} s"
    if "status" in written:
        return written["status"], written["detail"]
    return "failed", f"the phase ended with exit status {code} before it told its own"


def _end(process: subprocess.Popen) -> None:
    """Ends the process and its children: asks, then kills."""
    for sign, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)

"""The tests that need a GPU: a smoke subset first, then the others."""

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from .counts import Count
from .journal import SLOW, counted
from .phases import ROOT, signal_group
from .program import Context

WORKERS = 8
"""Processes of pytest, where pytest-xdist is installed: most time goes into Triton's compiler."""

OPTIONS = [
    *("-m", "gpu", "-q", "--tb=short", "--strict-markers", "--continue-on-collection-errors"),
    *("-p", "no:cacheprovider", "-p", "benchmarks.gpu.journal"),
]
"""The operations' tests carry the mark too, for the backends of a GPU."""

SMOKE = ("tests/test_operations_gpu.py", "tests/test_optimized_graphs.py")
"""Streams, graphs, devices, and one shape of every operation in every dtype."""

SELECTIONS = {
    "smoke": list(SMOKE),
    "others": ["tests", *(f"--ignore={path}" for path in SMOKE)],
}

ENDING = 6.0
"""Seconds that pytest has to report after it was interrupted."""

MOST_TESTS = 800
MOST_SMOKE_TESTS = 90
MOST_COMPILE_TESTS = 24
"""Bounds of the dry run."""


def run(context: Context) -> str | None:
    if context.dry_run:
        return _collect(context)
    problems = []
    for name, selection in SELECTIONS.items():
        # The first may take half of the time, so that the second runs in any case.
        limit = context.left() / 2 if name == "smoke" else context.left() - ENDING
        journal = context.result.with_name(f"{name}.jsonl")
        try:
            code = _pytest([*selection, *_workers(), "--journal", str(journal)], limit)
        finally:
            lines = journal.read_text("utf-8").splitlines() if journal.exists() else []
            context.results[name] = {"exit_status": None} | counted(lines)
            context.write()
        context.results[name]["exit_status"] = code
        context.write()
        found = problem(code, context.results[name])
        problems += [f"{name}: {found}"] if found else []
    return "; ".join(problems) or None


def problem(code: int | None, counts: dict) -> str | None:
    """The reason why a run of pytest proves less than it should; None if all is well."""
    if code is None:
        return (
            f"pytest was ended at its limit, {counts['passed']} tests passed,"
            f" {counts['failed']} failed"
        )
    if code != 0:
        return f"pytest ended with status {code}, {counts['failed']} tests failed"
    return None if counts["passed"] else "every test was skipped"


def _workers() -> list[str]:
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(WORKERS, os.cpu_count() or 1)))]


def _pytest(arguments: list[str], limit: float) -> int | None:
    """Exit status; None where it was interrupted after ``limit`` seconds."""
    command = [sys.executable, "-m", "pytest", *arguments, *OPTIONS]
    print(shlex.join(command), flush=True)
    # A group of its own: xdist waits for its workers, so that all are interrupted, and then killed.
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(max(0.0, limit))
    except subprocess.TimeoutExpired:
        signal_group(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        return None
    except KeyboardInterrupt:
        signal_group(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
        raise
    finally:
        signal_group(process, signal.SIGKILL)
        process.wait()


def _collect(context: Context) -> str | None:
    """Counts the tests that a machine with a GPU and both libraries would run."""
    start, listed = time.monotonic(), context.result.with_name("collected.txt")
    arguments = ["tests", "--collect-only", "--pretend-gpu", "--journal", str(listed)]
    code = _pytest(arguments, context.left())
    if code != 0:
        return f"pytest ended with status {code}"
    names = _names(listed)
    smoke = sum(name.startswith(SMOKE) for name in names)
    slow = sum(SLOW in name.partition("::")[2] for name in names)
    print(f"collected in {time.monotonic() - start:.1f} s; others run {' '.join(_workers())}")
    return context.count(
        Count("tests", len(names), MOST_TESTS, least=1),
        Count("tests of the smoke subset", smoke, MOST_SMOKE_TESTS, least=1),
        Count("tests of torch.compile", slow, MOST_COMPILE_TESTS),
    )


def _names(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.exists() else []

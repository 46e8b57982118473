"""The tests that need a GPU, and the operations' own with the GPU's backends."""

import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from dsnet_kernels.backends import OPERATIONS

from .phases import ROOT
from .program import Context

OPTIONS = ["-q", "-p", "no:cacheprovider", "--strict-markers", "-ra"]
NOTHING_COLLECTED = 5  # pytest's exit status


STAND_INS = ("_cuda", "_triton")
"""Endings of the files that run a backend's kernels in the emulator or the interpreter."""


def selections(dry_run: bool) -> dict[str, list[str]]:
    """pytest's arguments by what they select; in a dry run with the GPU's stand-ins."""
    found = sorted(
        path for name in OPERATIONS for path in (ROOT / "tests").glob(f"test_{name}*.py")
    )
    files = [
        str(path.relative_to(ROOT))
        for path in found
        if dry_run or not path.stem.endswith(STAND_INS)
    ]
    return {
        "gpu": ["-m", "gpu", "tests"],
        "operations": [*files, "-m", "not gpu", "-k", "cuda or triton"],
    }


def run(context: Context) -> str | None:
    problems = []
    for name, arguments in selections(context.dry_run).items():
        report = context.result.with_name(f"{name}.xml")
        extra = ["--collect-only"] if context.dry_run else [f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *arguments, *OPTIONS, *extra]
        print(shlex.join(command), flush=True)
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        counts = {"exit_status": code} | (counted(report) if report.exists() else {})
        context.results[name] = counts
        context.write()
        found = problem(code, counts, context.dry_run)
        if found:
            problems.append(f"{name}: {found}")
    return "; ".join(problems) or None


def problem(code: int, counts: dict[str, int], dry_run: bool) -> str | None:
    if dry_run:
        # Collecting is all that can be tried; a selection may be empty without a GPU's backends.
        return None if code in (0, NOTHING_COLLECTED) else f"pytest ended with status {code}"
    if code != 0:
        return f"pytest ended with status {code}, {counts.get('failed', 0)} tests failed"
    return None if counts["passed"] else "every test was skipped"


def counted(report: Path) -> dict[str, int]:
    """passed, failed (with errors) and skipped tests of a JUnit file."""
    cases = ElementTree.parse(report).getroot().iter("testcase")
    outcomes = [{child.tag for child in case} for case in cases]
    failed = sum(bool(tags & {"failure", "error"}) for tags in outcomes)
    skipped = sum("skipped" in tags for tags in outcomes)
    return {"passed": len(outcomes) - failed - skipped, "failed": failed, "skipped": skipped}

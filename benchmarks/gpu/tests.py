"""The tests that need a GPU."""

import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from .phases import ROOT
from .program import Context

OPTIONS = ["-q", "-p", "no:cacheprovider", "--strict-markers", "-ra"]

SELECTION = ["-m", "gpu", "tests"]
"""Tests of the operations carry the mark too, where they run on a GPU's backends."""


def run(context: Context) -> str | None:
    report = context.result.with_name("gpu.xml")
    extra = ["--collect-only"] if context.dry_run else [f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *SELECTION, *OPTIONS, *extra]
    print(shlex.join(command), flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    counts = counted(report) if report.exists() else {}
    context.results["gpu"] = {"exit_status": code} | counts
    context.write()
    return problem(code, counts, context.dry_run)


def problem(code: int, counts: dict[str, int], dry_run: bool) -> str | None:
    if dry_run:
        return None if code == 0 else f"pytest ended with status {code}"
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

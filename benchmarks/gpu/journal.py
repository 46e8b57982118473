"""A pytest plugin that writes each result as it comes, so that a run that is ended counts.

``-p benchmarks.gpu.journal --journal FILE`` appends a JSON line per test, and prints a failure's
text at once. ``--pretend-gpu`` writes the names of the tests that a machine with a GPU and both
libraries would run, a line each, and runs none.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

GPU_BACKENDS = {"cuda", "triton"}

SLOW = "compile"
"""Tests whose names contain it run last: Inductor takes seconds for each."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("journal")
    group.addoption("--journal", metavar="FILE", help="append a JSON line per test")
    group.addoption("--pretend-gpu", action="store_true", help="collect as on a GPU; run nothing")


def pytest_configure(config: pytest.Config) -> None:
    # Under xdist the workers report to the first process, which alone writes.
    if config.getoption("--journal") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Journal(Path(config.getoption("--journal"))))
    if config.getoption("--pretend-gpu"):
        config.option.collectonly = True
        _pretend()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: SLOW in item.name)


def _pretend() -> None:
    import torch

    from dsnet_kernels.backends import Operation

    presence = Operation.presence

    def with_libraries(self: Operation, backend: str) -> str | None:
        return None if backend in GPU_BACKENDS & {*self.present} else presence(self, backend)

    torch.cuda.is_available = lambda: True
    Operation.presence = with_libraries


class Journal:
    """Writes the outcomes and prints the failures."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test's own phase counts, and any of its others that fails or skips.
        if report.when == "call" or report.outcome != "passed":
            self._write(report, report.outcome, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report, "failed", 0.0)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            self.path.write_text("".join(f"{item.nodeid}\n" for item in session.items), "utf-8")

    def _write(
        self, report: pytest.TestReport | pytest.CollectReport, outcome: str, seconds: float
    ) -> None:
        line = {"test": report.nodeid, "outcome": outcome, "seconds": round(seconds, 2)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if outcome == "failed":
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)


def counted(lines: Iterable[str]) -> dict[str, int | list[str]]:
    """Tests that passed, failed and were skipped, and the names of those that failed."""
    outcomes: dict[str, str] = {}
    for line in lines:
        entry = json.loads(line)
        # A teardown that fails comes after a call that passed.
        if outcomes.get(entry["test"]) != "failed":
            outcomes[entry["test"]] = entry["outcome"]
    kinds = list(outcomes.values())
    return {
        **{kind: kinds.count(kind) for kind in ("passed", "failed", "skipped")},
        "failures": [test for test, outcome in outcomes.items() if outcome == "failed"],
    }

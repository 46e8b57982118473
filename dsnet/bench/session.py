"""Runs measurements one after another, within a budget of time, and returns one report."""

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from . import report
from .device import CPU, Device
from .peers import versions
from .report import Report, Row
from .roofs import measure_roofs, yardstick
from .suite import Task
from .table import render, row_line

WORTH_STARTING = 0.25
"""A row is not started with less than this share of the time that it takes on an idle machine."""


def take(
    command: str,
    tasks: Sequence[Task],
    *,
    threads: int | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    baselines: Iterable[str] = (),
    device: Device = CPU,
    budget: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Report:
    """Runs ``tasks`` in turn.

    Args:
        command: that the report names.
        tasks: a row each.
        threads: PyTorch's own number if None.
        dtypes: whose roofs are measured.
        baselines: of whose packages the report names the versions.
        device: where the tasks run.
        budget: seconds of wall-clock time, shared among the rows left; rows that are not started
            in time are named in the report.
        clock: returns seconds.
    """
    start = clock()
    with use_threads(threads):
        environment = report.environment(command, device)
        environment["versions"] |= versions(list(baselines))
        roofs = measure_roofs(dtypes, device=device)
        probe = Probe(yardstick(device))
        rows, missing, failed = _run(tasks, probe, start + budget, clock)
        probe()
    return Report(
        **environment,
        seconds=clock() - start,
        # Operations are shown first; the networks' rows end the table.
        rows=tuple(sorted(rows, key=lambda row: row.kind == "model")),
        roofs=roofs,
        yardstick=tuple(probe.seconds),
        cpu_share=None if device.gpu else statistics.median(probe.cpu_shares),
        missing=tuple(missing),
        failed=tuple(failed),
    )


@dataclass
class Probe:
    """Times one and the same work again and again, and the share of the cores that it had.

    Args:
        work: runs it with all threads and returns its seconds.
        seconds: of every call.
        cpu_shares: CPU time of this process over wall-clock time of its threads, of every call.
    """

    work: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    cpu_shares: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.seconds.append(self.work())
        available = (time.perf_counter() - wall) * torch.get_num_threads()
        self.cpu_shares.append((time.process_time() - cpu) / available)


def deliver(result: Report, path: str | None) -> int:
    """Prints the table, and writes the report to ``path``; with ``-`` prints the report instead.

    Returns:
        The exit status: 1 if one of ours failed its check or could not run, or a row had not
        enough memory, else 0.
    """
    if path == "-":
        print(result.to_json(), end="")
    else:
        print(render(result), end="")
        if path:
            report.write_atomically(path, result.to_json())
    return 1 if result.failed or any(row.failed() for row in result.rows) else 0


def check_target(path: str | None) -> None:
    """Raises ValueError for a ``path`` of :func:`deliver` that could not be written."""
    if path == "":
        raise ValueError("--json: expected a file or -, got ''")
    if path not in (None, "-"):
        report.check_writable(path)


def _run(
    tasks: Sequence[Task], probe: Probe, deadline: float, clock: Callable[[], float]
) -> tuple[list[Row], list[str], list[str]]:
    """The rows, the titles of those without time, and of those without memory with the reason."""
    rows: list[Row] = []
    missing: list[str] = []
    failed: list[str] = []
    try:
        for index, task in enumerate(tasks):
            now = clock()
            left = deadline - now
            if rows and left < max(task.least, WORTH_STARTING * task.seconds):
                missing.append(task.title)
                continue
            number = f"[{index + 1}/{len(tasks)}]"
            progress(f"{number} {task.title}")
            probe()
            share = task.seconds / sum(each.seconds for each in tasks[index:])
            try:
                rows.append(task.run(until=now + max(0.0, left) * share))
            except torch.OutOfMemoryError as error:
                failed.append(f"{task.title}: {str(error).splitlines()[0]}")
                _tell(f"{number} {failed[-1]}")
                continue
            _tell(f"{number} {task.title}: {row_line(rows[-1])}, {clock() - now:.1f} s")
    finally:
        progress("")
    return rows, missing, failed


def _tell(line: str) -> None:
    """Prints a line where there is no terminal whose last line :func:`progress` replaces."""
    if not sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)


def progress(text: str) -> None:
    """Replaces the last line on a terminal; says nothing elsewhere."""
    if sys.stderr.isatty():
        # The escape sequence clears the rest of the line.
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()


@contextlib.contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """With so many threads inside; None leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

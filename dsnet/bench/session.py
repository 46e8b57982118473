"""A run of tasks: with so many threads, each in turn, into one report."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from . import report
from .peers import versions
from .report import Report, Row
from .roofs import measure_roofs, yardstick
from .suite import Task
from .table import render


def take(
    command: str,
    tasks: Sequence[Task],
    *,
    threads: int | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    baselines: Iterable[str] = (),
) -> Report:
    """Runs ``tasks`` in turn.

    Args:
        command: that the report names.
        tasks: a row each.
        threads: PyTorch's own number if None.
        dtypes: whose roofs are measured.
        baselines: of whose packages the report names the versions.
    """
    start = time.monotonic()
    with use_threads(threads):
        environment = report.environment(command)
        environment["versions"] |= versions(list(baselines))
        roofs = measure_roofs(dtypes)
        machine = yardstick()
        varied = []
        rows = tuple(_run(tasks, before=lambda: varied.append(machine())))
        varied.append(machine())
    seconds = time.monotonic() - start
    return Report(**environment, seconds=seconds, rows=rows, roofs=roofs, yardstick=tuple(varied))


def deliver(result: Report, path: str | None) -> int:
    """Prints the table, and writes the report to ``path``; with ``-`` prints the report instead.

    Returns:
        The exit status: 1 if one of ours failed its check or could not run, else 0.
    """
    if path == "-":
        print(result.to_json(), end="")
    else:
        print(render(result), end="")
        if path:
            report.write_atomically(path, result.to_json())
    return 1 if any(row.failed() for row in result.rows) else 0


def check_target(path: str | None) -> None:
    """Raises ValueError for a ``path`` of :func:`deliver` that could not be written."""
    if path == "":
        raise ValueError("--json: expected a file or -, got ''")
    if path not in (None, "-"):
        report.check_writable(path)


def _run(tasks: Sequence[Task], before: Callable[[], None]) -> Iterator[Row]:
    try:
        for index, task in enumerate(tasks):
            progress(f"[{index + 1}/{len(tasks)}] {task.title}")
            before()
            yield task.run()
    finally:
        progress("")


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

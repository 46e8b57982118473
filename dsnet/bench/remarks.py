"""What is said under and above the tables of a report."""

from collections.abc import Sequence

from .report import Report, Row
from .row import OUT_OF_TIME

SHARED_CORES = 0.9
"""With less of its threads' time the process shared the cores with other programs."""


def contention(share: float) -> str:
    """Says that the cores were shared."""
    return (
        f"other programs use the cores: this run had {share:.0%} of its threads' time, so times"
        " are longer and vary more"
    )


def missing(report: Report) -> list[str]:
    """The rows for which there was no time or no memory."""
    lines = [f"could not be timed: {each}" for each in report.failed]
    if report.missing:
        count = len(report.missing)
        rows = "1 row was" if count == 1 else f"{count} rows were"
        titles = "; ".join(report.missing)
        lines.append(f"{rows} not timed, the time of --budget was over: {titles}")
    return lines


def remarks(rows: Sequence[Row]) -> list[str]:
    """Compile times, which backend ran what, notes and problems, each once."""
    lines = []
    compiled = [r.compile_seconds for row in rows for r in row.results if r.compile_seconds]
    if compiled:
        lines.append(
            f"compile time, not in the table: {sum(compiled):.0f} s in all,"
            f" {min(compiled):.1f} to {max(compiled):.1f} s per row"
        )
    for row in rows:
        lines += row.notes
        for result in row.results:
            if row.kind == "model" and result.role == "ours":
                lines.append(f"{result.name} runs {by_backend(result.chosen)}")
            if result.problem not in (None, OUT_OF_TIME):
                name = f"{'ours ' if result.role == 'ours' else ''}{result.name}"
                place = f"stage {row.stage}" if row.kind == "op" else f"{row.shape[0]} images"
                lines.append(f"{name}, {place}, {row.work}: {result.problem}")
    return list(dict.fromkeys(lines))


def by_backend(chosen: dict[str, str]) -> str:
    """Which operations each backend runs."""
    backends: dict[str, list[str]] = {}
    for operation, name in chosen.items():
        backends.setdefault(name, []).append(operation)
    return "; ".join(f"{', '.join(ops)} on {name}" for name, ops in backends.items())

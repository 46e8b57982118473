"""A record as Markdown; a dry run's without any time."""

from collections.abc import Iterator, Mapping

from .phases import Phase
from .record import Record


def render(record: Record, tables: Mapping[str, str] | None = None) -> str:
    """The machine, the phases, the counts of a dry run, and the tables of the phases.

    Args:
        record: of the run.
        tables: Markdown by phase, as the phases' programs write it. Without it the tables are made
            here, which imports torch.
    """
    if tables is None:
        from .tables import render as tables_of

        tables = {
            phase.name: tables_of(phase.name, phase.results, dry_run=record.dry_run)
            for phase in record.phases
        }
    lines = [*_heading(record), "", *table(_phases(record.phases))]
    counts = _counts(record.phases)
    if len(counts) > 1:
        lines += ["", "### Work that a GPU would be given", "", *table(counts)]
    for phase in record.phases:
        lines += ["", tables[phase.name].strip()] if tables.get(phase.name) else []
    return "\n".join(lines) + "\n"


def table(cells: list[list[str]]) -> list[str]:
    """The lines of a table, its heading first."""
    head, *body = (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells)
    return [head, "|" + " --- |" * len(cells[0]), *body]


def _heading(record: Record) -> Iterator[str]:
    if record.dry_run:
        yield "# Dry run: no GPU was used and nothing was measured"
    else:
        gpu = record.gpu or {}
        yield f"# {gpu.get('name', 'unknown GPU')}, driver {gpu.get('driver', 'unknown')}"
    versions = ", ".join(
        f"{name} {version}" for name, version in record.versions.items() if version
    )
    yield from ("", f"{record.machine.get('cpu', 'unknown CPU')}; {versions}", "")
    yield f"Commit {record.commit or 'unknown'}, GPU sources {record.native_sources[:16]}"
    yield from ("", f"{record.date}, {record.seconds:.0f} s: `{record.command}`")


def _phases(phases: tuple[Phase, ...]) -> list[list[str]]:
    cells = [["phase", "status", "seconds", "limit", "log", "detail"]]
    for phase in phases:
        times = [f"{phase.seconds:.0f}", f"{phase.limit:g}"]
        cells.append([phase.name, phase.status, *times, phase.log, phase.detail or ""])
    return cells


def _counts(phases: tuple[Phase, ...]) -> list[list[str]]:
    cells = [["phase", "what", "planned", "at least", "at most"]]
    for phase in phases:
        for count in phase.results.get("counts", ()):
            numbers = [f"{count[key]:,}" for key in ("value", "least", "most")]
            cells.append([phase.name, count["name"], *numbers])
    return cells

"""A record as Markdown: the tables of ``dsnet bench``, and what must be known to read them."""

from collections.abc import Iterable, Sequence

from dsnet.bench.report import Report
from dsnet.bench.table import cells, facts, grouped, legend, remarks, title, uses


def render(report: Report) -> str:
    """The whole record."""
    machine, *others = facts(report)
    lines = [f"# {machine}", "", *(f"- {fact}" for fact in others)]
    for rows in grouped(report.rows):
        lines += ["", f"## {title(rows)}", ""]
        for use in uses(rows):
            lines += [f"`{use}`", ""]
        lines += table(cells(rows, report))
        notes = remarks(rows)
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    lines += ["", *legend(report)]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Iterable[str]]) -> list[str]:
    """The lines of a table, its heading first."""
    head, *body = (f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows)
    return [head, "|" + "---|" * len(list(rows[0])), *body]


def _escaped(cell: str) -> str:
    """A star or a tilde marks nothing up, a bar ends no cell."""
    for mark in "|*~":
        cell = cell.replace(mark, f"\\{mark}")
    return cell.strip()

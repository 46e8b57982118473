"""A comparison as text."""

from collections.abc import Iterator

from dsnet.bench.report import Report, Result, Row
from dsnet.bench.table import SHORT, aligned, grouped, heading, time_of, title

from .rounds import HERE, OTHER, verdict

LEGEND = (
    "ms: median ± half the interquartile range. other/here: the median ratio of the rounds, above",
    "1 where this checkout is faster, and its 95 % confidence interval. slower, faster: the whole",
    "interval is beyond the margin.",
)


def render(report: Report, reference: str, commit: str, margin: float) -> str:
    """The machine, both commits, a table per operation and network, problems, and the verdict."""
    here = report.commit or "unknown"
    lines = [*heading(report), f"other: {commit} ({reference}); here: {here}"]
    for rows in grouped(report.rows):
        head = ["what", "shape", "pass", OTHER, HERE, "other/here", "interval", "backends", ""]
        cells = [head, *(_line(row, margin) for row in rows)]
        lines += ["", title(rows), *aligned(cells)]
        lines += [f"  {problem}" for row in rows for problem in _problems(row)]
    lines += ["", *LEGEND, f"margin {margin:.0%}: {_summary(report, margin)}"]
    return "\n".join(lines) + "\n"


def _line(row: Row, margin: float) -> list[str]:
    other, here = _sides(row)
    place = f"{row.stage} {row.use.partition(':')[0]}" if row.kind == "op" else row.work
    low, high = here.ratio_interval or (None, None)
    return [
        place,
        "×".join(map(str, row.shape)),
        SHORT.get(row.work, row.work),
        time_of(other),
        time_of(here),
        "-" if here.ratio is None else f"{here.ratio:.3f}×",
        "-" if low is None else f"{low:.3f} to {high:.3f}",
        "→".join(dict.fromkeys(map(_backend, (other, here)))),
        verdict(row, margin),
    ]


def _sides(row: Row) -> tuple[Result, Result]:
    (here,) = row.ours()
    return row.result(OTHER), here


def _backend(result: Result) -> str:
    return "+".join(dict.fromkeys(result.chosen.values())) or "-"


def _problems(row: Row) -> Iterator[str]:
    for result in _sides(row):
        if result.problem is not None:
            place = f"stage {row.stage}, " if row.kind == "op" else ""
            yield f"{result.name}, {place}{row.work}: {result.problem}"


def _summary(report: Report, margin: float) -> str:
    verdicts = [verdict(row, margin) for row in report.rows]
    names = ("slower", "faster", "same", "not compared")
    return ", ".join(f"{verdicts.count(name)} {name}" for name in names)

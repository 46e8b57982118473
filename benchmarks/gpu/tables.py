"""The results of a phase as Markdown tables, in the form of ``dsnet bench``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dsnet.bench.cases import stages
from dsnet.bench.report import Report, Result, Roof, Row, row_of
from dsnet.bench.table import BASELINES, cells, digits, legend, remarks, time_of, uses

from ..reporting.markdown import table
from .exponentials import EXPONENTIALS, needed

MODEL = "dsnet_tiny"
"""The network whose stages and steps are measured."""

Results = Mapping[str, Any]


def render(phase: str, results: Results, *, dry_run: bool = False) -> str:
    """Markdown of a phase that measures; empty for the others."""
    make: dict[str, Callable[[Results], Iterator[str]]] = {
        "roofs": _roofs,
        "ops": _ops,
        "models": _models,
    }
    if phase not in make or not results:
        return ""
    lines = _checked(results) if dry_run else make[phase](results)
    return "\n".join(lines)


def roofs_of(results: Results) -> tuple[Roof, ...]:
    return tuple(
        Roof(**(fields | {"quartiles": tuple(fields["quartiles"])}))
        for fields in results.get("roofs", ())
    )


def rows_of(results: Results) -> list[Row]:
    return [row_of(fields) for fields in results.get("rows", ())]


def _roofs(results: Results) -> Iterator[str]:
    for roof in roofs_of(results):
        yield f"- {roof.name} {roof.dtype}: {roof.rate / 1e12:.2f} {UNITS.get(roof.name, '')}"


UNITS = {
    "copy": "TB/s",
    "product": "TFLOP/s",
    "exponentials": "T/s",
}


def _ops(results: Results) -> Iterator[str]:
    rows = rows_of(results)
    report = _report(rows, roofs_of(results))
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.subject, row.dtype, row.work), []).append(row)
    for (subject, dtype, work), group in groups.items():
        yield from ("", f"### {subject}, {dtype}, {work}", "")
        yield from (f"`{use}`" for use in uses(group))
        yield ""
        yield from table(cells(group, report))
        yield from _exponentials(group, report)
        yield from _notes(group)
    if rows:
        yield from ("", *legend(report))
    yield from _missing(results)


def _exponentials(rows: Sequence[Row], report: Report) -> Iterator[str]:
    """The time of a forward's exponentials alone, at the rate that this run measured."""
    roof = report.roof(EXPONENTIALS)
    for row in rows if roof is not None else ():
        stage = stages(MODEL, row.shape[0], row.image)[row.stage - 1]
        count = needed(row.subject, stage)
        if count and row.work.startswith("forward"):
            yield ""
            yield (
                f"- stage {row.stage}, {row.shape[0]} images: the exponentials alone take"
                f" {digits(count / roof.rate * 1e6)} µs"
            )


def _models(results: Results) -> Iterator[str]:
    head = ["work", "dtype", "images", "", "time", "images/s", "kernels", "vs best", "check"]
    lines, rows = [head], rows_of(results)
    for row in rows:
        for result in row.results:
            name, *graph = result.name.split(", ")
            rate = f"{row.shape[0] / result.median:.0f}" if result.median else "-"
            lines.append(
                [
                    row.work,
                    row.dtype,
                    str(row.shape[0]),
                    ", ".join([BASELINES.get(name, name), *graph]),
                    _time(result, row),
                    rate,
                    "-" if result.launches is None else str(result.launches),
                    _ratio(result),
                    _check(result),
                ]
            )
    yield from ("", "### Networks", "", *table(lines), *_notes(rows))
    yield from _missing(results)


def _time(result: Result, row: Row) -> str:
    text = time_of(result, row.best == result.name)
    return text if result.median is None else f"{text.rstrip(' *')} ms"


def _ratio(result: Result) -> str:
    """The best baseline's time over this one's; ~ where the interval does not exclude 1."""
    if result.ratio is None:
        return "-"
    low, high = result.ratio_interval or (0.0, float("inf"))
    return f"{'~' if low <= 1 <= high else ''}{result.ratio:.2f}×"


def _check(result: Result) -> str:
    if result.problem is not None:
        return "FAILED" if result.role == "ours" else result.problem
    return "-" if result.error is None else digits(result.error)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    notes = remarks(rows)
    if notes:
        yield from ("", *(f"- {note}" for note in notes))


def _missing(results: Results) -> Iterator[str]:
    missing = results.get("missing", ())
    if missing:
        yield from ("", f"No time was left for {len(missing)} rows: {'; '.join(missing)}.")


def _checked(results: Results) -> Iterator[str]:
    """Which contenders of a dry run's rows passed their checks; no time."""
    rows = rows_of(results)
    if not rows:
        return
    lines = [["work", "stage", "shape", "dtype", "contenders", "check"]]
    for row in rows:
        names = [result.name for result in row.results]
        problems = [f"{r.name}: {r.problem}" for r in row.results if r.problem]
        shape = "×".join(map(str, row.shape))
        place = [f"{row.subject} {row.work}", str(row.stage), shape, row.dtype]
        lines.append([*place, ", ".join(names), "; ".join(problems) or "passed"])
    yield from ("", *table(lines))


def _report(rows: Sequence[Row], roofs: tuple[Roof, ...]) -> Report:
    return Report(
        machine={}, versions={}, commit=None, date="", command="", seconds=0.0,
        rows=tuple(rows), roofs=roofs,
    )  # fmt: skip

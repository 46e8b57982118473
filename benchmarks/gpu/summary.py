"""A record as Markdown; a dry run's without any time."""

from collections.abc import Iterator
from typing import Any

from dsnet.bench.report import Result, Row, row_of

from .phases import Phase
from .record import Record

NAMES = {
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager ch-last",
    "native": "native ATen",
    "compile": "torch.compile",
}

LEGEND = (
    "µs or ms: median ± half the interquartile range, inputs outside the caches. vs best: the"
    " fastest baseline's time over ours. of copy: bytes by formula per second, over the copy"
    " bandwidth of this run. check: error over what is allowed against float64."
)


def render(record: Record) -> str:
    """Where it ran, the phases, roofs, operations, models, and what went wrong."""
    lines = [*_heading(record), "", *_table(_phases(record.phases))]
    roofs, ops, models = (_results(record, name) for name in ("roofs", "ops", "models"))
    if roofs and not record.dry_run:
        copy, matrix = roofs["copy_bytes_per_second"], roofs["matrix_flops_per_second"]
        lines += [
            "",
            f"Copy {copy / 1e12:.2f} TB/s, bf16 matrix product {matrix / 1e12:.0f} TFLOP/s.",
        ]
    copy = None if record.dry_run else roofs.get("copy_bytes_per_second")
    for rows in _grouped([row_of(fields) for fields in ops.get("rows", [])]):
        lines += ["", f"### {rows[0].subject}, {rows[0].work}, {rows[0].dtype}", ""]
        lines += _table(_op_table(rows, copy, record.dry_run))
    if models.get("rows"):
        lines += ["", "### Networks", ""]
        lines += _table(_model_table(models, record.dry_run))
    lines += ["", LEGEND]
    return "\n".join(lines) + "\n"


def _results(record: Record, name: str) -> dict[str, Any]:
    phase = record.phase(name)
    return phase.results if phase else {}


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
    table = [["phase", "status", "seconds", "limit", "log", "detail"]]
    for phase in phases:
        times = [f"{phase.seconds:.0f}", f"{phase.limit:g}"]
        table.append([phase.name, phase.status, *times, phase.log, phase.detail or ""])
    return table


def _grouped(rows: list[Row]) -> list[list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.subject, row.work, row.dtype), []).append(row)
    return list(groups.values())


def _op_table(rows: list[Row], copy: float | None, dry_run: bool) -> list[list[str]]:
    names = [name for name in NAMES if any(row.result(name) for row in rows)]
    head = ["use, stage", "shape", *(NAMES[name] for name in names)]
    table = [[*head, "backend", "ours", "vs best", "of copy", "check"]]
    for row in rows:
        baselines = [_time(row.result(name), 1e6, "µs", dry_run) for name in names]
        for ours in row.ours():
            bandwidth = row.bandwidth(ours)
            share = "–" if copy is None or bandwidth is None else f"{bandwidth / copy:.0%}"
            table.append(
                [
                    f"{row.use.split(':')[0]}, {row.stage}",
                    "×".join(map(str, row.shape)),
                    *baselines,
                    ours.name,
                    _time(ours, 1e6, "µs", dry_run),
                    _ratio(ours, dry_run),
                    share,
                    _check(ours),
                ]
            )
    return table


def _model_table(models: dict[str, Any], dry_run: bool) -> list[list[str]]:
    table = [["work", "images", "", "time", "images/s", "launches", "vs best", "check"]]
    for row in map(row_of, models["rows"]):
        for result in row.results:
            hidden = dry_run or not result.median
            launches = result.launches
            table.append(
                [
                    row.work,
                    str(row.shape[0]),
                    _name(result.name),
                    _time(result, 1e3, "ms", dry_run),
                    "–" if hidden else f"{row.shape[0] / result.median:.0f}",
                    "–" if launches is None else str(launches),
                    _ratio(result, dry_run),
                    _check(result),
                ]
            )
    return table


def _time(result: Result | None, factor: float, unit: str, dry_run: bool) -> str:
    if result is None or (dry_run and result.problem is None):
        return "–"
    if not result.median:
        return "failed"
    first, third = result.quartiles
    return f"{result.median * factor:.1f} ± {(third - first) / 2 * factor:.1f} {unit}"


def _name(name: str) -> str:
    plain, *graph = name.split(", ")
    return ", ".join([NAMES.get(plain, plain), *graph])


def _ratio(result: Result, dry_run: bool) -> str:
    return "–" if dry_run or result.ratio is None else f"{result.ratio:.2f}×"


def _check(result: Result) -> str:
    if result.problem is not None:
        return result.problem.replace("|", "\\|")
    return "–" if result.error is None else f"{result.error:.2f}"


def _table(cells: list[list[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return [head, "|" + " --- |" * len(cells[0]), *body]

"""A report as aligned text of at most 120 columns."""

from collections.abc import Iterable, Sequence

from .report import Report, Result, Roof, Row
from .roofs import PRODUCT, bound

BASELINES = {
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager ch-last",
    "sdpa": "SDPA",
    "compile": "compile",
    "onnxruntime": "ONNX RT",
    "openvino": "OpenVINO",
}

SHORT = {"reference": "ref", "forward": "fwd", "forward+backward": "fwd+bwd"}

LEGEND = (
    "ms: median ± half the interquartile range and the run's drift. *: best of baselines shown.",
    "vs best: its time over ours, ± half the 95 % confidence interval; ~: no difference. GB/s by",
)

COPY_LEGEND = (
    *LEGEND,
    "formula; of copy: its share of what a copy reaches, timed too (a cache serves small ones).",
    "check: error over what is allowed.",
)

ROOF_LEGEND = (
    *LEGEND,
    "formula. of roof: the least time over ours: that of the bytes at a copy's rate (m; a cache",
    "serves small ones) or that of the FLOPs at a matrix product's (a; the equations' FLOPs, of",
    "which ours saves some), the longer one. check: error over what is allowed.",
)

MEMORY_LEGEND = "MB best, ours: what a call adds at most to the memory of the process."


def render(report: Report) -> str:
    """The machine, a table per operation and one of models, notes, and failures."""
    lines = facts(report)
    for rows in grouped(report.rows):
        lines += ["", title(rows)]
        lines += [f"  {use}" for use in uses(rows)]
        lines += aligned(cells(rows, report))
        lines += [f"  {line}" for line in remarks(rows)]
    lines += ["", *legend(report)]
    return "\n".join(lines) + "\n"


def title(rows: Sequence[Row]) -> str:
    """Of a table of :func:`grouped` rows."""
    series = f", by {rows[0].series}" if rows[0].series else ""
    return f"{rows[0].subject}, {rows[0].dtype}{series}"


def uses(rows: Sequence[Row]) -> list[str]:
    """What the operation computes, for each of its uses."""
    return list(dict.fromkeys(row.use for row in rows if row.kind == "op"))


def cells(rows: Sequence[Row], report: Report) -> list[list[str]]:
    """A table, its heading first, of :func:`grouped` rows."""
    return _op_table(rows, report) if rows[0].kind == "op" else _model_table(rows, report.drift)


def legend(report: Report) -> list[str]:
    """What the columns mean."""
    lines = list(ROOF_LEGEND if report.roofs else COPY_LEGEND)
    if any(map(_has_memory, report.rows)):
        lines.append(MEMORY_LEGEND)
    return lines


def heading(report: Report) -> Iterable[str]:
    """Where, with what, when and by which command."""
    machine, versions = report.machine, report.versions
    yield (
        f"{machine['cpu']} ({machine['cpu_capability']}), {machine['cores']} cores,"
        f" threads: {machine['threads']}"
    )
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    yield f"{known}, commit {report.commit or 'unknown'}"
    yield f"{report.date}, {report.seconds:.0f} s: {report.command}"


def facts(report: Report) -> list[str]:
    """The heading, the roofs and the drift where there are any."""
    roofs = [f"roofs: {', '.join(map(_roof, report.roofs))}"] if report.roofs else []
    drift = f"drift: ±{report.drift:.0%}, of a matrix product before every row"
    return [*heading(report), *roofs, *([drift] if report.yardstick else [])]


def _roof(roof: Roof) -> str:
    unit = "GFLOP/s" if roof.name == PRODUCT else "GB/s"
    return f"{roof.name} {roof.dtype} {digits(roof.rate / 1e9)} {unit}"


def grouped(rows: Sequence[Row]) -> Iterable[list[Row]]:
    """Those of a table each: of one operation or network in one dtype, and one series."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.subject, row.dtype, row.series), []).append(row)
    return groups.values()


def _op_table(rows: Sequence[Row], report: Report) -> list[list[str]]:
    names = _baselines(rows)
    head = ["stage", "shape", "pass", *(BASELINES[name] for name in names)]
    memory = any(map(_has_memory, rows))
    columns = ["MB best", "ours"] if memory else []
    share = "of roof" if report.roofs else "of copy"
    table = [[*head, "ours", "backend", "vs best", *columns, "GB/s", share, "check"]]
    for row in rows:
        lead = [f"{row.stage} {row.use.split(':')[0]}", _shape(row), SHORT[row.work]]
        for result in row.ours():
            bandwidth = row.bandwidth(result)
            rate = "-" if bandwidth is None else f"{bandwidth / 1e9:.1f}"
            rates = [rate, _of_roof(row, result, report)]
            peaks = [_megabytes(each) for each in (row.result(row.best), result) if memory]
            times = _times(row, names, result, report.drift)
            table.append([*lead, *times, *peaks, *rates, _check(result)])
    return table


def _of_roof(row: Row, result: Result, report: Report) -> str:
    """Of the roofs, or of a copy's bandwidth where the report has none."""
    bandwidth, copy = row.bandwidth(result), row.copy_bandwidth()
    if bandwidth is None or copy is None:
        return "-"
    if not report.roofs:
        return f"{bandwidth / copy:.0%}"
    least = bound(row, report)
    return "-" if least is None else f"{least.seconds / result.median:.0%} {least.by[0]}"


def _model_table(rows: Sequence[Row], drift: float) -> list[list[str]]:
    names = _baselines(rows)
    head = ["work", "images", *(BASELINES[name] for name in names)]
    memory = any(map(_has_memory, rows))
    columns = ["MB best", "ours"] if memory else []
    table = [[*head, "ours", "backend", "vs best", *columns, "images/s", "check"]]
    for row in rows:
        work = "backbone" if row.use == "backbone" else row.work
        threads = f", {row.threads} threads" if row.threads else ""
        for result in row.ours():
            rate = "-" if result.problem else f"{row.shape[0] / result.median:.1f}"
            peaks = [_megabytes(each) for each in (row.result(row.best), result) if memory]
            times = _times(row, names, result, drift)
            shape = f"{_shape(row)}{threads}"
            table.append([work, shape, *times, *peaks, rate, _check(result)])
    return table


def _times(row: Row, names: Sequence[str], ours: Result, drift: float) -> list[str]:
    """Baselines, ours, its backend, the ratio."""
    baselines = [time_of(row.result(name), row.best == name, drift) for name in names]
    return [*baselines, time_of(ours, drift=drift), _backend(ours), _ratio(ours)]


def _baselines(rows: Sequence[Row]) -> list[str]:
    return [name for name in BASELINES if any(row.result(name) for row in rows)]


def _shape(row: Row) -> str:
    return "×".join(str(length) for length in row.shape)


def time_of(result: Result | None, best: bool = False, drift: float = 0.0) -> str:
    """Milliseconds and their spread with the drift, a star behind that of the best baseline."""
    if result is None:
        return "-"
    if result.median is None:
        return "failed"
    first, third = result.quartiles
    spread = (third - first) / 2 / result.median + drift
    return f"{digits(result.median * 1e3)} ±{spread:.0%}{'*' if best else ' '}"


def digits(value: float) -> str:
    """Three significant digits without an exponent."""
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f}"


def _has_memory(row: Row) -> bool:
    return any(result.peak_bytes is not None for result in row.results)


def _megabytes(result: Result | None) -> str:
    if result is None or result.peak_bytes is None:
        return "-"
    return digits(result.peak_bytes / 1e6)


def _backend(result: Result) -> str:
    used = dict.fromkeys(name for names in result.chosen.values() for name in names.split("/"))
    used = [SHORT.get(name, name) for name in used]
    name = SHORT.get(result.name, result.name)
    return name if used == [name] else f"{name}→{'+'.join(used)}"


def _ratio(result: Result) -> str:
    if result.ratio is None:
        return "-"
    if result.ratio_interval is None:
        return f"~{result.ratio:.2f}×"
    low, high = result.ratio_interval
    half = (high - low) / 2 / result.ratio
    return f"{'~' if low <= 1 <= high else ''}{result.ratio:.2f}× ±{half:.0%}"


def _check(result: Result) -> str:
    if result.problem is not None:
        return "FAILED"
    return f"{result.error:.2f}"


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the columns below each other, the first two to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(" ".join(padded).rstrip())
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
            if result.problem is not None:
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

"""A report as aligned text of at most 120 columns."""

import textwrap
from collections.abc import Iterable, Sequence

from .remarks import SHARED_CORES, contention, missing, remarks
from .report import Report, Result, Roof, Row
from .roofs import PRODUCT, bound
from .row import GRAPH, OUT_OF_TIME

BASELINES = {
    "eager_nchw": "eager NCHW",
    "eager_channels_last": "eager ch-last",
    "sdpa": "SDPA",
    "compile": "compile",
    "onnxruntime": "ONNX RT",
    "openvino": "OpenVINO",
    "native": "native ATen",
    "eager_amp": "eager AMP",
}

COLUMNS = 120
"""A wider table has a line per contender instead."""

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

SHORTENED = "!"
SHORTENED_LEGEND = (
    f"{SHORTENED}: the row's share of --budget ran out: fewer rounds, and baselines without a time."
)


def render(report: Report) -> str:
    """The machine, a table per operation and one of models, notes, and failures."""
    lines = _folded(facts(report))
    for rows in grouped(report.rows):
        lines += ["", title(rows)]
        lines += _folded([f"  {use}" for use in uses(rows)])
        table = aligned(cells(rows, report))
        if max(map(len, table)) > COLUMNS:
            table = aligned(_by_contender(rows, report))
        lines += table
        lines += _folded([f"  {line}" for line in remarks(rows)])
    lines += ["", *legend(report), *_folded(missing(report))]
    return "\n".join(lines) + "\n"


def _folded(lines: Iterable[str]) -> list[str]:
    return [
        part
        for line in lines
        for part in textwrap.wrap(
            line.strip(),
            COLUMNS,
            initial_indent=" " * (len(line) - len(line.lstrip())),
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def title(rows: Sequence[Row]) -> str:
    """Of a table of :func:`grouped` rows."""
    series = f", by {rows[0].series}" if rows[0].series else ""
    return f"{rows[0].subject}, {rows[0].dtype}{series}"


def uses(rows: Sequence[Row]) -> list[str]:
    """What the operation computes, for each of its uses."""
    return list(dict.fromkeys(row.use for row in rows if row.kind == "op"))


def cells(rows: Sequence[Row], report: Report) -> list[list[str]]:
    """A table, its heading first, of :func:`grouped` rows."""
    if rows[0].kind == "op":
        return _op_table(rows, report)
    if report.machine.get("device") == "gpu":
        return _by_contender(rows, report)
    return _model_table(rows, report.drift)


def legend(report: Report) -> list[str]:
    """What the columns mean."""
    lines = list(ROOF_LEGEND if report.roofs else COPY_LEGEND)
    if any(map(_has_memory, report.rows)):
        lines.append(MEMORY_LEGEND)
    if any(row.shortened for row in report.rows):
        lines.append(SHORTENED_LEGEND)
    return lines


def heading(report: Report) -> Iterable[str]:
    """Where, with what, when and by which command."""
    machine, versions = report.machine, report.versions
    if machine.get("device") == "gpu":
        gpu = machine["gpu"]
        yield (
            f"{gpu['name']}, compute capability {gpu['capability']},"
            f" driver {gpu['driver'] or 'unknown'}"
        )
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
    shared = report.cpu_share is not None and report.cpu_share < SHARED_CORES
    return [
        *heading(report),
        *roofs,
        *([drift] if report.yardstick else []),
        *([contention(report.cpu_share)] if shared else []),
    ]


def row_line(row: Row) -> str:
    """The fastest of ours in a row, in a few words."""
    timed = [result for result in row.ours() if result.median is not None]
    if not timed:
        return "failed"
    ours = min(timed, key=lambda result: result.median)
    line = f"{digits(ours.median * 1e3)} ms"
    if ours.ratio is not None:
        line += f", {_ratio(ours).split(' ')[0]} vs {BASELINES.get(row.best, row.best)}"
    return line + (", out of time" if row.shortened else "")


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
        lead = [f"{row.stage} {row.use.split(':')[0]}", _shape(row), _work(row)]
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
        work = _model_work(row)
        threads = f", {row.threads} threads" if row.threads else ""
        for result in row.ours():
            rate = "-" if result.problem else f"{row.shape[0] / result.median:.1f}"
            peaks = [_megabytes(each) for each in (row.result(row.best), result) if memory]
            times = _times(row, names, result, drift)
            shape = f"{_shape(row)}{threads}"
            table.append([work, shape, *times, *peaks, rate, _check(result)])
    return table


def _by_contender(rows: Sequence[Row], report: Report) -> list[list[str]]:
    """A line per contender, however many there are."""
    of_ops, memory = rows[0].kind == "op", any(map(_has_memory, rows))
    counted = any(result.launches is not None for row in rows for result in row.results)
    head = ["stage", "shape", "pass"] if of_ops else ["work", "images"]
    rates = ["GB/s", "of roof" if report.roofs else "of copy"] if of_ops else ["images/s"]
    extra = [*(["MB"] if memory else []), *(["launches"] if counted else [])]
    table = [[*head, "contender", "ms", "vs best", *rates, *extra, "check"]]
    for row in rows:
        lead = [f"{row.stage} {row.use.split(':')[0]}"] if of_ops else [_model_work(row)]
        threads = f", {row.threads} threads" if row.threads else ""
        lead += [f"{_shape(row)}{threads}", *([_work(row)] if of_ops else [])]
        for result in row.results:
            if result.role == "roof":
                continue
            is_best = result.role == "baseline" and result.name == row.best
            cells = [_label(result), time_of(result, is_best, report.drift), _ratio(result)]
            if of_ops:
                rate = row.bandwidth(result)
                cells += ["-" if rate is None else f"{rate / 1e9:.1f}"]
                cells += [_of_roof(row, result, report)]
            else:
                cells += [f"{row.shape[0] / result.median:.1f}" if result.median else "-"]
            cells += [_megabytes(result)] if memory else []
            cells += ["-" if result.launches is None else str(result.launches)] if counted else []
            table.append([*lead, *cells, _check(result)])
            lead = [""] * len(lead)
    return table


def _label(result: Result) -> str:
    """The contender's name, whether it is ours, and that it is a CUDA graph."""
    plain = result.name.removesuffix(GRAPH)
    graph = ", graph" if plain != result.name else ""
    if result.role == "ours":
        return f"ours, {plain}{graph}"
    return BASELINES.get(plain, plain) + graph


def _work(row: Row) -> str:
    """The pass, shortened, whether it is a CUDA graph, and whether its time ran out."""
    work = row.work.removesuffix(GRAPH)
    graph = " graph" if work != row.work else ""
    return f"{SHORT.get(work, work)}{graph}{SHORTENED if row.shortened else ''}"


def _model_work(row: Row) -> str:
    work = "backbone" if row.use == "backbone" else row.work
    return f"{work}{SHORTENED if row.shortened else ''}"


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
        return "no time" if result.problem == OUT_OF_TIME else "failed"
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
        return "-" if result.problem == OUT_OF_TIME else "FAILED"
    return "-" if result.error is None else f"{result.error:.2f}"


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

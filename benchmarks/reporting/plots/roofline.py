"""The roofline: FLOPs per second over FLOPs per byte, under what this machine reached."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from dsnet.bench.report import Report, Row
from dsnet.bench.roofs import COPY, COPY_IN_CACHE, PRODUCT

from ..records import best_of_ours
from .canvas import COLOURS, OURS, SOFT, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"forward": "o", "forward+backward": "^", "backward": "v"}


def pictures(report: Report) -> Iterator[Picture]:
    """One per dtype whose product the record has."""
    for dtype in dict.fromkeys(row.dtype for row in report.rows):
        rows = [row for row in report.rows if row.dtype == dtype and _is_shown(row)]
        if rows and report.roof(COPY) and report.roof(PRODUCT, dtype):
            yield Picture(
                name=f"roofline_{dtype}",
                caption=f"Roofline, {dtype}: ours filled, the best baseline hollow",
                size=(9.0, 5.0),
                draw=partial(_draw, report=report, rows=rows, dtype=dtype),
            )


def _is_shown(row: Row) -> bool:
    ours = best_of_ours(row)
    return row.kind == "op" and not row.series and bool(row.flops and row.bytes and ours)


def _draw(figure: "Figure", report: Report, rows: Sequence[Row], dtype: str) -> None:
    axes = figure.subplots()
    peak = report.roof(PRODUCT, dtype).rate / 1e9
    intensities = [row.flops / row.bytes for row in rows]
    left, right = min(intensities) / 2, max(intensities) * 2
    for name, style in ((COPY, "-"), (COPY_IN_CACHE, "--")):
        roof = report.roof(name)
        if roof is not None:
            _roof(axes, name, roof.rate / 1e9, peak, (left, right), style)
    subjects = list(dict.fromkeys(row.subject for row in rows))
    palette = dict(zip(subjects, (OURS, *COLOURS), strict=False))
    for row in rows:
        _point(axes, row, palette.get(row.subject, SOFT))
    for subject in subjects:
        axes.plot([], [], "o", color=palette.get(subject, SOFT), label=subject)
    for work in dict.fromkeys(row.work.partition(",")[0] for row in rows):
        axes.plot([], [], MARKERS.get(work, "s"), color=SOFT, label=work)
    axes.plot([], [], "o", markerfacecolor="white", color=SOFT, label="best baseline")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.minorticks_off()
    axes.set_yticks(_ticks(*axes.get_ylim()))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.text(right, peak * 1.03, "matrix product", ha="right", fontsize=7.5, color=SOFT)
    axes.set_xlabel("FLOPs per byte, by formula")
    axes.set_ylabel("GFLOP/s")
    figure.legend(loc="outside right upper")


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, … between both."""
    steps = (digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5))
    return [step for step in steps if low <= step <= high]


def _roof(
    axes: "Axes", name: str, copy: float, peak: float, limits: tuple[float, float], style: str
) -> None:
    left, right = limits
    corner = min(max(peak / copy, left), right)
    heights = [min(peak, copy * x) for x in (left, corner, right)]
    axes.plot([left, corner, right], heights, style, color="black", linewidth=1)
    axes.annotate(
        name,
        (left, copy * left),
        xytext=(4, 12),
        textcoords="offset points",
        fontsize=7.5,
        color=SOFT,
        annotation_clip=True,
    )


def _point(axes: "Axes", row: Row, colour: str) -> None:
    intensity = row.flops / row.bytes
    ours = row.flops / best_of_ours(row).median / 1e9
    marker = MARKERS.get(row.work.partition(",")[0], "s")
    best = row.result(row.best) if row.best else None
    if best is not None and best.median:
        height = row.flops / best.median / 1e9
        axes.plot([intensity] * 2, [height, ours], "-", color=colour, linewidth=0.6, alpha=0.6)
        axes.plot(intensity, height, marker, color=colour, markerfacecolor="white", markersize=4.5)
    axes.plot(intensity, ours, marker, color=colour, markersize=5.5)

"""Bars: images per second of every contender in every row of a network."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

from dsnet.bench.report import Report, Result, Row

from .canvas import OURS, SOFT, Picture, colour, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3


def pictures(report: Report) -> Iterator[Picture]:
    """One per network."""
    groups: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.kind == "model" and not row.series and any(r.median for r in row.results):
            groups.setdefault(row.subject, []).append(row)
    for name, rows in groups.items():
        bars = max(len(row.results) for row in rows)
        yield Picture(
            name=name,
            caption=f"{name}: images per second; whiskers are the quartiles",
            size=(9.0, ceil(len(rows) / COLUMNS) * (1.0 + 0.24 * bars)),
            draw=partial(_draw, rows=rows),
        )


def _draw(figure: "Figure", rows: Sequence[Row]) -> None:
    columns = min(COLUMNS, len(rows))
    panels = list(figure.subplots(ceil(len(rows) / columns), columns, squeeze=False).flat)
    for axes, row in zip(panels, rows, strict=False):
        _bars(axes, row)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)


def _bars(axes: "Axes", row: Row) -> None:
    timed = [result for result in row.results if result.median]
    for place, result in enumerate(reversed(timed)):
        rate, slowest, fastest = _rates(row, result)
        ours = result.role == "ours"
        axes.barh(
            place,
            rate,
            0.75,
            xerr=([rate - slowest], [fastest - rate]),
            color=OURS if ours else colour(result.name),
            ecolor=SOFT,
            error_kw={"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8},
        )
        ink = "white" if ours else "black"
        axes.text(rate * 0.03, place, f"{rate:.3g}", va="center", fontsize=7.5, color=ink)
    names = ["ours" if r.name == "auto" and r.role == "ours" else label(r.name) for r in timed]
    axes.set_yticks(range(len(timed)), names[::-1])
    batch, _, *size = row.shape
    work = "backbone" if row.use == "backbone" else row.work
    axes.set_title(f"{work}, {batch}×{size[0]}×{size[1]}, {row.dtype}", fontsize=8.5)
    axes.set_xlabel("images/s", fontsize=8)


def _rates(row: Row, result: Result) -> tuple[float, float, float]:
    first, third = result.quartiles
    batch = row.shape[0]
    return batch / result.median, batch / third, batch / first

"""Bars: how many times faster than the best baseline each operation is, with its interval."""

from collections.abc import Iterator, Sequence
from functools import partial
from math import nan
from typing import TYPE_CHECKING

from dsnet.bench.report import Report, Row

from ..records import best_of_ours
from .canvas import SOFT, STAGES, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pictures(report: Report) -> Iterator[Picture]:
    """One per dtype, batch and image size."""
    groups: dict[tuple, list[Row]] = {}
    for row in report.rows:
        if row.kind == "op" and not row.series:
            groups.setdefault((row.dtype, row.shape[0], row.image), []).append(row)
    for (dtype, batch, image), rows in groups.items():
        size = f"_{image[0]}x{image[1]}" if image else ""
        where = f" at {image[0]}×{image[1]}" if image else ""
        yield Picture(
            name=f"speedup_{dtype}_batch{batch}{size}",
            caption=f"Times faster than the best baseline, {dtype}, batch {batch}{where}",
            size=(9.0, 2.6 * len(_passes(rows))),
            draw=partial(_draw, rows=rows),
        )


def _passes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.work for row in rows))


def _draw(figure: "Figure", rows: Sequence[Row]) -> None:
    passes = _passes(rows)
    uses = list(dict.fromkeys((row.subject, row.use.partition(":")[0]) for row in rows))
    panels = figure.subplots(len(passes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, work in zip(panels, passes, strict=True):
        _bars(axes, [row for row in rows if row.work == work], uses)
        axes.set_title(work)
        axes.set_ylabel("times faster")
    names = [f"{subject}\n{use}" for subject, use in uses]
    panels[-1].set_xticks(range(len(uses)), names, fontsize=7.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))


def _bars(axes: "Axes", rows: Sequence[Row], uses: Sequence[tuple[str, str]]) -> None:
    stages = sorted({row.stage for row in rows})
    width = 0.8 / len(stages)
    for index, stage in enumerate(stages):
        places, heights, below, above = [], [], [], []
        for row in rows:
            ours = best_of_ours(row)
            if row.stage != stage or ours is None or ours.ratio is None:
                continue
            place = uses.index((row.subject, row.use.partition(":")[0]))
            # With too few rounds there is no interval, and no whisker.
            low, high = ours.ratio_interval or (nan, nan)
            places.append(place + (index - (len(stages) - 1) / 2) * width)
            heights.append(ours.ratio)
            below.append(ours.ratio - low)
            above.append(high - ours.ratio)
        axes.bar(
            places,
            heights,
            width * 0.92,
            yerr=(below, above),
            color=STAGES[(stage - 1) % len(STAGES)],
            ecolor=SOFT,
            error_kw={"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8},
            label=f"stage {stage}",
        )
    axes.axhline(1.0, color="black", linewidth=0.8)

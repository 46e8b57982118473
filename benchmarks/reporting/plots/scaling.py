"""Curves: along the batch, the number of threads, and the size of the image."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil, prod
from typing import TYPE_CHECKING

from dsnet.bench.cases import stages
from dsnet.bench.report import Report, Result, Row

from .canvas import OURS, SOFT, Picture, colour, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES_OF = "dsnet_tiny"
"""Whose first stage has the tokens that the guides count; the networks' stages are alike."""

Panel = tuple[str, Sequence[Row], Callable[["Axes", Sequence[Row]], None]]


def pictures(report: Report) -> Iterator[Picture]:
    """One, where the record has curves."""
    panels = list(_panels(report))
    if panels:
        yield Picture(
            name="scaling",
            caption="Scaling with batch, threads and image size",
            size=(9.0, 2.7 * ceil(len(panels) / 2)),
            draw=partial(_draw, panels=panels),
        )


def _panels(report: Report) -> Iterator[Panel]:
    by = {name: [r for r in report.rows if r.series == name] for name in ("batch", "threads")}
    for name, rows in by.items():
        if rows:
            yield f"{rows[0].subject}, by {name}", rows, partial(_rate, name=name)
    sized = [row for row in report.rows if row.series == "size"]
    for subject in dict.fromkeys(row.subject for row in sized):
        rows = [row for row in sized if row.subject == subject]
        what = f"{subject} backbone" if rows[0].kind == "model" else f"{subject}, first stage"
        yield f"{what}: time", rows, _time
        if any(result.peak_bytes for row in rows for result in row.results):
            yield f"{what}: peak memory", rows, _memory


def _draw(figure: "Figure", panels: Sequence[Panel]) -> None:
    grid = list(figure.subplots(ceil(len(panels) / 2), 2, squeeze=False).flat)
    for axes, (title, rows, fill) in zip(grid, panels, strict=False):
        fill(axes, rows)
        axes.set_title(title)
        axes.legend()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)


def _curves(
    axes: "Axes",
    rows: Sequence[Row],
    place: Callable[[Row], float],
    value: Callable[[Row, Result], float | None],
) -> None:
    """A curve per contender through the points that have a value."""
    names = dict.fromkeys((r.role, r.name) for row in rows for r in row.results)
    for role, name in names:
        if role == "roof":
            continue
        points = [
            (place(row), value(row, r))
            for row in rows
            for r in row.results
            if (r.role, r.name) == (role, name) and value(row, r) is not None
        ]
        ours = role == "ours"
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            "o-",
            color=OURS if ours else colour(name),
            label="ours" if ours else label(name),
            linewidth=2 if ours else 1.2,
            markersize=4,
        )


def _rate(axes: "Axes", rows: Sequence[Row], name: str) -> None:
    def place(row: Row) -> int:
        return row.shape[0] if name == "batch" else row.threads

    _curves(axes, rows, place, lambda row, r: row.shape[0] / r.median if r.median else None)
    if name == "batch":
        axes.set_xscale("log", base=2)
    ticks = sorted({place(row) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel({"batch": "images per call"}.get(name, name))
    axes.set_ylabel("images/s")


def _time(axes: "Axes", rows: Sequence[Row]) -> None:
    _curves(axes, rows, _pixels, lambda row, r: r.median * 1e3 if r.median else None)
    _sized(axes, rows, "ms")


def _memory(axes: "Axes", rows: Sequence[Row]) -> None:
    _curves(axes, rows, _pixels, lambda row, r: _megabytes(r))
    last = max(rows, key=_pixels)
    for text, style, tokens, ends in (
        ("N·M", ":", lambda n, m: n * m, [r for r in last.results if r.role == "baseline"]),
        ("N + M", "-.", lambda n, m: n + m, last.ours()),
    ):
        peaks = [peak for peak in map(_megabytes, ends) if peak]
        if peaks:
            _guide(axes, rows, max(peaks), f"as {text}", style, tokens)
    _sized(axes, rows, "MB")


def _guide(
    axes: "Axes",
    rows: Sequence[Row],
    end: float,
    text: str,
    style: str,
    tokens: Callable[[int, int], int],
) -> None:
    """Grows as ``tokens`` of (local, global) does, to the last point, over the larger half."""
    ordered = sorted(rows, key=_pixels)[len(rows) // 2 :]
    counts = [tokens(*_tokens(row)) for row in ordered]
    heights = [end * count / counts[-1] for count in counts]
    places = [_pixels(row) for row in ordered]
    axes.plot(places, heights, style, color=SOFT, linewidth=1, label=text)


def _megabytes(result: Result) -> float | None:
    """None also for what needs no memory, which a logarithm does not take."""
    return result.peak_bytes / 1e6 if result.peak_bytes and result.peak_bytes > 0 else None


def _tokens(row: Row) -> tuple[int, int]:
    first = stages(STAGES_OF, 1, row.image)[0]
    return prod(first.grid), prod(first.global_grid)


def _pixels(row: Row) -> float:
    return prod(row.image) / 1e6


def _sized(axes: "Axes", rows: Sequence[Row], unit: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    ordered = sorted(rows, key=_pixels)
    sizes = [f"{r.image[0]}×{r.image[1]}" for r in ordered]
    axes.set_xticks([_pixels(row) for row in ordered], sizes, fontsize=7)
    axes.minorticks_off()
    axes.set_ylabel(unit)

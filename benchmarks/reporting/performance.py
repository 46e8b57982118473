"""The blocks of ``docs/performance.md``: every figure in it comes from a record."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsnet.bench.cases import CASES
from dsnet.bench.report import Report, Result, Row
from dsnet.bench.roofs import COPY, COPY_IN_CACHE, PRODUCT, bound
from dsnet.bench.table import BASELINES, heading
from dsnet.variants import VARIANTS

from . import plots
from .markdown import table
from .records import best_of_ours

MODEL, BATCH, SIZE, DTYPE = "dsnet_tiny", 8, (224, 224), "float32"
"""The network whose time is divided among its operations."""

COMPOSED = {case.operation for case in CASES if len(case.operations) > 1}
"""Cases that are several operations in turn, which have their own rows."""


@dataclass(frozen=True)
class Sources:
    """The records, and where they lie.

    Args:
        results: operations and networks of ``dsnet bench``.
        peers: networks against other runtimes.
        scaling: curves; None where none has been taken.
        paths: of the three, by the names above.
    """

    results: Report
    peers: Report
    scaling: Report | None
    paths: Mapping[str, Path]


def machine(sources: Sources) -> str:
    """Where, with what and when the figures were taken."""
    lines = []
    for name in ("results", "peers", "scaling"):
        report = getattr(sources, name)
        path = sources.paths[name]
        if report is None:
            lines.append(f"- `{path.name}`: not taken yet")
        else:
            facts = "; ".join(heading(report))
            lines.append(f"- [`{path.name}`](../benchmarks/results/{path.name}): {facts}")
    return _text(lines)


def roofs(sources: Sources) -> str:
    """What the machine reaches."""
    if not sources.results.roofs:
        return _text(["The record has no roofs: it was taken before they were part of one."])
    names = {COPY: "copy in memory", COPY_IN_CACHE: "copy in cache", PRODUCT: "matrix product"}
    cells = [["roof", "dtype", "rate", "quartiles"]]
    for roof in sources.results.roofs:
        unit = "GFLOP/s" if roof.name == PRODUCT else "GB/s"
        slow, fast = (roof.work / seconds / 1e9 for seconds in roof.quartiles[::-1])
        spread = f"{slow:.1f} to {fast:.1f}"
        cells.append([names[roof.name], roof.dtype, f"{roof.rate / 1e9:.1f} {unit}", spread])
    return _text([*table(cells), *_figure(sources, "results", "roofline")])


def shares(sources: Sources) -> str:
    """The time of a network, divided among its operations as they are timed alone."""
    rows = sources.results.rows
    whole = next((r for r in rows if r.kind == "model" and _is_divided(r)), None)
    if whole is None:
        return _text([f"The record has no inference of {BATCH} images by {MODEL}."])
    ours, best = best_of_ours(whole), whole.result(whole.best) if whole.best else None
    cells = [["operation", "GFLOP", "best baseline ms", "ours ms", "saved ms", "of ours"]]
    left = {"best": best.median if best else 0.0, "ours": ours.median}
    for operation, members in _by_operation(rows).items():
        before = sum(_depth(row) * row.result(row.best).median for row in members)
        after = sum(_depth(row) * best_of_ours(row).median for row in members)
        flops = sum(_depth(row) * row.flops for row in members)
        left = {"best": left["best"] - before, "ours": left["ours"] - after}
        cells.append(_share(f"`{operation}`", f"{flops / 1e9:.2f}", before, after, ours))
    cells.append(_share("all else", "", left["best"], left["ours"], ours))
    cells.append(_share("the network", "", best.median if best else 0.0, ours.median, ours))
    return _text(table(cells))


def work(sources: Sources) -> str:
    """FLOPs, bytes and the fraction of the roof, row by row."""
    report = sources.results
    cells = [["operation", "stage", "pass", "MFLOP", "MB", "FLOP/byte", "bound by", "of roof"]]
    for row in _op_rows(report.rows):
        least, ours = bound(row, report), best_of_ours(row)
        by = [least.by, f"{least.seconds / ours.median:.0%}"] if least and ours else ["–", "–"]
        facts = [f"{row.flops / 1e6:.1f}", f"{row.bytes / 1e6:.2f}"]
        cells.append([*_name(row), *facts, f"{row.flops / row.bytes:.1f}", *by])
    return _text(table(cells))


def fusion(sources: Sources) -> str:
    """Times faster than the best baseline: an operation per line, the stages beside each other.

    Behind each what it would be on the roof.
    """
    rows = _op_rows(sources.results.rows, composed=True)
    stages = sorted({row.stage for row in rows})
    cells = [["operation", "pass", *(f"stage {stage}" for stage in stages)]]
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        operation, _, direction = _name(row)
        text = f"{_ratio(best_of_ours(row))}{_on_the_roof(row, sources.results)}"
        lines.setdefault((operation, direction), {})[row.stage] = text
    for key, ratios in lines.items():
        cells.append([*key, *(ratios.get(stage, "–") for stage in stages)])
    return _text([*table(cells), *_figure(sources, "results", "speedup")])


def losses(sources: Sources) -> str:
    """Every row where ours is not faster than the best baseline beyond doubt."""
    cells = [["what", "dtype", "best baseline", "its ms", "ours ms", "vs best"]]
    for report in filter(None, (sources.results, sources.peers, sources.scaling)):
        for row in report.rows:
            ours = best_of_ours(row)
            if ours is None or ours.ratio is None:
                continue
            low, _ = ours.ratio_interval or (0.0, 0.0)
            if low > 1:
                continue
            best = row.result(row.best)
            label, times = BASELINES.get(row.best, row.best), (best.median, ours.median)
            cells.append([_what(row), row.dtype, label, *map(_ms, times), _ratio(ours)])
    if len(cells) == 1:
        return _text(["No row."])
    return _text([*table(cells), "", "~: no difference at 95 % confidence, or too few rounds."])


def runtimes(sources: Sources) -> str:
    """Images per second of every contender."""
    rows = [row for row in sources.peers.rows if row.kind == "model"]
    names = [name for name in BASELINES if any(row.result(name) for row in rows)]
    cells = [["work", "images", "dtype", *(BASELINES[name] for name in names), "ours", "vs best"]]
    for row in rows:
        ours = best_of_ours(row)
        rates = [_rate(row, row.result(name)) for name in names]
        shape = "×".join(map(str, row.shape))
        cells.append([row.work, shape, row.dtype, *rates, _rate(row, ours), _ratio(ours)])
    notes = dict.fromkeys(note for row in rows for note in row.notes)
    lines = [*table(cells), "", *(f"- {note}" for note in notes)]
    return _text([*lines, *_figure(sources, "peers", "")])


def scaling(sources: Sources) -> str:
    """The curves as a table and a picture."""
    path = sources.paths["scaling"]
    if sources.scaling is None:
        command = f"python -m benchmarks scaling --json benchmarks/results/{path.name}"
        return _text([f"No record of it has been taken yet: `{command}`."])
    cells = [["curve", "what", "best baseline", "its ms", "ours ms", "its MB", "ours MB"]]
    for row in sources.scaling.rows:
        ours, best = best_of_ours(row), row.result(row.best) if row.best else None
        if ours is None or best is None:
            cells.append([row.series, _what(row), *(["failed"] * 5)])
            continue
        label = BASELINES.get(row.best, row.best)
        peaks = [f"{r.peak_bytes / 1e6:.0f}" if r.peak_bytes else "–" for r in (best, ours)]
        times = (best.median, ours.median)
        cells.append([row.series, _what(row), label, *map(_ms, times), *peaks])
    return _text([*table(cells), *_figure(sources, "scaling", "scaling")])


def reproduce(sources: Sources) -> str:
    """The commands of the records, and how long each took."""
    lines = ["```sh"]
    for name in ("results", "peers", "scaling"):
        report = getattr(sources, name)
        if report is not None:
            lines.append(f"{report.command}  # {report.seconds:.0f} s")
    return _text([*lines, "python -m benchmarks report", "```"])


BLOCKS: Mapping[str, Callable[[Sources], str]] = {
    "machine": machine,
    "roofs": roofs,
    "shares": shares,
    "work": work,
    "fusion": fusion,
    "losses": losses,
    "runtimes": runtimes,
    "scaling": scaling,
    "reproduce": reproduce,
}


def _is_divided(row: Row) -> bool:
    shape = (BATCH, 3, *SIZE)
    wanted = (MODEL, "inference", shape, DTYPE)
    found = (row.subject, row.work, row.shape, row.dtype)
    return found == wanted and not row.series and best_of_ours(row) is not None


def _op_rows(rows: Sequence[Row], composed: bool = False) -> list[Row]:
    """At one image size and batch, with or without what is composed of other rows."""
    return [
        row
        for row in rows
        if row.kind == "op"
        and not row.series
        and (row.shape[0], row.dtype) == (BATCH, DTYPE)
        and row.image in (None, SIZE)
        and (composed or row.subject not in COMPOSED)
        and best_of_ours(row) is not None
    ]


def _by_operation(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in _op_rows(rows):
        if row.work == "forward" and row.best:
            found.setdefault(row.subject, []).append(row)
    return found


def _depth(row: Row) -> int:
    """How many blocks of the network have this row's shape."""
    return VARIANTS[MODEL].depths[row.stage - 1]


def _share(name: str, flops: str, before: float, after: float, whole: Result) -> list[str]:
    times = [_ms(before), _ms(after), _ms(before - after)]
    return [name, flops, *times, f"{after / whole.median:.0%}"]


def _name(row: Row) -> list[str]:
    return [f"`{row.subject}` {row.use.partition(':')[0]}", str(row.stage), row.work]


def _what(row: Row) -> str:
    shape = "×".join(map(str, row.shape))
    threads = f", {row.threads} threads" if row.threads else ""
    if row.kind == "model":
        work = "backbone" if row.use == "backbone" else row.work
        return f"{row.subject} {work}, {shape}{threads}"
    operation, stage, direction = _name(row)
    return f"{operation}, stage {stage}, {direction}, {shape}{threads}"


def _ratio(result: Result | None) -> str:
    if result is None or result.ratio is None:
        return "–"
    low, high = result.ratio_interval or (0.0, float("inf"))
    return f"{'~' if low <= 1 <= high else ''}{result.ratio:.2f}×"


def _on_the_roof(row: Row, report: Report) -> str:
    """The best baseline's time over the row's least time."""
    least = bound(row, report)
    if least is None or row.best is None:
        return ""
    return f" of {row.result(row.best).median / least.seconds:.2f}×"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if abs(seconds) < 0.1 else f"{seconds * 1e3:.0f}"


def _rate(row: Row, result: Result | None) -> str:
    return f"{row.shape[0] / result.median:.1f}" if result and result.median else "–"


def _figure(sources: Sources, name: str, start: str) -> Iterator[str]:
    """Links to the record's pictures whose name starts so."""
    stem = sources.paths[name].stem
    for picture in plots.listed(getattr(sources, name)):
        if picture.name.startswith(start):
            path = f"../benchmarks/results/{stem}_{picture.name}.svg"
            yield from ("", f"![{picture.caption}]({path})")


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"

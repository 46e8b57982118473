"""A profile as aligned text of at most 120 columns."""

from collections.abc import Iterable

from ..remarks import by_backend
from ..table import aligned, digits, heading
from .report import Part, Profile, Side

SHORT = {
    "downsample": "down",
    "global_attention": "attention",
    "co_attention": "co-attn",
    "upsample_concat": "upsample",
    "pointwise_mlp": "mlp",
}
"""Of the columns of blocks."""

Row = tuple[str, Part, Part]
"""A name, and what stands for it before and after."""


def render(profile: Profile, blocks: bool = False) -> str:
    """The machine, a table of operations, one of blocks, and what they bound.

    Args:
        profile: the figures.
        blocks: every operation of every block with all its figures, too.
    """
    lines = [*heading(profile), "", *_subject(profile), "", *aligned(_operations(profile))]
    lines += ["", *_amdahl(profile), "", *aligned(_by_block(profile))]
    if blocks:
        lines += ["", *aligned([*_head(profile), *_figures(profile, _each(profile))])]
    return "\n".join([*lines, "", *_legend(profile)]) + "\n"


def _subject(profile: Profile) -> Iterable[str]:
    work = "forward, loss and backward" if profile.training else "inference"
    shape = "×".join(map(str, profile.shape))
    yield f"{profile.model}, {work}, {shape}, {profile.dtype}, on {profile.device}"
    for side in profile.sides():
        first, third = side.quartiles
        spread = (third - first) / 2 / side.seconds
        watched = side.watched_seconds / side.seconds - 1
        yield (
            f"{side.name}: {side.what}: {digits(side.seconds * 1e3)} ms ±{spread:.0%} in"
            f" {side.rounds} rounds; {watched:+.1%} while watched"
        )
        if side.name == "after":
            yield f"  auto runs {by_backend(side.chosen)}"
        if side.problem is not None:
            yield f"  FAILED: {side.problem}"


def _head(profile: Profile) -> list[list[str]]:
    times = ["ms", "share", "bound"] + ["bwd"] * profile.training
    gap = [""] * (len(times) - 1)
    unit = "kernels" if profile.launch_unit == "kernels" else "calls"
    return [
        ["", "before", *gap, "after", *gap, "ratio", "MB", "", "MMAC", "", "", unit, ""],
        ["", *times, *times, "", "before", "after", "paper", "before", "after", "before", "after"],
    ]


def _operations(profile: Profile) -> list[list[str]]:
    """Those with a kernel, the others, the whole."""
    names, fused = profile.operations(), profile.fused()
    totals = {name: tuple(side.total(name) for side in profile.sides()) for name in names}
    rows: list[Row] = [
        *((name, *totals[name]) for name in fused),
        ("with a kernel", *(side.fused() for side in profile.sides())),
        *((name, *totals[name]) for name in names if name not in fused),
    ]
    rows.append(("whole", *(side.sum(side.parts) for side in profile.sides())))
    return [*_head(profile), *_figures(profile, rows)]


def _each(profile: Profile) -> Iterable[Row]:
    """Every part, in the order of the network."""
    sides = [
        {(part.stage, part.block, part.operation): part for part in side.parts}
        for side in profile.sides()
    ]
    places = list(sides[0])
    for place in sides[1]:
        if place not in places:
            # Behind the others of its block.
            last = max((i for i, each in enumerate(places) if each[:2] == place[:2]), default=-1)
            places.insert(last + 1, place)
    for place in places:
        stage, block, operation = place
        where = f"{stage}.{block} " if block else f"{stage} " if stage else ""
        absent = Part(operation, stage, block)
        yield (where + operation, *(parts.get(place, absent) for parts in sides))


def _figures(profile: Profile, rows: Iterable[Row]) -> Iterable[list[str]]:
    for name, *parts in rows:
        before, after = parts
        cells = [name]
        for side, part in zip(profile.sides(), parts, strict=True):
            cells += _times(side, part, profile.training)
        cells.append(_ratio(profile, before, after))
        cells += ["-" if _absent(part) else digits(part.bytes / 1e6) for part in parts]
        cells += [_millions(n) for n in (before.published_macs, before.macs, after.macs)]
        cells += ["-" if _absent(part) else str(part.launches) for part in parts]
        yield cells


def _times(side: Side, part: Part, training: bool) -> list[str]:
    if _absent(part):
        return ["-"] * (4 if training else 3)
    share = part.seconds / side.seconds
    bound = side.bound(part.seconds)
    cells = [digits(part.seconds * 1e3), percent(share)]
    cells.append("-" if share > 0.999 else f"{bound:.2f}×")
    if training:
        cells.append(f"{part.backward_seconds / part.seconds:.0%}" if part.seconds else "-")
    return cells


def percent(share: float) -> str:
    """In whole numbers, but 100 for the whole alone."""
    return f"{share:.1%}" if 0.995 <= share < 0.9995 else f"{share:.0%}"


def _absent(part: Part) -> bool:
    """Whether a side does not have this part, or has it inside of another."""
    return part == Part(part.operation, *part.place)


def _ratio(profile: Profile, before: Part, after: Part) -> str:
    """Of times that count; of the whole, as the rounds in pairs have it."""
    if profile.failed() or not before.seconds or not after.seconds:
        return "-"
    whole = not before.operation
    return f"{profile.ratio if whole else before.seconds / after.seconds:.2f}×"


def _millions(number: int) -> str:
    return "-" if number == 0 else digits(number / 1e6)


def _amdahl(profile: Profile) -> Iterable[str]:
    before, after = profile.sides()
    bounds = {side.name: side.bound(side.fused().seconds) for side in (before, after)}
    yield (
        f"Operations with a kernel take {percent(before.fused_share())} of before: without them"
        f" it would be {bounds['before']:.2f}× as fast."
    )
    if profile.failed():
        yield "After failed its check, so that it is not compared."
        return
    interval = ""
    if profile.ratio_interval is not None:
        low, high = profile.ratio_interval
        interval = f" ({low:.2f} to {high:.2f} at 95 % confidence)"
    yield f"It is {profile.ratio:.2f}× as fast{interval}."
    yield (
        f"They take {percent(after.fused_share())} of after, which without them would be"
        f" {bounds['after']:.2f}× as fast."
    )


def _by_block(profile: Profile) -> list[list[str]]:
    """ms before → after of the steps of each block."""
    steps = profile.block_operations()
    rows = [["block", "", *(SHORT.get(name, name) for name in steps), "all, ms"]]
    for place in profile.blocks():
        sides = [
            {part.operation: part.seconds for part in side.parts if part.place == place}
            for side in profile.sides()
        ]
        cells = [_arrow(parts.get(name) for parts in sides) for name in steps]
        whole = _arrow(sum(parts.values()) for parts in sides)
        rows.append(["{}.{}".format(*place), "", *cells, whole])
    return rows


def _arrow(seconds: Iterable[float | None]) -> str:
    before, after = ("-" if each is None else digits(each * 1e3) for each in seconds)
    return "-" if before == after == "-" else f"{before}→{after}"


def _legend(profile: Profile) -> Iterable[str]:
    yield "position and local are depthwise_conv3x3, split is the 1×1 convolution of both streams."
    if profile.whole_blocks():
        yield "After runs a block as one operator, which times its steps itself; split has the"
        yield "downsample in it. The call is counted in other, with what is outside of the steps:"
        yield "dispatch and allocation. MB of the steps is by formula, as if each were an operator."
    yield "ms: share of the median call without instrumentation. share: by the medians of watched"
    yield "calls, all in turn; other belongs to no step. bound: how many times as fast without this"
    yield "part (Amdahl). ratio: before over after. MB: what the operators read and write, as if no"
    yield "cache kept any. MMAC: the paper's equations, and as computed before and after, without"
    if profile.training:
        yield "norms, activations and interpolations; in the backward two products for each of the"
        yield "forward. bwd: share of the part's time that is backward."
    else:
        yield "norms, activations and interpolations."
    if profile.launch_unit == "kernels":
        yield "kernels: that the GPU ran, outside of CUDA graphs; after is timed with them."
    else:
        yield "calls: of operators that write, as the dispatcher sees them; one of ours is one."

"""A profile as a picture: stacked bars before and after, of the whole and of each block.

What has a kernel in this profile stands first and in colour, the rest in grey: the grey of before
is what no kernel can shorten.
"""

import io
from types import ModuleType
from typing import Any

from dsnet.export import require

from ..report import write_atomically
from ..table import digits
from .report import Part, Profile, Side
from .table import percent

COLOURS = {
    "pointwise_mlp": "#3b6fb6",
    "co_attention": "#d1682c",
    "upsample_concat": "#3f9b6c",
    "global_attention": "#a463a8",
    "position": "#c9a227",
    "local": "#7fb3d5",
    "split": "#b5495b",
    "downsample": "#e3a5ad",
    "patch_embedding": "#6b5b95",
}
"""Of what has a kernel, in the order of stacking."""

GREYS = {
    "split": "#57606a",
    "downsample": "#7d8590",
    "patch_embedding": "#9aa1a9",
    "head": "#b8bec5",
    "other": "#d6dade",
}
"""Of what has none, stacked on top."""

INK, SOFT = "#1f2328", "#57606a"
SIZE = (9.0, 7.0)
"""In inches; at a README's width one is about a hundred pixels."""
LEFT = 0.08
"""Of the axes, and of what stands above and below them."""

IN_A_LINE = 6
"""Operations in a line of the legend."""

LABELLED = 0.04
"""The least share of a bar's length that is labelled."""

PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1}
"""Behind a text, where lines of the grid would cross it."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "svg.fonttype": "path",
    "svg.hashsalt": "dsnet profile",
}


def matplotlib() -> ModuleType:
    """The module.

    Raises:
        ImportError: where there is none, with what to install.
    """
    require(["matplotlib"], "plots", "--plot")
    import matplotlib

    return matplotlib


def draw(profile: Profile, kind: str) -> bytes:
    """The picture as ``"svg"`` or ``"png"``: the same bytes for the same profile."""
    with matplotlib().rc_context(STYLE):
        # Without pyplot, whose figures belong to the process and want a screen.
        from matplotlib.figure import Figure

        figure = Figure(figsize=SIZE, facecolor="white")
        grid = figure.add_gridspec(
            2, 1, height_ratios=(1.0, 2.1), left=LEFT, right=0.985, top=0.835, bottom=0.172,
            hspace=0.45,
        )  # fmt: skip
        _title(figure, profile)
        _whole(figure.add_subplot(grid[0]), profile)
        _blocks(figure.add_subplot(grid[1]), profile)
        _legend(figure, profile)
        out = io.BytesIO()
        metadata = {"Title": _subject(profile)}
        # No date and no version.
        metadata |= {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=150, metadata=metadata)
    return out.getvalue()


def write(profile: Profile, path: str) -> None:
    """Draws into ``path``, which ends in ``.svg`` or ``.png``."""
    write_atomically(path, draw(profile, path.lower().rpartition(".")[2]))


def _subject(profile: Profile) -> str:
    work = "forward, loss and backward" if profile.training else "inference"
    shape = "×".join(map(str, profile.shape))
    return f"{profile.model}, {work} of {shape} in {profile.dtype}"


def _title(figure: Any, profile: Profile) -> None:
    machine, before, after = profile.machine, profile.before, profile.after
    where = machine["cpu"]
    if profile.device == "cpu":
        where += f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    else:
        where = f"{profile.device} beside {where}"
    figure.text(LEFT, 0.957, _subject(profile), size=13, weight="bold")
    figure.text(LEFT, 0.931, where, size=8.5, color=SOFT)
    figure.text(LEFT, 0.908, f"before: {before.what}; after: {after.what}", size=8.5, color=SOFT)


def _colours(profile: Profile) -> dict[str, str]:
    """Of the operations that occur, in the order of stacking."""
    names, fused = profile.operations(), profile.fused()
    with_kernel = {name: colour for name, colour in COLOURS.items() if name in fused}
    return with_kernel | {
        name: colour for name, colour in GREYS.items() if name in names and name not in fused
    }


def _whole(axes: Any, profile: Profile) -> None:
    """Two bars of the whole call, with the share that has a kernel bracketed."""
    longest = max(side.seconds for side in profile.sides()) * 1e3
    for height, side in ((1, profile.before), (0, profile.after)):
        left = 0.0
        for name, colour in _colours(profile).items():
            width = side.total(name).seconds * 1e3
            axes.barh(height, width, left=left, height=0.5, color=colour, edgecolor="white")
            if width > LABELLED * longest:
                share = width / side.seconds / 1e3
                axes.text(
                    left + width / 2, height, f"{share:.0%}", ha="center", va="center",
                    size=8.5, color=INK if name in ("head", "other") else "white",
                )  # fmt: skip
            left += width
        _bracket(axes, side, height + 0.31)
        text = f" {digits(left)} ms"
        if side is profile.after and profile.ratio is not None:
            text += f", {profile.ratio:.2f}× as fast"
        axes.text(left, height, text, va="center", weight="bold", bbox=PAPER)
    axes.set_yticks((1, 0), ("before", "after"), color=INK)
    axes.set_ylim(-0.4, 1.75)
    axes.set_xlim(0, 1.1 * longest)
    axes.set_xlabel("milliseconds of a call")
    axes.set_title("Whole network", loc="left", size=11, weight="bold", pad=4)
    _clean(axes, "x")


def _bracket(axes: Any, side: Side, height: float) -> None:
    width = side.fused().seconds * 1e3
    bound = side.bound(side.fused().seconds)
    axes.plot((0, 0, width, width), (height, height + 0.08, height + 0.08, height), color=INK, lw=1)
    share = percent(side.fused_share())
    text = f"with a kernel: {share}; if it took no time, {digits(bound)}× as fast"
    axes.text(width / 2, height + 0.12, text, ha="center", va="bottom", size=9, bbox=PAPER)


def _blocks(axes: Any, profile: Profile) -> None:
    """A pair of bars for each block."""
    places = profile.blocks()
    colours = _colours(profile)
    names = [name for name in colours if name in profile.block_operations()]
    tops = []
    for offset, side in ((-0.2, profile.before), (0.2, profile.after)):
        parts: dict[tuple, Part] = {(*part.place, part.operation): part for part in side.parts}
        for x, place in enumerate(places):
            bottom = 0.0
            for name in names:
                part = parts.get((*place, name))
                height = 0.0 if part is None else part.seconds * 1e3
                axes.bar(
                    x + offset, height, bottom=bottom, width=0.36, color=colours[name],
                    edgecolor="white", linewidth=0.5,
                )  # fmt: skip
                bottom += height
            tops.append(bottom)
            if len(places) <= 10:
                axes.text(x + offset, bottom, digits(bottom), ha="center", va="bottom", size=8)
    labels = ["{}.{}".format(*place) for place in places]
    many = len(places) > 20
    axes.set_xticks(range(len(places)), labels, color=INK, rotation=90 if many else 0)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.set_ylim(0, 1.08 * max(tops))
    note = ", whose split has the downsample in it" if profile.whole_blocks() else ""
    axes.set_xlabel(f"stage.block; left bar before, right bar after{note}")
    axes.set_ylabel("milliseconds of a call")
    axes.set_title("Blocks", loc="left", size=11, weight="bold", pad=6)
    _clean(axes, "y")


def _clean(axes: Any, direction: str) -> None:
    for side in ("top", "right", *(("left",) if direction == "x" else ())):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(axis=direction, color="#d8dee4", linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(figure: Any, profile: Profile) -> None:
    from matplotlib.patches import Patch

    colours, fused = _colours(profile), profile.fused()
    groups = {
        "with a kernel": [name for name in colours if name in fused],
        "without": [name for name in colours if name not in fused],
    }
    lines = [
        (title if first == 0 else "", names[first : first + IN_A_LINE])
        for title, names in groups.items()
        for first in range(0, len(names), IN_A_LINE)
    ]
    for i, (title, names) in enumerate(reversed(lines)):
        height = 0.02 + 0.03 * i
        figure.text(0.012, height, title, size=8.5, weight="bold", va="center")
        figure.legend(
            handles=[Patch(color=colours[name], label=name) for name in names],
            loc="center left", bbox_to_anchor=(0.128, height), ncols=len(names), frameon=False,
            fontsize=8.5, handlelength=1.0, handleheight=1.0, handletextpad=0.5,
            columnspacing=1.2, borderpad=0, borderaxespad=0,
        )  # fmt: skip

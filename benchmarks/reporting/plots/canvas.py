"""What all pictures share: colours, type, and files that depend on the data alone."""

import io
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsnet.bench.table import BASELINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "#0072b2"
# Distinct to the colour-blind; ours has the first of them for itself.
COLOURS = ("#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f7f7f", "#8c6d00")
STAGES = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")
SOFT = "#57606a"

STYLE = {
    "svg.hashsalt": "dsnet",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Picture:
    """One picture to draw.

    Args:
        name: of its file, behind that of the record.
        caption: what it shows, in a sentence.
        size: in inches.
        draw: fills a figure.
    """

    name: str
    caption: str
    size: tuple[float, float]
    draw: Callable[["Figure"], None]

    def files(self, source: str) -> dict[str, bytes]:
        """``svg`` and ``png``; the SVG names its ``source`` and the matplotlib that drew it."""
        import matplotlib

        described = {
            "Title": self.caption,
            "Source": source,
            "Creator": f"matplotlib {matplotlib.__version__}",
        }
        with _figure(self.size) as figure:
            self.draw(figure)
            svg = _saved(figure, "svg", described | {"Date": None})
            png = _saved(figure, "png", {"Title": self.caption, "Software": None})
        # Lines must not end in blanks.
        lines = svg.decode("utf-8").split("\n")
        return {"svg": "\n".join(line.rstrip() for line in lines).encode("utf-8"), "png": png}


def colour(contender: str) -> str:
    """Of a baseline; the same in every picture."""
    names = list(BASELINES)
    return COLOURS[names.index(contender) % len(COLOURS)] if contender in names else SOFT


def label(contender: str) -> str:
    return BASELINES.get(contender, contender)


@contextmanager
def _figure(size: tuple[float, float]):
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield Figure(figsize=size, layout="constrained")


def _saved(figure: "Figure", kind: str, metadata: dict[str, str | None]) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=metadata, facecolor="white")
    return file.getvalue()

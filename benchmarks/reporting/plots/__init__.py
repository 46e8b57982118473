"""The pictures of a record, as SVG and PNG; the same record gives the same SVG."""

from dsnet.bench.report import Report

from . import networks, roofline, scaling, speedup
from .canvas import Picture

KINDS = (speedup, networks, roofline, scaling)


def listed(report: Report) -> list[Picture]:
    """What there is to draw in ``report``; only drawing takes matplotlib."""
    return [picture for kind in KINDS for picture in kind.pictures(report)]

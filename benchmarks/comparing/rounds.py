"""From a job to a row with both sides in it, and from rows to a verdict."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsnet.bench.report import Row
from dsnet.bench.row import Contender, run_row
from dsnet.bench.timing import MAX_ROUNDS, measure

from .jobs import Job
from .sides import Side

OTHER, HERE = "other", "here"

ROUNDS = (20, MAX_ROUNDS)
"""Fewest and most: the sign test's interval of 20 ratios leaves out five at either end."""

MARGIN = 0.05
"""A slow-down or speed-up below it is none: where memory lies differs from process to process."""


@dataclass(frozen=True)
class _Remote:
    """A call in a worker, which counts its own repeats."""

    side: Side

    def __call__(self) -> None:
        self.side.time(1)


def _remote_sample(call: _Remote, repeats: int) -> float:
    return call.side.time(repeats)


timer: Callable[..., dict] = partial(measure, sample=_remote_sample, rounds=ROUNDS)


def compare(job: Job, other: Side, here: Side, folder: Path, budget: float) -> Row:
    """One row, the other commit as its baseline; both check out against float64 or do not count."""
    told, judge = job.prepare()
    torch.save(told, folder / "job")
    contenders = [
        _contender(OTHER, "baseline", other, folder),
        _contender(HERE, "ours", here, folder),
    ]
    return run_row(contenders, judge, budget=budget, timer=timer, **job.facts)


def _contender(name: str, role: str, side: Side, folder: Path) -> Contender:
    chosen: dict[str, str] = {}

    def values() -> dict[str, Any]:
        target = folder / f"values_{name}"
        chosen.update(side.load(folder / "job", target))
        return torch.load(target)

    return Contender(name, role, _Remote(side), values, chosen=chosen)


def verdict(row: Row, margin: float = MARGIN) -> str:
    """``slower``, ``faster``, ``same`` or, where one side has no time, ``not compared``.

    A difference is one where the whole confidence interval of the ratio lies beyond the margin.
    """
    (ours,) = row.ours()
    if ours.ratio is None:
        return "not compared"
    low, high = ours.ratio_interval or (0.0, float("inf"))
    if high < 1 / (1 + margin):
        return "slower"
    return "faster" if low > 1 + margin else "same"


def confirmed(
    first: Sequence[Row], again: Callable[[Sequence[int]], Sequence[Row]], margin: float = MARGIN
) -> list[Row]:
    """``first``, but rows that seem slower are those of a second measurement.

    One slow row of many may be chance, or the luck of one process; of two it is not.
    """
    suspects = [index for index, row in enumerate(first) if verdict(row, margin) == "slower"]
    found = list(first)
    for index, row in zip(suspects, again(suspects) if suspects else (), strict=True):
        found[index] = row
    return found

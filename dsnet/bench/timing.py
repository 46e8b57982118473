"""The one timer: contenders take turns, so that drift of the machine meets all of them alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

Sample = Callable[[Callable[[], object], int], float]
"""Runs a call so many times and returns the seconds of one."""

MIN_SAMPLE = 5e-3
"""Seconds a sample lasts at least: far above the clock's step and a scheduler's hiccup."""

MIN_ROUNDS = 6
"""However short the budget: as many as a 95 % interval of a median takes."""

MAX_ROUNDS = 200


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender, an entry per round, each the mean of ``repeats`` calls."""

    seconds: tuple[float, ...]
    repeats: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the median over rounds, and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1, that is no difference."""
        return not self.low <= 1.0 <= self.high


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget: float,
    min_sample: float = MIN_SAMPLE,
    rounds: tuple[int, int] | None = None,
    until: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
    sample: Sample | None = None,
) -> dict[str, Timing]:
    """Times ``calls`` in turn, round after round, until ``budget`` seconds are over.

    Every call runs once beforehand, unmeasured, and then until its time is known well enough to
    choose the repeats per sample.

    Args:
        calls: what to time, by name.
        budget: seconds for all rounds together.
        min_sample: seconds that one sample lasts at least.
        rounds: the fewest and the most, by default :data:`MIN_ROUNDS` and :data:`MAX_ROUNDS`; the
            fewest hold whatever the budget.
        until: the clock's time after which no further round starts; one round is always taken. If
            it is over already, the round is one call of each.
        clock: returns seconds.
        sample: measures otherwise than by ``clock``, which then rules the budget alone.

    Raises:
        ValueError: for rounds that are not 1 ≤ fewest ≤ most.
    """
    fewest, most = rounds or (MIN_ROUNDS, MAX_ROUNDS)
    if not 1 <= fewest <= most:
        raise ValueError(f"rounds: expected 1 <= fewest <= most, got {rounds}")
    sample = sample or partial(_sample, clock=clock)
    if clock() >= until:
        # One call each: the calls for finding the repeats would take as long as the round.
        return {name: Timing((sample(call, 1),), 1) for name, call in calls.items()}
    repeats = {name: _calibrate(call, min_sample, sample) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = clock()
    for index in range(most):
        if index >= fewest and clock() - start >= budget:
            break
        if index >= 1 and clock() >= until:
            break
        for name in turn(list(calls), index):
            samples[name].append(sample(calls[name], repeats[name]))
    return {name: Timing(tuple(samples[name]), repeats[name]) for name in calls}


def turn(names: Sequence[str], index: int) -> list[str]:
    """The order within round ``index``: no contender always comes first or after the same one."""
    shift = index // 2 % max(1, len(names))
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if index % 2 else order


def compare(baseline: Timing, contender: Timing, confidence: float = 0.95) -> Ratio:
    """baseline / contender, paired by round.

    The interval runs between order statistics of the per-round ratios (that of the sign test), so
    it assumes nothing about their distribution; with too few rounds it is (0, ∞).
    """
    ratios = sorted(
        slow / fast for slow, fast in zip(baseline.seconds, contender.seconds, strict=True)
    )
    count = len(ratios)
    tail, skip = 0.0, 0
    for k in range(count // 2):
        tail += math.comb(count, k) / 2**count
        if 2 * tail > 1 - confidence:
            break
        skip = k + 1
    low, high = (ratios[skip - 1], ratios[count - skip]) if skip else (0.0, math.inf)
    return Ratio(statistics.median(ratios), low, high)


def _sample(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _calibrate(call: Callable[[], object], min_sample: float, sample: Sample) -> int:
    """Repeats that last ``min_sample``, found by doubling after one call to warm up."""
    repeats = 1
    if sample(call, 1) >= 20 * min_sample:
        return repeats
    while (seconds := sample(call, repeats) * repeats) < min_sample / 2:
        repeats *= 2
    return max(1, math.ceil(repeats * min_sample / seconds))

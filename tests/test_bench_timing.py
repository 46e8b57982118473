"""The timer of ``dsnet bench`` on a clock of its own, so that nothing depends on the machine."""

import math
import random

import pytest

from dsnet.bench import timing


class Machine:
    """A clock that calls advance, each by its cost, times noise, times a drift with time."""

    def __init__(self, seed=0, noise=0.0, drift=0.0):
        self.random = random.Random(seed)
        self.noise, self.drift, self.now = noise, drift, 0.0
        self.log = []

    def clock(self):
        return self.now

    def call(self, name, cost):
        def work():
            self.log.append(name)
            noise = math.exp(self.random.gauss(0, self.noise))
            self.now += cost * noise * (1 + self.drift * self.now)

        return work

    def compare(self, slow, fast, rounds=30):
        calls = {"slow": self.call("slow", slow), "fast": self.call("fast", fast)}
        timings = timing.measure(
            calls, budget=0, rounds=(rounds, rounds), min_sample=1e-9, clock=self.clock
        )
        return timing.compare(timings["slow"], timings["fast"])


SEEDS = range(200)


def test_planted_slow_down_is_always_detected_and_its_interval_covers_it():
    ratios = [Machine(seed, noise=0.1).compare(1.3, 1.0) for seed in SEEDS]
    assert all(ratio.differs and ratio.low > 1 for ratio in ratios)
    covered = sum(ratio.low <= 1.3 <= ratio.high for ratio in ratios)
    assert covered >= 0.9 * len(SEEDS)


def test_noise_alone_is_no_difference_at_the_stated_confidence():
    alarms = sum(Machine(seed, noise=0.1).compare(1.0, 1.0).differs for seed in SEEDS)
    assert alarms <= 0.08 * len(SEEDS)


def test_drift_cancels_because_contenders_take_turns():
    ratio = Machine(drift=0.01).compare(1.3, 1.0, rounds=40)
    assert ratio.value == pytest.approx(1.3, rel=0.03)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rounds_hold_every_contender_once_and_each_comes_first_equally_often(count):
    names = [str(i) for i in range(count)]
    orders = [timing.turn(names, index) for index in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    firsts = [order[0] for order in orders]
    assert {firsts.count(name) for name in names} == {2}


def test_samples_are_interleaved():
    machine = Machine()
    calls = {name: machine.call(name, 1.0) for name in "abc"}
    timing.measure(calls, budget=0, rounds=(4, 4), min_sample=1e-9, clock=machine.clock)
    measured = machine.log[-12:]
    expected = [name for index in range(4) for name in timing.turn(list("abc"), index)]
    assert measured == expected


@pytest.mark.parametrize("cost", [1e-6, 3e-4, 2e-3, 0.5])
def test_a_sample_lasts_at_least_the_minimum_and_not_much_longer(cost):
    machine = Machine()
    call = machine.call("a", cost)
    result = timing.measure(
        {"a": call}, budget=0, min_sample=5e-3, rounds=(1, 1), clock=machine.clock
    )
    length = result["a"].repeats * cost
    assert 5e-3 * 0.999 <= length <= max(2 * 5e-3, cost)
    assert result["a"].median == pytest.approx(cost)


def test_budget_bounds_the_rounds_between_fewest_and_most():
    def rounds(budget):
        machine = Machine()
        calls = {"a": machine.call("a", 0.1), "b": machine.call("b", 0.1)}
        timings = timing.measure(calls, budget=budget, rounds=(3, 50), clock=machine.clock)
        return len(timings["a"].seconds)

    assert [rounds(0), rounds(2.0), rounds(1e9)] == [3, 10, 50]


def test_rounds_out_of_order_are_refused():
    with pytest.raises(ValueError, match="rounds: expected"):
        timing.measure({}, budget=1, rounds=(3, 2))


def test_quartiles_and_median_of_known_samples():
    known = timing.Timing((5.0, 1.0, 2.0, 4.0, 3.0), repeats=1)
    assert known.median == 3.0
    assert known.quartiles == (2.0, 4.0)


@pytest.mark.parametrize(("count", "low", "high"), [(5, 0, math.inf), (6, 1, 6), (9, 2, 8)])
def test_interval_runs_between_order_statistics_of_the_sign_test(count, low, high):
    baseline = timing.Timing(tuple(range(1, count + 1)), 1)
    ratio = timing.compare(baseline, timing.Timing((1.0,) * count, 1))
    assert (ratio.low, ratio.high) == (low, high)

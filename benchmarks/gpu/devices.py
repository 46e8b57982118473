"""Where the rows of a phase run, and calls so short that many share a graph."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch

from dsnet.bench.device import Device, find, stand_in
from dsnet.bench.timing import Timing

from .program import Context

CALLS = 50
"""In one graph: events resolve half a microsecond, and the fastest calls take a few."""

SHORTEST = 1e-9
"""Seconds: no call takes less, whatever noise is left after the subtraction."""


def device_of(context: Context) -> Device:
    """The GPU; in a dry run the CPU, without a time that counts."""
    return stand_in() if context.dry_run else find("cuda")


def many_calls(device: Device) -> Device:
    """The device with :data:`CALLS` calls in every graph, and the time of one of them.

    The time of a graph with one element to fill is subtracted. The calls read the same inputs, so
    that small inputs stay in the L2 cache.
    """
    one = torch.zeros(1, device=device.name)

    def capture(call: Callable[[], object], calls: int = CALLS) -> Callable[[], object]:
        return device.capture(call, calls)

    def timer(
        calls: Mapping[tuple[str, str], Callable[[], object]],
        *,
        budget: float,
        until: float = math.inf,
    ) -> dict[tuple[str, str], Timing]:
        empty = ("empty", "graph")
        # The contenders are graphs by now; the copy that is timed with them is none.
        graphs = {key: capture(call) if key[0] == "roof" else call for key, call in calls.items()}
        graphs[empty] = device.capture(lambda: one.fill_(0))
        timings = device.timer(graphs, budget=budget, until=until)
        launch = timings.pop(empty).median
        return {
            key: Timing(
                tuple(max((each - launch) / CALLS, SHORTEST) for each in found.seconds),
                found.repeats * CALLS,
            )
            for key, found in timings.items()
        }

    return dataclasses.replace(device, capture=capture, cold_timer=timer)

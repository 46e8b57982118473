"""Seconds of each step of a call: stamps where a step ends, differences afterwards."""

import time
from collections import defaultdict
from typing import Any

import torch

from .steps import Step, Watch


class HostClock:
    """Of work that is done when its call returns."""

    def stamp(self) -> float:
        return time.perf_counter()

    def settle(self) -> None:
        """Nothing to wait for."""

    def seconds(self, first: float, second: float) -> float:
        return second - first


class DeviceClock:
    """Of work that a GPU does later, in the order of its current stream."""

    def stamp(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, first: Any, second: Any) -> float:
        return first.elapsed_time(second) / 1e3


class Times(Watch):
    """Seconds by (step, phase) of every call watched; looking for nodes of the graph is left out.

    Args:
        clock: :class:`HostClock`, or :class:`DeviceClock` for networks on a GPU.
    """

    def __init__(self, clock: HostClock | DeviceClock) -> None:
        super().__init__()
        self.clock = clock
        self.calls: list[dict[tuple[Step, str], float]] = []
        self._pieces: list[tuple[tuple[Step, str], Any, Any]] = []

    def open(self) -> None:
        self._since = self.clock.stamp()

    def close(self, step: Step, phase: str) -> None:
        self._pieces.append(((step, phase), self._since, self.clock.stamp()))

    def stop(self) -> None:
        super().stop()
        self.clock.settle()
        spent: dict[tuple[Step, str], float] = defaultdict(float)
        for key, first, second in self._pieces:
            spent[key] += self.clock.seconds(first, second)
        self.calls.append(dict(spent))
        self._pieces.clear()

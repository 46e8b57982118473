"""The devices of a benchmark: the CPU, a GPU, or the CPU as a stand-in for a GPU."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from dsnet.devices import resolve

from . import cuda, memory
from .timing import Timing, measure

Timer = Callable[..., dict[Any, Timing]]
"""``timer(calls, budget=seconds, until=None)``, as :func:`.timing.measure`."""

JUDGED_IMAGES = 8
"""Images of a GPU's batch that are checked; the whole batch is timed."""

WARM_ROUNDS = (6, 40)
"""Rounds of a network on a GPU; the fewest give a 95 % interval of a median."""

COLD_ROUNDS = (10, 40)
"""Rounds of an operation on a GPU."""

MIN_SAMPLE = 2e-4
"""Seconds that a sample on a GPU lasts at least: events resolve half a microsecond."""


@dataclass(frozen=True)
class Device:
    """A device, and how calls are measured on it.

    Args:
        name: where tensors live, ``cpu`` or ``cuda``.
        gpu: whether the rows are a GPU's: large batches, CUDA graphs, few images checked.
        timer: times networks, calls one after another.
        cold_timer: times operations; on a GPU with inputs outside the caches.
        capture: makes a CUDA graph of a call and returns its replay.
        count_launches: number of kernels that a call runs; None where it is not counted.
        peak_memory: bytes that a call adds at most; None where it cannot be told.
        properties: of the GPU: name, capability, driver and others.
        versions: of the GPU's libraries.
    """

    name: str = "cpu"
    gpu: bool = False
    timer: Timer = measure
    cold_timer: Timer = measure
    capture: Callable[..., Callable[[], object]] = cuda.captured
    count_launches: Callable[[Callable[[], object]], int | None] = lambda call: None
    peak_memory: Callable[[Callable[[], object]], int | None] = memory.peak_memory
    properties: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None

    def judged(self, batch: int) -> torch.Tensor | None:
        """Indices of the images that are checked, the first and the last among them.

        None stands for all images.
        """
        if not self.gpu or batch <= JUDGED_IMAGES:
            return None
        return torch.linspace(0, batch - 1, JUDGED_IMAGES, device=self.name).long()

    def generator(self, seed: int) -> torch.Generator:
        """A seeded generator that draws on this device."""
        return torch.Generator(self.name).manual_seed(seed)


CPU = Device()


def find(name: str) -> Device:
    """Returns the device ``auto``, ``cpu`` or ``cuda``; ``auto`` is the GPU where there is one.

    Raises:
        ValueError: for ``cuda`` where torch sees no GPU.
    """
    name = resolve(name)
    return CPU if name == "cpu" else gpu()


@cache
def gpu() -> Device:
    """The current GPU."""
    return Device(
        name="cuda",
        gpu=True,
        timer=partial(
            measure, sample=cuda.warm_sample(), min_sample=MIN_SAMPLE, rounds=WARM_ROUNDS
        ),
        cold_timer=partial(
            measure, sample=cuda.cold_sample(), min_sample=MIN_SAMPLE, rounds=COLD_ROUNDS
        ),
        capture=cuda.captured,
        count_launches=cuda.count_launches,
        peak_memory=cuda.peak_memory,
        properties=cuda.properties(),
        versions=cuda.versions(),
    )


def stand_in(timer: Timer | None = None) -> Device:
    """The CPU on a GPU's path: no graphs, no launches, and times that say nothing.

    Args:
        timer: replaces the quick one of three rounds.
    """
    timer = timer or partial(measure, min_sample=0.0, rounds=(3, 3))
    return Device(
        name="cpu",
        gpu=True,
        timer=timer,
        cold_timer=timer,
        capture=lambda call, calls=1: call,
        peak_memory=lambda call: None,
        properties={"name": "stand-in on the CPU", "capability": "0.0", "driver": None},
        versions={},
    )

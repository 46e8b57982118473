"""What bounds a call: bytes over a copy's rate, FLOPs over a matrix product's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .device import CPU, Device
from .report import Report, Roof, Row

COPY = "copy"
COPY_IN_CACHE = "copy in cache"
PRODUCT = "product"

COPY_BYTES = 128 << 20
"""Read, and as many written: several times a cache of the last level."""

CACHE_BYTES = 256 << 10
"""The same within the caches of the cores that share the work."""

MATRIX = 1024
"""Rows and columns of the matrices multiplied."""

GPU_COPY_BYTES = 2 << 30
GPU_MATRIX = 8192
"""The same on a GPU, large enough to fill it."""

BUDGET = 1.0
"""Seconds of timing for all roofs together."""

YARDSTICK_ROUNDS = 5
"""Few enough to be no time beside a row, enough that one hiccup does not count."""


@dataclass(frozen=True)
class Bound:
    """The least time of a row's work on the measured roofs, and which of them it is."""

    seconds: float
    by: str


def copy(size: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], Tensor]:
    """Reads ``size`` bytes and writes as many."""
    source = torch.randn(size // dtype.itemsize, device=device, dtype=dtype)
    return partial(torch.empty_like(source).copy_, source)


def product(size: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], Tensor]:
    """Multiplies square matrices of random numbers: of zeros it draws less power and is faster."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return partial(torch.mm, a, b)


def measure_roofs(
    dtypes: Sequence[torch.dtype],
    timer: Callable[..., Mapping] | None = None,
    budget: float | None = None,
    device: Device = CPU,
) -> tuple[Roof, ...]:
    """The copies in float32, whose bytes are as good as any, and a product in each dtype."""
    on_gpu = device.name != "cpu"
    size, matrix = (GPU_COPY_BYTES, GPU_MATRIX) if on_gpu else (COPY_BYTES, MATRIX)
    calls: dict[tuple[str, torch.dtype], Callable[[], object]] = {
        (COPY, torch.float32): copy(size, torch.float32, device.name)
    }
    if not on_gpu:
        calls[COPY_IN_CACHE, torch.float32] = copy(CACHE_BYTES, torch.float32)
    for dtype in dict.fromkeys(dtypes):
        calls[PRODUCT, dtype] = product(matrix, dtype, device.name)
    work = {COPY: 2 * size, COPY_IN_CACHE: 2 * CACHE_BYTES, PRODUCT: 2 * matrix**3}
    timer = timer or device.timer
    with torch.inference_mode():
        timings = timer(calls, budget=BUDGET if budget is None else budget)
    return tuple(
        Roof(name, _short(dtype), work[name], timing.median, timing.quartiles)
        for (name, dtype), timing in timings.items()
    )


def yardstick(device: Device = CPU) -> Callable[[], float]:
    """Times a product of float32 matrices, the same in each call: the median of a few."""
    call = product(MATRIX, torch.float32, device.name)
    call()

    def seconds() -> float:
        with torch.inference_mode():
            timings = device.timer({PRODUCT: call}, budget=0, rounds=(YARDSTICK_ROUNDS,) * 2)
        return timings[PRODUCT].median

    return seconds


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def bound(row: Row, report: Report) -> Bound | None:
    """max(bytes / copy rate, FLOPs / product rate) of a row, None without both rates.

    The copy is that of the row, of its own size and thus from the same cache.
    """
    bandwidth, peak = row.copy_bandwidth(), report.roof(PRODUCT, row.dtype)
    if bandwidth is None or peak is None or row.bytes is None or row.flops is None:
        return None
    return max(
        Bound(row.bytes / bandwidth, "memory"),
        Bound(row.flops / peak.rate, "arithmetic"),
        key=lambda each: each.seconds,
    )

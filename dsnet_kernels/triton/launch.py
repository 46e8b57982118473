"""Launches of Triton kernels: what a call is compiled for and how many programs it has."""

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.runtime import driver

from . import INTERPRETED

MULTIPROCESSORS = 132
"""Of an H100 or H200; programs are counted by it and not by the GPU that is there."""

_tables: list[Any] = []


def cached(function: Callable) -> Callable:
    """Keeps what a table of tiles has answered: it depends on a shape and a dtype alone."""
    table = functools.lru_cache(maxsize=4096)(function)
    _tables.append(table)
    return table


def forget_tables() -> None:
    """Lets :func:`cached` functions answer again, for instance because their limits changed."""
    for table in _tables:
        table.cache_clear()


class _Collector(threading.local):
    """Takes a thread's launches in place of the GPU; None lets them run."""

    take: Callable[["Launch", tuple[Any, ...]], None] | None = None


collector = _Collector()


@functools.lru_cache
def _limits_registers(active: Any) -> bool:
    return active.get_current_target().backend == "cuda"


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs of it, and what it is compiled for; from shape and dtype alone.

    Sums therefore have an order that does not depend on the GPU. ``sizes`` are arguments by name
    that do not make another variant.
    """

    kernel: Any
    programs: int
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most; None is the assembler's choice
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler for an NVIDIA GPU."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    @functools.cached_property
    def _everywhere(self) -> dict[str, Any]:
        """Keywords of the kernel without the limit of registers, which other GPUs do not take."""
        options = {name: value for name, value in self.options.items() if name != "maxnreg"}
        return {"grid": (self.programs,), **self.sizes, **self.constants, **options}

    @functools.cached_property
    def _on_nvidia(self) -> dict[str, Any]:
        return {**self._everywhere, **self.options}

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of the kernel on the GPU that Triton sees."""
        if self.registers is None or INTERPRETED or not _limits_registers(driver.active):
            return self._everywhere
        return self._on_nvidia

    def __call__(self, *args: Any) -> None:
        if collector.take is not None:
            collector.take(self, args)
        else:
            self.kernel.run(*args, warmup=False, **self.keywords)


def block(size: int, limit: int = 2**31) -> int:
    """A power of two that holds ``size``, 16 … ``limit``: the least that ``tl.dot`` takes is 16."""
    return min(max(16, triton.next_power_of_2(size)), limit)


def in_packs(**sizes: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes in units of PACK elements, and PACK: what divides them all, 8, 4, 2 or 1.

    It tells the compiler how many elements a vector may have without a variant for every size.
    """
    pack = math.gcd(8, *sizes.values())
    return {name: size // pack for name, size in sizes.items()}, {"PACK": pack}

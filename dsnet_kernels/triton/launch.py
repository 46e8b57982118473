"""Launches of Triton kernels: what a call is compiled for and how many programs it has."""

from dataclasses import dataclass
from typing import Any

import triton

MULTIPROCESSORS = 132
"""Of an H100 or H200; programs are counted by it and not by the GPU that is there."""


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs of it, and what it is compiled for; from shape and dtype alone.

    Sums therefore have an order that does not depend on the GPU.
    """

    kernel: Any
    programs: int
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most; None is the assembler's choice

    @property
    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}
        return options if self.registers is None else options | {"maxnreg": self.registers}

    def __call__(self, *args: Any) -> None:
        self.kernel[(self.programs,)](*args, **self.constants, **self.options)


def block(size: int, limit: int = 2**31) -> int:
    """A power of two that holds ``size``, 16 … ``limit``: the least that ``tl.dot`` takes is 16."""
    return min(max(16, triton.next_power_of_2(size)), limit)

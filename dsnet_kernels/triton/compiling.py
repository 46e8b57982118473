"""Compilation of all kernels of a model at once."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, collector


@dataclass(frozen=True)
class _Pointer:
    """What Triton looks at of a tensor when it chooses a variant."""

    dtype: torch.dtype
    address: int  # modulo 16

    def data_ptr(self) -> int:
        return self.address


def _stand_in(value: Any) -> Any:
    return _Pointer(value.dtype, value.data_ptr() % 16) if isinstance(value, Tensor) else value


def _kind(value: Any) -> Any:
    """Equal for arguments that make the same variant."""
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value.bit_length() < 32, value == 1, value % 16 == 0
    return "float" if isinstance(value, float) else value


@dataclass(frozen=True)
class _Variant:
    """A call that is compiled and not run."""

    kernel: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    device: torch.device

    @property
    def key(self) -> tuple[Any, ...]:
        constants = {k: v for k, v in self.keywords.items() if k != "grid"}
        sizes = tuple(_kind(value) for value in self.args)
        return id(self.kernel), self.device, sizes, tuple(sorted(constants.items(), key=str))

    def compile(self) -> None:
        with torch.cuda.device(self.device if self.device.type == "cuda" else None):
            self.kernel.warmup(*self.args, **self.keywords)


def _collect(function: Callable[[], object]) -> list[_Variant]:
    """What ``function()`` launches, which is not run."""
    found: dict[tuple[Any, ...], _Variant] = {}

    def take(launch: Launch, args: tuple[Any, ...]) -> None:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        # An alternative to the tensors themselves, which would stay in memory.
        stand_ins = tuple(_stand_in(arg) for arg in args)
        variant = _Variant(launch.kernel, stand_ins, launch.keywords, device)
        found.setdefault(variant.key, variant)

    before, collector.take = collector.take, take
    try:
        # In this thread: launches of a backward that ran in another would not be collected.
        with torch.autograd.set_multithreading_enabled(False):
            function()
    finally:
        collector.take = before
    return list(found.values())


def compile_in_parallel(function: Callable[[], object], threads: int | None = None) -> int:
    variants = _collect(function)
    with ThreadPoolExecutor(threads or min(32, os.cpu_count() or 1)) as pool:
        # The list raises what a compilation raised.
        list(pool.map(_Variant.compile, variants))
    return len(variants)

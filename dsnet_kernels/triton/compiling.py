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
    """The properties of a tensor by which Triton chooses a variant."""

    dtype: torch.dtype
    address: int  # 0 for a multiple of 16, which is all that variants depend on

    def data_ptr(self) -> int:
        return self.address


def _stand_in(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Pointer(value.dtype, min(value.data_ptr() % 16, 1))


def _kind(value: Any) -> Any:
    """Equal for arguments that make the same variant: kernels specialise on no number."""
    if isinstance(value, int):
        return "int", value.bit_length() < 32
    return "float" if isinstance(value, float) else value


@dataclass(frozen=True)
class _Variant:
    """A call that is compiled and not run."""

    kernel: Any
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    device: int  # as of Tensor.get_device: -1 is none

    def compile(self) -> None:
        with torch.cuda.device(self.device):
            self.kernel.warmup(*self.args, **self.keywords)


def _collect(function: Callable[[], object]) -> list[_Variant]:
    """The launches of ``function()``, none of which runs."""
    found: dict[tuple[Any, ...], _Variant] = {}

    def take(launch: Launch, args: tuple[Any, ...]) -> None:
        device = next(arg.get_device() for arg in args if isinstance(arg, Tensor))
        # An alternative to the tensors themselves, which would stay in memory.
        stand_ins = tuple(_stand_in(arg) for arg in args)
        kinds = (*map(_kind, stand_ins), *map(_kind, launch.sizes.values()))
        constants = tuple((launch.constants | launch.options).items())
        key = id(launch.kernel), device, kinds, constants
        if key not in found:
            found[key] = _Variant(launch.kernel, stand_ins, launch.keywords, device)

    before, collector.take = collector.take, take
    try:
        # In this thread: launches of a backward that ran in another would not be collected.
        with torch.autograd.set_multithreading_enabled(False):
            function()
    finally:
        collector.take = before
    return list(found.values())


def compile_in_parallel(function: Callable[[], object], threads: int | None = None) -> int:
    """See :func:`dsnet_kernels.triton.compile_in_parallel`."""
    variants = _collect(function)
    first = {(id(each.kernel), each.device): each for each in variants}
    chosen = {id(each) for each in first.values()}
    others = [each for each in variants if id(each) not in chosen]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        # One variant of each kernel before the others: the first compilation makes its cache,
        # and Triton would lose one of two caches made at once. The lists raise errors.
        list(pool.map(_Variant.compile, first.values()))
        list(pool.map(_Variant.compile, others))
    return len(variants)

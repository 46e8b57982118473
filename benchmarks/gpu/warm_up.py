"""Counts the Triton variants that a function needs, and compiles them in a process pool."""

import importlib.util
import multiprocessing
import os
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch

MOST_PROCESSES = 16


def variants(function: Callable[[], None]) -> int | None:
    """The number of variants that ``function`` needs in a fresh process; None without Triton.

    ``function`` runs on CPU tensors; its kernels are counted and launched nowhere.
    """
    if importlib.util.find_spec("triton") is None:
        print("Triton variants are not counted: triton is not installed", flush=True)
        return None
    from ..compile_gates.triton_driver import compilations

    return sum(compilations(function).values())


def warm_up(function: Callable[[], None]) -> None:
    """Fills Triton's cache as :func:`fill_cache` does, and prints the result.

    A failure is printed and costs time alone: the kernels then compile one after the other.
    """
    try:
        print(f"Triton variants compiled: {fill_cache(function)}", flush=True)
    except Exception:
        traceback.print_exc()
        print("Triton's cache is not filled: kernels compile one after the other", flush=True)


def fill_cache(
    function: Callable[[], None],
    capability: tuple[int, int] | None = None,
    processes: int | None = None,
) -> int:
    """Compiles every variant that ``function`` needs into Triton's cache on disk, in parallel.

    Args:
        function: of a module, since the processes import it; it runs in each of them on CPU
            tensors, and each compiles its share.
        capability: of the GPU; by default that of the current one.
        processes: by default one per core.

    Returns:
        The number of variants; 0 without Triton.
    """
    if importlib.util.find_spec("triton") is None:
        return 0
    if capability is None:
        capability = torch.cuda.get_device_capability()
    count = processes or min(MOST_PROCESSES, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context) as pool:
        shares = [
            pool.submit(_compile_share, function, capability, rank, count) for rank in range(count)
        ]
        return sum(share.result() for share in shares)


def _compile_share(
    function: Callable[[], None], capability: tuple[int, int], rank: int, count: int
) -> int:
    """Compiles each variant whose place in the order is ``rank`` modulo ``count``."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    import dsnet_kernels

    from ..compile_gates.triton_driver import counting

    torch.set_num_threads(1)
    major, minor = capability
    compile_ = JITFunction._do_compile
    done = 0
    with counting(GPUTarget("cuda", 10 * major + minor, 32)) as found:
        count_only = JITFunction._do_compile

        def shared(self: JITFunction, key: str, signature: Any, device: Any, *others: Any) -> Any:
            nonlocal done
            place = len(found.variants)
            kernel = count_only(self, key, signature, device, *others)
            if place % count == rank:
                compile_(self, key, signature, device, *others)
                # The compiled kernel cannot be launched here.
                self.device_caches[device][0][key] = kernel
                done += 1
            return kernel

        with (
            mock.patch.object(JITFunction, "_do_compile", shared),
            dsnet_kernels.backend(["triton", "reference"]),
        ):
            function()
    return done

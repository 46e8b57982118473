"""Kernels in Triton, one file per operation; nothing here imports Triton before the first use."""

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from .. import native

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on the CPU, in place of a GPU in tests."""

REFUSAL = None if importlib.util.find_spec("triton") else "triton is not installed"
"""Why there is no Triton, or None."""

devices = ("cpu", "cuda") if INTERPRETED else ("cuda",)
"""Types of device whose tensors the kernels take."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _compiler_refusal() -> str | None:
    """Why Triton cannot build what loads and launches its kernels, which is written in C."""
    if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang"))):
        return None
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    if hasattr(nvidia, "make_launcher"):  # Up to Triton 3.6 each kernel has a launcher of its own.
        return "triton finds no C compiler: it looks for gcc and clang on PATH, and for CC"
    return None


@functools.cache
def _import_refusal() -> str | None:
    # A broken installation must not break the other backends.
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        return f"triton does not import: {_first_line(error)}"
    if INTERPRETED or not torch.cuda.is_available():
        return None
    try:
        # Built at the first use, and read from Triton's cache afterwards.
        importlib.import_module("triton.runtime").driver.active  # noqa: B018
        return _compiler_refusal()
    except Exception as error:
        return f"triton does not find or build its driver: {_first_line(error)}"


@native.constant_when_traced
def import_refusal() -> str | None:
    """Why Triton does not import, or on a machine with a GPU not build its driver, or None.

    Imports it and makes the driver.
    """
    return _import_refusal()


def forget_refusal() -> None:
    """Asks Triton again at the next call, for instance because its driver is another one."""
    _import_refusal.cache_clear()


def can_run(x: Tensor, name: str = "x") -> str | None:
    """Why the kernels do not take the argument ``name``, or None."""
    if x.device.type not in devices:
        if INTERPRETED:
            return f"{name} is on {x.device}; Triton's interpreter takes it on the CPU or a GPU"
        return f"{name} is on {x.device}, not on a GPU"
    if x.dtype not in _DTYPES:
        return f"{name} is {x.dtype}; the kernel computes in float32, bfloat16 and float16"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return f"{name} is torch.bfloat16, which Triton's interpreter computes wrongly"
    on_gpu = x.device.type == "cuda" and not INTERPRETED
    reason = native.gpu_refusal(x.get_device()) if on_gpu else None
    return import_refusal() if reason is None else reason


def loses(*tensors: Tensor, **options: object) -> str | None:
    """Why ``"auto"`` passes over kernels that could run, or None."""
    if torch.version.hip is not None:
        return "no Triton kernel of ours has been tested on an AMD GPU; name the backend to try it"
    return None


def compile_in_parallel(function: Callable[[], object], threads: int | None = None) -> int:
    """Compiles all Triton kernels that ``function()`` launches, many at a time.

    ``function`` runs once and launches none of them, so that its results have no meaning; torch's
    own kernels run. Afterwards the same calls in this process find their kernels compiled, and
    those of other processes find them in Triton's cache.

    Args:
        function: for instance a network's forward, with a backward or without.
        threads: how many compile at a time; None is one for each of the machine's cores.

    Returns:
        How many variants were compiled or read from Triton's cache; 0 without Triton.

    Raises:
        Exception: what a compilation raised.
    """
    if REFUSAL is not None or INTERPRETED or import_refusal() is not None:
        return 0
    compiling = importlib.import_module(".compiling", __name__)
    return compiling.compile_in_parallel(function, threads)


def implement(
    operation: str,
    keys: tuple[str, ...] = ("CPU", "CUDA") if INTERPRETED else ("CUDA",),
    library: torch.library.Library = native.LIBRARY,
) -> None:
    """Gives ``<operation>_triton`` and its backward the kernels of ``triton/<operation>.py``.

    The file is imported at the first call. ``keys`` are the dispatch keys that take the kernels.
    """

    @functools.cache
    def kernels():
        return importlib.import_module(f".{operation}", __name__)

    for key in keys:
        name = f"{operation}_triton"
        library.impl(name, lambda *args: kernels().forward(*args), key)
        library.impl(f"{name}_backward", lambda *args: kernels().backward(*args), key)

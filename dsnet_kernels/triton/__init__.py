"""Kernels in Triton, one file per operation; nothing here imports Triton before the first use."""

import functools
import importlib
import importlib.util
import os

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


@functools.cache
def _import_refusal() -> str | None:
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # A broken installation must not break the other backends.
        return f"triton does not import: {str(error).splitlines()[0] or type(error).__name__}"
    return None


@native.constant_when_traced
def import_refusal() -> str | None:
    """Why Triton does not import, or None; imports it."""
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


def implement(
    operation: str,
    keys: tuple[str, ...] = ("CPU", "CUDA") if INTERPRETED else ("CUDA",),
    library: torch.library.Library = native.LIBRARY,
) -> None:
    """Gives ``<operation>_triton`` and its backward the kernels of ``triton/<operation>.py``.

    The file is imported at the first call. ``keys`` are the dispatch keys that take the kernels.
    """

    def kernels():
        return importlib.import_module(f".{operation}", __name__)

    for key in keys:
        name = f"{operation}_triton"
        library.impl(name, lambda *args: kernels().forward(*args), key)
        library.impl(f"{name}_backward", lambda *args: kernels().backward(*args), key)

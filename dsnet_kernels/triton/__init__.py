"""Kernels in Triton, one file per operation; nothing here imports Triton before the first use."""

import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's interpreter runs the kernels on the CPU, in place of a GPU in tests."""

REFUSAL = None if importlib.util.find_spec("triton") else "triton is not installed"
"""Why there is no Triton, or None."""

MINIMUM_CAPABILITY = (8, 0)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    if not INTERPRETED:
        if device.type != "cuda":
            return f"x is on {device}, not on a GPU"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return f"x is on {device} and torch sees no NVIDIA GPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            found, needed = (".".join(map(str, v)) for v in (capability, MINIMUM_CAPABILITY))
            return f"x is on {device} of compute capability {found}; Triton kernels need {needed}"
    elif device.type not in ("cpu", "cuda"):
        return f"x is on {device}; Triton's interpreter takes it on the CPU or a GPU"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # A broken installation must not break the other backends.
        return f"triton does not import: {str(error).splitlines()[0] or type(error).__name__}"
    return None


def device_refusal(device: torch.device) -> str | None:
    """Why no Triton kernel runs on ``device``, or None."""
    return _device_refusal(device)


# Dynamo calls it while tracing, as torch.compiler.assume_constant_result has it do; that decorator
# would import all of torch._dynamo here.
device_refusal._dynamo_marked_constant = True


def can_run(x: Tensor) -> str | None:
    """Why the kernels do not take ``x``, or None."""
    reason = device_refusal(x.device)
    if reason is None and x.dtype not in _DTYPES:
        reason = f"x is {x.dtype}; the kernel computes in float32, bfloat16 and float16"
    if reason is None and INTERPRETED and x.dtype == torch.bfloat16:
        reason = "x is torch.bfloat16, which Triton's interpreter computes wrongly"
    return reason

"""What is installed, built and loaded, for people and for bug reports."""

import math
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from . import devices, native, triton
from .backends import BACKENDS, OPERATIONS, Operation, current_backend, select
from .version import __version__


def info() -> dict[str, Any]:
    """Versions, what was built with what, what is loaded or why not, and each op × backend.

    Returns:
        A dictionary that ``json.dumps`` takes: ``versions``, ``machine``, ``build`` (None where
        nothing native was built), ``libraries`` and ``operations``, in which None means usable and
        a text is the reason against, ``backend`` (the names in force), ``auto`` (what it picks, by
        device, dtype and operation).
    """
    introspection, absent = native.introspection()
    versions = {"dsnet-kernels": __version__, "torch": torch.__version__}
    if triton.REFUSAL is None:
        versions["triton"] = _triton_version()
    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if devices.gpus():
        machine["gpus"] = [_gpu(index) for index in devices.gpus()]
    if introspection is not None:
        usable = native.CPU.refusal is None
        machine["cpu_capability"] = introspection.cpu_capability() if usable else None
        machine["cpu_capabilities"] = introspection.cpu_capabilities()
    return {
        "versions": versions,
        "machine": machine,
        "build": native.build_record(),
        "libraries": {"cpu": native.CPU.refusal, "cuda": native.CUDA.refusal, "_C": absent},
        "operations": {
            name: {
                backend: op.presence(backend) or devices.refusal(backend) for backend in BACKENDS
            }
            for name, op in OPERATIONS.items()
        },
        "backend": list(current_backend()),
        "auto": _auto(),
    }


def _gpu(index: int) -> str:
    major, minor = native.gpu_capability(index)
    return f"{torch.cuda.get_device_name(index)} with compute capability {major}.{minor}"


def _triton_version() -> str:
    """Of whichever distribution has it; they differ by platform."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "unknown"


NARROW, WIDE = 64, 320
"""Channels of the first and of the third stage of a tiny network, the shapes of ``auto``."""


@dataclass(frozen=True)
class _Shape:
    """What selection looks at of a tensor, so that a GPU need not hold one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False

    def get_device(self) -> int:
        return self.device.index or 0

    def numel(self) -> int:
        return math.prod(self.shape)


def _operands(op: Operation, channels: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Shapes of an operation's leading tensors in a block of so many channels, and options."""
    side, half = (56 if channels == NARROW else 14), channels // 2
    tokens, heads = (1, 49, half), max(half // 32, 1)
    if op.name == "global_attention":
        return {"x": tokens}, {"num_heads": heads}
    shapes: dict[str, tuple[int, ...]] = {
        "x": (1, channels, side, side),
        "fc1_weight": (4 * channels, channels),
        "local": (1, half, side, side),
        "global_": tokens if op.name == "co_attention" else (1, half, 7, 7),
    }
    return shapes, {"num_heads": heads} if op.name == "co_attention" else {}


def _choice(op: Operation, dtype: torch.dtype, device: torch.device) -> str:
    found = []
    for channels in (NARROW, WIDE):
        shapes, options = _operands(op, channels)
        tensors = [_Shape(shapes[name], dtype, device) for name in op.tensors]
        found.append(select(op, "auto", *tensors, **options))
    return found[0] if found[0] == found[1] else f"{found[0]}; {found[1]} at {WIDE} channels"


def _auto() -> dict[str, dict[str, dict[str, str]]]:
    """What ``"auto"`` picks for inference, by device, dtype and operation."""
    places = [torch.device("cpu"), *(torch.device("cuda", index) for index in devices.gpus())]
    return {
        str(place): {
            str(dtype).removeprefix("torch."): {
                op.name: _choice(op, dtype, place) for op in OPERATIONS.values() if op.tensors
            }
            for dtype in (torch.bfloat16, torch.float32)
        }
        for place in places
    }


def render(facts: dict[str, Any]) -> str:
    """:func:`info` as text."""
    lines = []
    for section in ("versions", "machine", "build"):
        lines.append(section)
        values = facts[section] or {"nothing native": "the reference path alone is installed"}
        lines += [f"  {key:<18} {_plain(value)}" for key, value in values.items()]
    lines.append("libraries")
    lines += [
        f"  {name:<18} {'loaded' if reason is None else f'not loaded: {reason}'}"
        for name, reason in facts["libraries"].items()
    ]
    lines.append(f"operations (backend in force: {', '.join(facts['backend'])})")
    for name, states in facts["operations"].items():
        lines.append(f"  {name}")
        lines += [
            f"    {backend:<16} {'usable' if reason is None else reason}"
            for backend, reason in states.items()
        ]
    lines.append("what auto picks for inference")
    for device, dtypes in facts["auto"].items():
        for dtype, choices in dtypes.items():
            lines.append(f"  {device}, {dtype}")
            lines += [f"    {name:<18} {choice}" for name, choice in choices.items()]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    # Further lines of a text, such as the errors of a failed build, stand below its first.
    return "none" if value is None else str(value).strip().replace("\n", "\n" + 21 * " ")

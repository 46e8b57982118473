"""What is installed, built and loaded, for people and for bug reports."""

import os
import platform
from typing import Any

import torch

from . import native
from .backends import BACKENDS, OPERATIONS, current_backend
from .version import __version__


def info() -> dict[str, Any]:
    """Versions, what was built with what, what is loaded or why not, and each op × backend.

    Returns:
        A dictionary that ``json.dumps`` takes: ``versions``, ``machine``, ``build`` (None where
        nothing native was built), ``libraries`` and ``operations``, in which None means usable and
        a text is the reason against, ``backend`` (the names in force).
    """
    introspection, absent = native.introspection()
    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if introspection is not None:
        usable = native.CPU.refusal is None
        machine["cpu_capability"] = introspection.cpu_capability() if usable else None
        machine["cpu_capabilities"] = introspection.cpu_capabilities()
    return {
        "versions": {"dsnet-kernels": __version__, "torch": torch.__version__},
        "machine": machine,
        "build": native.build_record(),
        "libraries": {"cpu": native.CPU.refusal, "cuda": native.CUDA.refusal, "_C": absent},
        "operations": {
            name: {backend: op.presence(backend) for backend in BACKENDS}
            for name, op in OPERATIONS.items()
        },
        "backend": list(current_backend()),
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
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)

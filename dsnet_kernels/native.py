"""The native libraries: the operator namespace, loading, and why a library is not there."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

LIBRARY = torch.library.Library("dsnet_kernels", "DEF")
"""The operator namespace: schemas are defined here, natively implemented or not."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class NativeLibrary:
    """One shared library of kernels: where it is, and why it is not loaded (None if it is)."""

    name: str
    path: Path
    refusal: str | None


def _load(name: str) -> NativeLibrary:
    path = _FOLDER / f"libdsnet_kernels_{name}.so"
    if not path.exists():
        return NativeLibrary(name, path, f"{path.name} was not built into this installation")
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # The reason is kept and shown; nothing else may depend on it.
        return NativeLibrary(name, path, f"{path.name} does not load: {_first_line(error)}")
    return NativeLibrary(name, path, None)


def _load_cuda() -> NativeLibrary:
    path = _FOLDER / "libdsnet_kernels_cuda.so"
    if path.exists() and torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
        return NativeLibrary("cuda", path, reason)
    return _load("cuda")


def _load_cpu() -> NativeLibrary:
    library = _load("cpu")
    module, _ = introspection()
    if library.refusal is None and module is not None:
        try:
            module.cpu_capability()
        except ValueError as error:
            # An import must not fail for a mistyped variable, nor may it pass in silence.
            warnings.warn(f"{error}; the cpu backend is off", RuntimeWarning)
            return NativeLibrary(library.name, library.path, str(error))
    return library


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def introspection() -> tuple[ModuleType | None, str | None]:
    """The pybind11 module (capability of this CPU, build configuration), or why it is absent."""
    try:
        from . import _C
    except ImportError as error:
        return None, _first_line(error)
    return _C, None


CPU = _load_cpu()
CUDA = _load_cuda()


def cpu_refusal() -> str | None:
    """Why the ``cpu`` library is not usable here, or None if it is."""
    return CPU.refusal


def cuda_refusal() -> str | None:
    """Why the ``cuda`` library is not usable here, or None if it is."""
    return CUDA.refusal


def constant_when_traced(function: Callable) -> Callable:
    """What torch.compiler.assume_constant_result does, without importing torch._dynamo for it."""
    function._dynamo_marked_constant = True
    return function


@constant_when_traced
def cpu_multiplies_pairs() -> bool:
    """Whether this CPU multiplies pairs of bfloat16, which torch's own products then use."""
    module, _ = introspection()
    return module is not None and "avx512_bf16" in module.cpu_capabilities()


@constant_when_traced
def gpu_refusal(index: int) -> str | None:
    """Why GPU ``index`` cannot run our kernels, or None: they need compute capability 8.0."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < (8, 0):
        return f"GPU {index} has compute capability {major}.{minor}; the kernels need 8.0 or newer"
    return None


_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu_can_run(x: Tensor, name: str = "x") -> str | None:
    """Why the CPU's kernels do not take the argument ``name``, or None."""
    if x.device.type != "cpu":
        return f"{name} is on {x.device}, not on the CPU"
    if x.dtype not in _CPU_DTYPES:
        return f"{name} is {x.dtype}; the kernel computes in float32, bfloat16 and float64"
    return None


def cuda_can_run(x: Tensor, name: str = "x") -> str | None:
    """Why the CUDA kernels do not take the argument ``name``, or None."""
    if x.device.type != "cuda":
        return f"{name} is on {x.device}, not on an NVIDIA GPU"
    if x.dtype not in _CUDA_DTYPES:
        return f"{name} is {x.dtype}; the kernel computes in float32, bfloat16 and float16"
    return gpu_refusal(x.get_device())


def build_record() -> dict | None:
    """What the build wrote down: compiler, flags, torch, CUDA; None where nothing was built."""
    path = _FOLDER / "build.json"
    return json.loads(path.read_text()) if path.exists() else None

"""The native libraries: the operator namespace, loading, and why a library is not there."""

import ctypes
import functools
import json
import re
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


def build_record() -> dict | None:
    """What the build wrote down: compiler, flags, torch, CUDA; None where nothing was built."""
    path = _FOLDER / "build.json"
    return json.loads(path.read_text()) if path.exists() else None


@dataclass(frozen=True)
class NativeLibrary:
    """One shared library of kernels: where it is, and why it is not loaded (None if it is)."""

    name: str
    path: Path
    refusal: str | None


def _load(name: str) -> NativeLibrary:
    path = _FOLDER / f"libdsnet_kernels_{name}.so"
    if not path.exists():
        reason = f"{path.name} was not built into this installation"
        failure = (build_record() or {}).get("cuda_failure") if name == "cuda" else None
        if failure:
            reason += f": {str(failure).strip().splitlines()[0]}"
        return NativeLibrary(name, path, reason)
    try:
        torch.ops.load_library(str(path))
    except Exception as error:  # The reason is kept and shown; nothing else may depend on it.
        return NativeLibrary(name, path, f"{path.name} does not load: {_first_line(error)}")
    return NativeLibrary(name, path, None)


def _load_cuda() -> NativeLibrary:
    path = _FOLDER / "libdsnet_kernels_cuda.so"
    if torch.version.hip is not None:
        reason = f"torch {torch.__version__} was built for ROCm, the library is for NVIDIA GPUs"
        return NativeLibrary("cuda", path, reason)
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


@functools.cache
def gpu_capability(index: int) -> tuple[int, int]:
    """The compute capability of GPU ``index``, asked of torch once."""
    return torch.cuda.get_device_capability(index)


@constant_when_traced
def gpu_refusal(index: int) -> str | None:
    """Why GPU ``index`` cannot run our kernels, or None: they need compute capability 8.0."""
    major, minor = gpu_capability(index)
    if (major, minor) < (8, 0):
        return f"GPU {index} has compute capability {major}.{minor}; the kernels need 8.0 or newer"
    return None


@constant_when_traced
def cuda_gpu_refusal(index: int) -> str | None:
    """Why the ``cuda`` library has nothing that GPU ``index`` and its driver run, or None."""
    return gpu_refusal(index) or _library_refusal(index)


@functools.cache
def _library_refusal(index: int) -> str | None:
    versions = cuda_versions()
    if versions is not None and versions[0] // 1000 < versions[1] // 1000:
        driver, runtime = map(_release, versions)
        return f"the NVIDIA driver serves CUDA {driver}, the library was built with CUDA {runtime}"
    architectures = (build_record() or {}).get("cuda_architectures")
    # Records of older builds have none; names such as "native" say nothing.
    if not architectures or not all(map(_ARCHITECTURE.fullmatch, architectures)):
        return None
    capability = gpu_capability(index)
    if any(_is_code_for(each, capability) for each in architectures):
        return None
    major, minor = capability
    reason = f"GPU {index} has compute capability {major}.{minor}; the library was built for"
    reason += f" {', '.join(architectures)}"
    if not any(_is_ptx_for(each, capability) for each in architectures):
        return reason
    if versions is not None and versions[0] < versions[1]:
        driver, runtime = map(_release, versions)
        reason += f", and a driver for CUDA {driver} does not translate PTX of CUDA {runtime}"
        return reason
    return None


@functools.cache
def cuda_versions() -> tuple[int, int] | None:
    """CUDA as (driver, runtime of the library), such as (12080, 13000); None where not known."""
    try:
        function = ctypes.CDLL(str(CUDA.path)).dsnet_kernels_cuda_versions
    except (OSError, AttributeError):
        return None
    driver, runtime = ctypes.c_int(), ctypes.c_int()
    status = function(ctypes.byref(driver), ctypes.byref(runtime))
    return (driver.value, runtime.value) if status == 0 else None


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


_ARCHITECTURE = re.compile(r"(\d+)(\d)([af]?)(?:-(real|virtual))?")
"""Major, minor, suffix and kind in CMake's notation, such as "90a-real"."""


def _is_code_for(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for one architecture runs on a GPU: same major, minor not newer."""
    major, minor, suffix, kind = _ARCHITECTURE.fullmatch(architecture).groups()
    built = (int(major), int(minor))
    if kind == "virtual":
        return False
    if suffix == "a":
        return built == capability
    return built[0] == capability[0] and built <= capability


def _is_ptx_for(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether a driver translates the PTX of one architecture for a GPU: no newer than that."""
    major, minor, suffix, kind = _ARCHITECTURE.fullmatch(architecture).groups()
    return kind != "real" and not suffix and (int(major), int(minor)) <= capability


@constant_when_traced
def tf32_allowed(product: str) -> bool:
    """Whether torch forms float32 products of a kind on a GPU from TF32.

    Args:
        product: ``"conv"`` for convolutions, or ``"matmul"``.
    """
    if torch.version.hip is not None:
        return False
    if product == "conv" and torch.backends.cudnn.enabled:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"
    # The older flags raise where they and these were both set.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def tf32_loss(x: Tensor, product: str) -> str | None:
    """Why the reference is to run ``x`` on a GPU: it may take TF32, our kernels do not; or None."""
    if x.dtype != torch.float32 or x.device.type != "cuda" or not tf32_allowed(product):
        return None
    return (
        "torch's flags allow TF32 in the reference's products, the kernel's are in full float32"
        " (predicted to be slower, not measured)"
    )


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
    return cuda_gpu_refusal(x.get_device())

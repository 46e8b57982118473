"""Builds the modules that run CUDA sources on the CPU, once per state of the sources.

A module is named after an operation, or ``selftest`` for the emulator's own tests, or ``runtime``
for a CUDA runtime that records its calls.

The compiler fuses products and sums wherever it may, as nvcc does, if the processor has the
instruction. ``DSNET_EMULATOR_CONTRACT=0`` builds without: the tests must pass both ways.

``DSNET_EMULATOR_SANITIZE=1`` builds with AddressSanitizer and UBSan; the interpreter then needs
their runtimes preloaded: ``LD_PRELOAD="$(g++ -print-file-name=libasan.so)
$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0``.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pybind11
import torch

from benchmarks.compile_gates import nvcc

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "emulator"
INCLUDES = [ROOT / "csrc", ROOT / "tests" / "emulator"]
EMULATOR = ["block.cpp", "fiber.cpp", "memory.cpp"]
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
# The oldest torch whose stable ABI the bindings use, as in CMakeLists.txt.
ABI = "0x020A000000000000"
# Functions of torch that ask for a GPU; tests/emulator/device.cpp answers in their place.
WRAPPED = (
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "aoti_torch_create_tensor_from_blob_v2",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "aoti_torch_get_current_cuda_stream",
)
WARNINGS = ["-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wno-unknown-pragmas"]
# Their instrumentation takes long to optimise.
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]


def _sanitize() -> bool:
    return os.environ.get("DSNET_EMULATOR_SANITIZE", "0") == "1"


def contraction() -> tuple[list[str], str]:
    """Flags that let the compiler fuse a product and a sum, or forbid it; and why it may not."""
    if os.environ.get("DSNET_EMULATOR_CONTRACT", "1") == "0":
        return ["-ffp-contract=off"], "DSNET_EMULATOR_CONTRACT=0"
    if platform.machine() in ("aarch64", "arm64"):
        return ["-ffp-contract=fast"], ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "fma" in cpuinfo.read_text("utf-8").split():
        return ["-ffp-contract=fast", "-mfma"], ""
    return ["-ffp-contract=off"], "this processor has no fused multiply-add, or does not say so"


def cuda_headers() -> Path | None:
    """The folder of ``cuda_runtime.h``, from a toolkit or from the packages of torch, or None."""
    found = nvcc.find_nvcc()
    places = [Path(found).resolve().parent.parent] if found else []
    places += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    places += sorted(Path(torch.__file__).parent.parent.glob("nvidia/cu*"))
    folders = [place / "include" for place in places]
    return next((each for each in folders if (each / "cuda_runtime.h").exists()), None)


def _sources(name: str) -> list[Path]:
    sources = [ROOT / "tests" / "emulator" / f"{name}.cpp"]
    if name != "selftest":
        sources.append(ROOT / "tests" / "emulator" / "device.cpp")
    if name != "runtime":
        sources += [ROOT / "csrc" / "emulator" / file for file in EMULATOR]
    return sources


def _command(name: str) -> list[str]:
    """Compiles one module; bindings need torch, whose library is loaded already."""
    includes = [f"-I{folder}" for folder in INCLUDES]
    includes += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    definitions, links = ["-DDSNET_EMULATE"], []
    if name == "runtime":
        definitions = []
        includes += ["-isystem", str(cuda_headers())]
    if name != "selftest":
        torch_folder = Path(torch.__file__).parent
        includes += ["-isystem", str(torch_folder / "include")]
        definitions += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={ABI}"]
        links = [f"-Wl,--wrap={function}" for function in WRAPPED]
        links += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    compiler = os.environ.get("CXX", "g++").split()
    return [
        *compiler,
        *FLAGS,
        *contraction()[0],
        *WARNINGS,
        *(SANITIZERS if _sanitize() else []),
        *definitions,
        *includes,
        *map(str, _sources(name)),
        *links,
    ]


def _with_headers(sources: list[Path]) -> list[Path]:
    """The sources and every file of ours that they include, and that those include."""
    found = dict.fromkeys(sources)
    for path in (left := list(sources)):
        for header in re.findall(r'#include "(.+)"', path.read_text("utf-8")):
            places = [folder / header for folder in INCLUDES if (folder / header).exists()]
            left += [place for place in places if place not in found]
            found |= dict.fromkeys(places)
    return sorted(found)


def _digest(name: str, command: list[str]) -> str:
    digest = hashlib.sha256("\0".join([*command, sys.version, torch.__version__]).encode())
    for path in _with_headers(_sources(name)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: list[str], library: Path) -> None:
    """Complete or not at all: written beside ``library`` and renamed."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        result = subprocess.run(
            [*command, "-o", str(built)], check=False, capture_output=True, text=True
        )
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        os.replace(built, library)


@functools.cache
def load(name: str) -> ModuleType:
    """The module ``emulator_<name>`` of tests/emulator/<name>.cpp, compiled if it is not cached.

    Raises:
        RuntimeError: with the compiler's output, if the sources do not compile.
    """
    command = _command(name)
    module_name = f"emulator_{name}"
    folder = CACHE / _digest(name, command)
    library = folder / f"{module_name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    # Another process may want the same: it waits, rather than compile it too.
    with (folder / f"{module_name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(command, library)
    spec = importlib.util.spec_from_file_location(module_name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

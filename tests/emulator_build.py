"""Builds the modules that run the CUDA sources on the CPU, once per state of the sources.

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
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "emulator"
EMULATOR = ["block.cpp", "fiber.cpp", "memory.cpp"]
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


def _command(name: str) -> list[str]:
    sources = [ROOT / "csrc" / "emulator" / file for file in EMULATOR]
    sources.append(ROOT / "tests" / "emulator" / f"{name}.cpp")
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}"]
    includes += ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", *contraction()[0]]
    sanitizers = SANITIZERS if _sanitize() else []
    compiler = os.environ.get("CXX", "g++").split()
    return [
        *compiler,
        *flags,
        *WARNINGS,
        *sanitizers,
        "-DDSNET_EMULATE",
        *includes,
        *map(str, sources),
    ]


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256("\0".join([*command, sys.version]).encode())
    folders = [ROOT / "csrc" / name for name in ("common", "cuda", "emulator")]
    folders.append(ROOT / "tests" / "emulator")
    for path in sorted(p for folder in folders for p in folder.iterdir() if p.is_file()):
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
    folder = CACHE / _digest(command)
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

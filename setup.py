"""Builds the native libraries with CMake; everything else about the package is in pyproject.toml.

Environment: DSNET_NATIVE=0 installs the reference path alone; DSNET_CUDA=auto, 0 or 1 builds the
CUDA kernels where there is a toolkit, never, or insists; TORCH_CUDA_ARCH_LIST names their GPUs;
DSNET_WERROR=1 makes warnings errors; MAX_JOBS bounds parallel compilations; CXX names the compiler.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_toolkit import Toolkit, find_toolkit  # noqa: E402
from torch_location import find_torch  # noqa: E402


def jobs() -> int:
    """Compilations at a time: MAX_JOBS, else one per core and 3 GB of memory."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (3 << 30)))


def flag(name: str, default: bool) -> bool:
    """An environment variable that is 0 or 1."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1" if value else default


class CMakeBuild(build_ext):
    """Runs CMake once and installs the libraries into the dsnet_kernels package."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "torch: expected an installed torch >= 2.10 to build against, found none;"
                " install it, or leave build isolation on so that it is fetched"
            )
        import pybind11

        toolkit = find_toolkit()
        if isinstance(toolkit, Toolkit):
            nvcc, architectures = toolkit.nvcc, toolkit.architectures
            cuda = f"{toolkit.version} for {architectures.replace(';', ' ')}"
        else:
            nvcc, architectures, cuda = "", "", toolkit
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = self._cmake_folder()
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "cmake",
                *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                # Named, since a build folder may remember that of an isolated build, gone by now.
                f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
                f"-DCMAKE_INSTALL_PREFIX={package}",
                f"-DDSNET_TORCH_DIR={torch.folder}",
                f"-DDSNET_TORCH_VERSION={torch.version}",
                f"-DDSNET_PYBIND11_DIR={pybind11.get_include()}",
                f"-DDSNET_PYTHON_INCLUDE_DIR={sysconfig.get_path('include')}",
                f"-DDSNET_EXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
                f"-DDSNET_NVCC={nvcc}",
                f"-DDSNET_CUDA_ARCHITECTURES={architectures}",
                f"-DDSNET_NVCC_THREADS={jobs()}",
                f"-DDSNET_CUDA_TEXT={cuda}",
                f"-DDSNET_WERROR={'ON' if flag('DSNET_WERROR', False) else 'OFF'}",
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build), "-j", str(jobs())], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)
        record = json.loads((package / "build.json").read_text())
        print("dsnet-kernels: built", *(f"  {key}: {record[key]}" for key in record), sep="\n")

    def copy_extensions_to_source(self) -> None:
        """For editable and in-place builds: all that is installed, not the extension alone."""
        package = str(ROOT / "dsnet_kernels")
        install = ["cmake", "--install", str(self._cmake_folder()), "--prefix", package]
        subprocess.run(install, check=True)

    def _cmake_folder(self) -> Path:
        return Path(self.build_temp).resolve() / "cmake"


native = [Extension("dsnet_kernels._C", sources=[])] if flag("DSNET_NATIVE", True) else []
setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild})

"""Builds the native libraries; everything else about the package is in pyproject.toml.

Environment: DSNET_NATIVE=0 installs the reference path alone; DSNET_CUDA=auto, 0 or 1 builds the
CUDA kernels where there is a toolkit, never, or insists; TORCH_CUDA_ARCH_LIST names their GPUs;
DSNET_WERROR=1 makes warnings errors; MAX_JOBS bounds parallel compilations; CXX names the compiler.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "build_backend"))
from commit import commit_of  # noqa: E402
from cuda_build import Host, build  # noqa: E402
from cuda_toolkit import ToolkitError, cuda_wanted, find_toolkit  # noqa: E402
from torch_location import find_torch  # noqa: E402

CUDA_LIBRARY = "libdsnet_kernels_cuda.so"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def jobs() -> int:
    """Compilations at a time: MAX_JOBS, else one per core and 3 GB of memory."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores(), memory // (3 << 30)))


def flag(name: str, default: bool) -> bool:
    """An environment variable that is 0 or 1."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}: expected 0 or 1, got {value!r}")
    return value == "1" if value else default


class CMakeBuild(build_ext):
    """Builds the CPU library with CMake, then the CUDA library, into the dsnet_kernels package."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        if torch is None:
            raise SystemExit(
                "torch: expected an installed torch >= 2.10 to build against, found none;"
                " install it, or leave build isolation on so that it is fetched"
            )
        import pybind11

        wanted = cuda_wanted()
        package = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        folder = self._folder("cmake")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "cmake",
                *("-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
                # Named, since a build folder may remember that of an isolated build, gone by now.
                f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
                f"-DCMAKE_INSTALL_PREFIX={package}",
                f"-DDSNET_TORCH_DIR={torch.folder}",
                f"-DDSNET_TORCH_VERSION={torch.version}",
                f"-DDSNET_PYBIND11_DIR={pybind11.get_include()}",
                f"-DDSNET_PYTHON_INCLUDE_DIR={sysconfig.get_path('include')}",
                f"-DDSNET_EXTENSION_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
                f"-DDSNET_WERROR={'ON' if flag('DSNET_WERROR', False) else 'OFF'}",
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(folder), "-j", str(jobs())], check=True)
        subprocess.run(["cmake", "--install", str(folder)], check=True)
        record = json.loads((package / "build.json").read_text())
        record |= self._build_cuda(wanted, torch.folder, package)
        record["commit"] = commit_of(ROOT)
        self._folder().joinpath("build.json").write_text(json.dumps(record, indent=2))
        shutil.copy(self._folder() / "build.json", package)
        print("dsnet-kernels: built", *(f"  {key}: {record[key]}" for key in record), sep="\n")
        if record["cuda_failure"] is not None:
            print(
                "dsnet-kernels: the CUDA kernels are missing, everything else works:"
                f"\n  {record['cuda_failure']}\n  DSNET_CUDA=1 makes this an error."
            )

    def _build_cuda(self, wanted: str, torch: Path, package: Path) -> dict:
        """Builds what DSNET_CUDA asks for; its part of the record.

        Raises:
            SystemExit: if DSNET_CUDA=1 and the library cannot be built.
        """
        record = {"cuda_toolkit": None, "cuda_architectures": [], "cuda_failure": None}
        (package / CUDA_LIBRARY).unlink(missing_ok=True)
        self._folder("cuda").joinpath(CUDA_LIBRARY).unlink(missing_ok=True)
        if wanted == "0":
            return {"CUDA": "not built: DSNET_CUDA=0", **record}
        try:
            toolkit = find_toolkit()
            if toolkit is None:
                looked = "CUDACXX, CUDA_HOME, PATH and /usr/local/cuda"
                if wanted == "1":
                    raise ToolkitError(f"expected nvcc in {looked}, found none")
                return {"CUDA": f"not built: no nvcc in {looked}", **record}
            record["cuda_toolkit"] = toolkit.version
            host = Host(self._compiler(), torch, flag("DSNET_WERROR", False))
            shutil.copy(build(toolkit, host, self._folder("cuda"), jobs()), package)
        except ToolkitError as error:
            if wanted == "1":
                raise SystemExit(f"DSNET_CUDA=1: {error}") from None
            return {"CUDA": f"not built: {error}", **record, "cuda_failure": str(error)}
        return {"CUDA": str(toolkit), **record, "cuda_architectures": toolkit.record}

    def _compiler(self) -> str:
        """The C++ compiler that CMake chose."""
        cache = (self._folder("cmake") / "CMakeCache.txt").read_text()
        return re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)[1]

    def copy_extensions_to_source(self) -> None:
        """For editable and in-place builds: all that is installed, not the extension alone."""
        package = ROOT / "dsnet_kernels"
        install = ["cmake", "--install", str(self._folder("cmake")), "--prefix", str(package)]
        subprocess.run(install, check=True)
        shutil.copy(self._folder() / "build.json", package)
        library = self._folder("cuda") / CUDA_LIBRARY
        if library.exists():
            shutil.copy(library, package)
        else:
            (package / CUDA_LIBRARY).unlink(missing_ok=True)

    def _folder(self, name: str = "") -> Path:
        return Path(self.build_temp).resolve() / name


class BuildPython(build_py):
    """Leaves the commit in packages without native libraries."""

    def run(self) -> None:
        super().run()
        if not native and not self.editable_mode:
            record = {"native": "not built: DSNET_NATIVE=0", "commit": commit_of(ROOT)}
            path = Path(self.build_lib, "dsnet_kernels", "build.json")
            path.write_text(json.dumps(record, indent=2))


native = [Extension("dsnet_kernels._C", sources=[])] if flag("DSNET_NATIVE", True) else []
setup(ext_modules=native, cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython})

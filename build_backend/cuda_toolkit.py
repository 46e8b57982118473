"""Finds the CUDA toolkit and decides for which GPUs to compile. A GPU is not needed to build."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

OLDEST = (8, 0)
WITHOUT_GPU = ("8.0", "9.0", "10.0+PTX")
"""Ampere, Hopper, Blackwell, and what newer GPUs translate for themselves."""


class Toolkit(NamedTuple):
    """What to compile with, and for which GPUs in CMake's notation."""

    nvcc: Path
    version: str
    architectures: str


def find_toolkit() -> Toolkit | str:
    """The toolkit that DSNET_CUDA = auto, 0 or 1 asks for, or why CUDA is not built.

    Raises:
        SystemExit: if DSNET_CUDA=1 and there is none, or for a malformed variable.
    """
    wanted = os.environ.get("DSNET_CUDA", "") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"DSNET_CUDA: expected auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return "not built: DSNET_CUDA=0"
    nvcc = find_nvcc()
    if nvcc is None:
        looked = "CUDACXX, CUDA_HOME, PATH and /usr/local/cuda"
        if wanted == "1":
            raise SystemExit(f"DSNET_CUDA=1: expected nvcc in {looked}, found none")
        return f"not built: no nvcc in {looked}"
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"V(\d+\.\d+\.\d+)", output)
    return Toolkit(nvcc, release[1] if release else "unknown", cmake_architectures(_requested()))


def find_nvcc() -> Path | None:
    """CUDACXX, else CUDA_HOME's nvcc, else that on PATH, else the usual folder's."""
    candidates = [os.environ.get("CUDACXX")]
    if os.environ.get("CUDA_HOME"):
        candidates.append(f"{os.environ['CUDA_HOME']}/bin/nvcc")
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = (shutil.which(name) for name in candidates if name)
    return next((Path(path) for path in found if path), None)


def _requested() -> list[str]:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    return listed or _visible_gpus() or list(WITHOUT_GPU)


def _visible_gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs that the kernels support."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = sorted(set(re.findall(r"^(\d+\.\d)$", output, re.MULTILINE)))
    return [name for name in found if tuple(map(int, name.split("."))) >= OLDEST]


def cmake_architectures(names: list[str]) -> str:
    """``["8.0", "9.0a+PTX"]`` → ``"80-real;90a-real;90a-virtual"``.

    Raises:
        SystemExit: for a name that is not a compute capability of 8.0 or newer.
    """
    architectures = []
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match or (int(match[1]), int(match[2])) < OLDEST:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected capabilities of 8.0 or newer such as"
                f" '8.0 9.0+PTX', got {name!r}"
            )
        number = match[1] + match[2] + match[3]
        architectures.append(f"{number}-real")
        if match[4]:
            architectures.append(f"{number}-virtual")
    return ";".join(architectures)

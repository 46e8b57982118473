"""Finds the CUDA toolkit and decides for which GPUs to compile. A GPU is not needed to build."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

OLDEST = 80
WITHOUT_GPU = ("8.0", "9.0")
"""Ampere, Ada and Hopper. Newer GPUs translate the PTX for themselves, once: their machine code
would add half to the time of every build that may never see one."""
GENERATIONS = (100, OLDEST)
"""From each on, the compiler's first stage has instructions that the kernels gain from (packed
float32 arithmetic). Architectures between two share that stage."""


class ToolkitError(Exception):
    """The CUDA part cannot be built: the text says why."""


class Toolkit(NamedTuple):
    """What to compile with, and for which GPUs: 90 is compute capability 9.0."""

    nvcc: Path
    version: str
    architectures: tuple[int, ...]

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Architectures that share their PTX, which is that of the oldest."""
        by_generation: dict[int, list[int]] = {}
        for number in self.architectures:
            first = next(first for first in GENERATIONS if number >= first)
            by_generation.setdefault(first, []).append(number)
        return [tuple(group) for group in by_generation.values()]

    @property
    def ptx(self) -> int:
        """The architecture of the PTX that the library holds: the newest that there is."""
        return self.groups[-1][0]

    @property
    def record(self) -> list[str]:
        """Machine code by architecture, then the PTX: ``["80-real", "90-real", "80-virtual"]``."""
        return [*(f"{number}-real" for number in self.architectures), f"{self.ptx}-virtual"]

    @property
    def flags(self) -> list[str]:
        """nvcc's options that generate code, one for each group."""
        flags = []
        for group in self.groups:
            code = [f"sm_{number}" for number in group]
            code += [f"compute_{self.ptx}"] if self.ptx in group else []
            flags.append(f"--generate-code=arch=compute_{group[0]},code=[{','.join(code)}]")
        return flags

    def __str__(self) -> str:
        return f"{self.version} for {' '.join(map(str, self.architectures))}, PTX {self.ptx}"


def cuda_wanted() -> str:
    """DSNET_CUDA.

    Raises:
        SystemExit: unless it is auto, 0, 1 or not there.
    """
    wanted = os.environ.get("DSNET_CUDA", "") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"DSNET_CUDA: expected auto, 0 or 1, got {wanted!r}")
    return wanted


def find_toolkit() -> Toolkit | None:
    """The toolkit on this machine, or None where there is no nvcc.

    Raises:
        ToolkitError: if CUDACXX is no program, TORCH_CUDA_ARCH_LIST is malformed, or nvcc does not
            run or knows none of the architectures.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    release = re.search(r"V(\d+\.\d+\.\d+)", _output(nvcc, "--version"))
    version = release[1] if release else "unknown"
    wanted = _requested()
    known = _known(nvcc)
    kept = tuple(number for number in wanted if number in known)
    if not kept:
        # The PTX of an older architecture serves.
        kept = tuple(sorted(number for number in known if OLDEST <= number <= wanted[-1])[-1:])
    if not kept:
        names = ", ".join(map(str, wanted))
        raise ToolkitError(f"nvcc {version} knows no architecture up to {names}")
    return Toolkit(nvcc, version, kept)


def include_folder(nvcc: Path) -> Path:
    """Where the headers of the CUDA runtime are.

    Raises:
        ToolkitError: if nvcc does not say.
    """
    text = _output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)
    match = re.search(r'INCLUDES="-I([^"]+)"', text)
    if match is None:
        raise ToolkitError(f"{nvcc} --dryrun: expected INCLUDES, got {text!r}")
    return Path(match[1])


def _known(nvcc: Path) -> set[int]:
    """The architectures that this nvcc compiles for."""
    listed = re.findall(r"^compute_(\d+)$", _output(nvcc, "--list-gpu-arch"), re.MULTILINE)
    return {int(number) for number in listed}


def _output(nvcc: Path, *options: str) -> str:
    try:
        done = subprocess.run(
            [nvcc, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except OSError as error:
        raise ToolkitError(f"{nvcc} {options[0]}: {error}") from None
    if done.returncode:
        text = done.stdout.strip() or f"exit status {done.returncode}"
        raise ToolkitError(f"{nvcc} {options[0]}: {text.splitlines()[-1]}")
    return done.stdout


def find_nvcc() -> Path | None:
    """CUDACXX, else CUDA_HOME's nvcc, else that on PATH, else the usual folder's.

    Raises:
        ToolkitError: if CUDACXX is no program.
    """
    named = os.environ.get("CUDACXX")
    if named and shutil.which(named) is None:
        raise ToolkitError(f"CUDACXX: expected a compiler, got {named!r}")
    candidates = [named]
    if os.environ.get("CUDA_HOME"):
        candidates.append(f"{os.environ['CUDA_HOME']}/bin/nvcc")
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    found = (shutil.which(name) for name in candidates if name)
    return next((Path(path) for path in found if path), None)


def _requested() -> list[int]:
    """Ascending: those of TORCH_CUDA_ARCH_LIST, else of the visible GPUs, else the usual."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    return architectures(listed or _visible_gpus() or list(WITHOUT_GPU))


def _visible_gpus() -> list[str]:
    """Compute capabilities of this machine's GPUs that the kernels support."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = re.findall(r"^(\d+\.\d)$", output, re.MULTILINE)
    return [name for name in found if int(name.replace(".", "")) >= OLDEST]


def architectures(names: list[str]) -> list[int]:
    """``["7.5", "9.0a", "8.0+PTX"]`` → ``[80, 90]``: the kernels begin at 8.0 and use no additions
    of a and f; PTX is always there.

    Raises:
        ToolkitError: for a name that is no compute capability, or if all are older.
    """
    found = set()
    for name in names:
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", name)
        if match is None:
            raise ToolkitError(
                f"TORCH_CUDA_ARCH_LIST: expected names such as 8.0 and 9.0+PTX, got {name!r}"
            )
        found.add(int(match[1] + match[2]))
    kept = sorted(number for number in found if number >= OLDEST)
    if not kept:
        raise ToolkitError(
            f"TORCH_CUDA_ARCH_LIST: expected a capability of 8.0 or newer, got {' '.join(names)!r}"
        )
    return kept

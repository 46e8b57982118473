#!/usr/bin/env python3
"""Compiles every binding against the headers of each release of torch that is supported.

The headers come from the releases' wheels for macOS: they are the same on every platform, and
these wheels are a tenth of those for Linux. No GPU and no CUDA toolkit is needed.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))
from cuda_build import BINDINGS, SOURCES, WARNINGS  # noqa: E402

RELEASES = ("torch==2.10.*", "torch==2.11.*", "torch==2.12.*", "torch==2.13.*", "torch")
PLATFORMS = [f"macosx_{version}_0_arm64" for version in range(11, 16)]


def headers(release: str, folder: Path) -> Path:
    """Downloads a wheel and unpacks torch/include."""
    folder.mkdir()
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    options = ["-q", "--no-deps", "--only-binary=:all:", *platforms, f"--dest={folder}"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, release], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("torch/include/")]
        archive.extractall(folder, names)
    print(f"{release}: {wheel.name}", flush=True)
    wheel.unlink()
    return folder / "torch" / "include"


def check(include: Path, binding: Path) -> str:
    """The compiler's complaints."""
    flags = [*BINDINGS, *WARNINGS, "-Werror", f"-I{SOURCES}", "-isystem", str(include)]
    command = [os.environ.get("CXX", "g++"), "-fsyntax-only", *flags, str(binding)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout if done.returncode else ""


def main() -> int:
    bindings = sorted((SOURCES / "bindings").glob("*/*.cpp"))
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = [Path(scratch, str(i)) for i in range(len(RELEASES))]
        includes = list(pool.map(headers, RELEASES, folders))
        pairs = list(itertools.product(includes, bindings))
        complaints = [text for text in pool.map(lambda pair: check(*pair), pairs) if text]
    print(*complaints, sep="\n", end="")
    print(f"{len(bindings)} bindings, {len(RELEASES)} releases, {len(complaints)} failures")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

"""Finds an installed torch without importing it."""

import importlib.util
import re
import site
import sysconfig
from pathlib import Path
from typing import NamedTuple

MINIMUM = (2, 10)


class Torch(NamedTuple):
    """An installation that can be built against."""

    folder: Path
    version: str


def find_torch() -> Torch | None:
    """The first torch ≥ 2.10 of this interpreter, then of the environment installed into."""
    for folder in _candidates():
        version = _version(folder)
        if version and tuple(int(n) for n in version.split(".")[:2]) >= MINIMUM:
            return Torch(folder, version)
    return None


def _candidates() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    folders = [
        sysconfig.get_path("platlib"),
        sysconfig.get_path("purelib"),
        *site.getsitepackages(),
    ]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    return found + [Path(folder) / "torch" for folder in folders]


def _version(folder: Path) -> str | None:
    """From version.py's text; None where the headers of the stable ABI are not there."""
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        return None
    text = (folder / "version.py").read_text()
    match = re.search(r"^__version__\s*=\s*['\"](\d+\.\d+[^'\"]*)['\"]", text, re.MULTILINE)
    return match[1] if match else None

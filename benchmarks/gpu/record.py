"""The record of a run: its schema, to JSON and back."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .phases import ROOT, Phase

SCHEMA = "dsnet-gpu"
VERSION = 2

NATIVE_SOURCES = ("csrc/cuda", "dsnet_kernels/triton")


@dataclass(frozen=True)
class Record:
    """A run of ``python -m benchmarks.gpu``.

    Args:
        dry_run: no GPU was used: every time is one of a stand-in and says nothing.
        machine, gpu, versions: where it ran; empty and None where that could not be found out.
        commit: of the checkout, ``-dirty`` behind it if files were changed.
        native_sources: SHA-256 of the GPU sources, see :func:`native_sources`.
        date, command, seconds: of the run.
        phases: in the order in which they ran.
    """

    dry_run: bool
    machine: dict[str, Any]
    gpu: dict[str, Any] | None
    versions: dict[str, str | None]
    commit: str | None
    native_sources: str
    date: str
    command: str
    seconds: float
    phases: tuple[Phase, ...]
    schema: str = SCHEMA
    version: int = VERSION

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: for text that is no record of this version.
        """
        fields = json.loads(text)
        found = (fields.get("schema"), fields.get("version")) if isinstance(fields, dict) else None
        if found != (SCHEMA, VERSION):
            raise ValueError(f"record: expected {SCHEMA} version {VERSION}, got {found}")
        phases = tuple(Phase(**phase) for phase in fields.pop("phases"))
        return cls(**fields, phases=phases)


def native_sources(root: Path = ROOT) -> str:
    """SHA-256 over names and contents of the CUDA and Triton sources.

    Figures of a record hold for sources with the same digest.
    """
    digest = hashlib.sha256()
    for folder in NATIVE_SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                name = path.relative_to(root).as_posix()
                digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """A reader finds the old file or the new one, both whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)

"""Reads records: those of ``dsnet bench`` and these commands, and those of a GPU."""

import json
from os import PathLike
from pathlib import Path

from dsnet.bench.report import SCHEMA, Report, Result, Row, row_of

from ..gpu import record as gpu
from ..gpu.tables import roofs_of

FOLDER = Path(__file__).resolve().parents[1] / "results"


def paths(folder: Path = FOLDER) -> list[Path]:
    """The records there, in the order of their names."""
    return sorted(folder.glob("*.json"))


def load(path: str | PathLike) -> Report:
    """The record in a file; of a GPU's, the phases ``roofs``, ``ops`` and ``models``.

    Raises:
        ValueError: for what is no record, or that of a dry run, which measured nothing.
    """
    text = Path(path).read_text("utf-8")
    try:
        return _of_gpu(gpu.Record.from_json(text)) if is_gpu(text) else Report.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_gpu(text: str) -> bool:
    """Whether a record is one of ``python -m benchmarks.gpu``."""
    fields = json.loads(text)
    found = fields.get("schema") if isinstance(fields, dict) else None
    if found not in (SCHEMA, gpu.SCHEMA):
        raise ValueError(f"schema: expected {SCHEMA} or {gpu.SCHEMA}, got {found}")
    return found == gpu.SCHEMA


def best_of_ours(row: Row) -> Result | None:
    """The fastest of ours that passed its check."""
    timed = [result for result in row.ours() if result.median is not None]
    return min(timed, key=lambda result: result.median, default=None)


def _of_gpu(record: gpu.Record) -> Report:
    if record.dry_run:
        raise ValueError("dry_run: expected a run on a GPU, got a dry run")
    device = record.gpu or {}
    found = {phase.name: phase.results for phase in record.phases}
    rows = [
        row_of(fields)
        for name in ("ops", "models")
        for fields in found.get(name, {}).get("rows", [])
    ]
    return Report(
        machine={
            "cpu": device.get("name", "unknown GPU"),
            "cpu_capability": device.get("capability", "unknown"),
            "cores": device.get("multiprocessors"),
            "threads": None,
        },
        versions={name: version for name, version in record.versions.items() if version},
        commit=record.commit,
        date=record.date,
        command=record.command,
        seconds=record.seconds,
        rows=tuple(rows),
        roofs=roofs_of(_with_roofs(found)),
    )


def _with_roofs(found: dict[str, dict]) -> dict:
    """The results of the first phase that measured the roofs; each command measures its own."""
    return next((found[name] for name in ("roofs", "ops") if found.get(name, {}).get("roofs")), {})

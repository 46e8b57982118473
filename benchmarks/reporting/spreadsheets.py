"""A record as CSV: networks in the columns of timm's benchmark, and operations."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from dsnet.bench.report import Report, Result, Row
from dsnet.macs import count_macs
from dsnet.model import create_model

TIMED = ("samples_per_sec", "step_time", "batch_size", "img_size")

MODEL_COLUMNS = (
    "model",
    *(f"infer_{name}" for name in TIMED),
    "infer_gmacs",
    *(f"train_{name}" for name in TIMED),
    "param_count",
    # Not in timm's, where every row is one way to run one network.
    "contender",
    "role",
    "dtype",
    "threads",
    "use",
    "step_time_first_quartile",
    "step_time_third_quartile",
    "peak_bytes",
    "problem",
)

OP_COLUMNS = (
    *("op", "use", "pass", "stage", "shape", "dtype", "contender", "role", "backends"),
    *("seconds", "first_quartile", "third_quartile", "rounds"),
    *("ratio", "ratio_low", "ratio_high", "flops", "bytes", "error", "peak_bytes", "problem"),
)


def models(report: Report) -> str:
    """A line per network row and contender: milliseconds, and millions of parameters.

    Empty where the record has no networks.
    """
    rows = [row for row in report.rows if row.kind == "model"]
    threads = report.machine["threads"]
    return _csv(MODEL_COLUMNS, (_model(row, r, threads) for row in rows for r in row.results))


def ops(report: Report) -> str:
    """A line per row of an operation and contender, in seconds; empty where there is none."""
    rows = [row for row in report.rows if row.kind == "op"]
    return _csv(OP_COLUMNS, (_op(row, result) for row in rows for result in row.results))


def _model(row: Row, result: Result, threads: int | None) -> dict[str, Any]:
    batch, _, *size = row.shape
    kind = "train" if row.work.startswith("training") else "infer"
    line = {
        "model": row.subject,
        f"{kind}_batch_size": batch,
        f"{kind}_img_size": size[0] if size[0] == size[1] else "x".join(map(str, size)),
        "infer_gmacs": _gmacs(row.subject, *size),
        "param_count": _millions(row.subject),
        "contender": result.name,
        "role": result.role,
        "dtype": row.dtype,
        "threads": row.threads or threads,
        "use": row.use,
        "peak_bytes": result.peak_bytes,
        "problem": result.problem,
    }
    if result.median:
        first, third = result.quartiles
        line |= {
            f"{kind}_samples_per_sec": round(batch / result.median, 2),
            f"{kind}_step_time": round(result.median * 1e3, 3),
            "step_time_first_quartile": round(first * 1e3, 3),
            "step_time_third_quartile": round(third * 1e3, 3),
        }
    return line


def _op(row: Row, result: Result) -> dict[str, Any]:
    first, third = result.quartiles or (None, None)
    low, high = result.ratio_interval or (None, None)
    return {
        "op": row.subject,
        "use": row.use.partition(":")[0],
        "pass": row.work,
        "stage": row.stage,
        "shape": "x".join(map(str, row.shape)),
        "dtype": row.dtype,
        "contender": result.name,
        "role": result.role,
        "backends": "+".join(dict.fromkeys(result.chosen.values())),
        "seconds": result.median,
        "first_quartile": first,
        "third_quartile": third,
        "rounds": result.rounds,
        "ratio": result.ratio,
        "ratio_low": low,
        "ratio_high": high,
        "flops": row.flops,
        "bytes": row.bytes,
        "error": result.error,
        "peak_bytes": result.peak_bytes,
        "problem": result.problem,
    }


@cache
def _gmacs(name: str, rows: int, columns: int) -> float | None:
    """Of one image; None where it is not square, which nobody counts."""
    if rows != columns:
        return None
    return round(count_macs(create_model(name, device="meta").eval(), rows) / 1e9, 2)


@cache
def _millions(name: str) -> float:
    model = create_model(name, device="meta")
    return round(sum(p.numel() for p in model.parameters()) / 1e6, 2)


def _csv(columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> str:
    found: Iterator[Mapping[str, Any]] = iter(lines)
    first = next(found, None)
    if first is None:
        return ""
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([first, *found])
    return file.getvalue()

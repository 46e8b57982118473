"""Records and rows of the GPU command that its tests share."""

import dataclasses

from benchmarks.gpu.phases import Phase
from benchmarks.gpu.record import Record

ROOFS = [
    {"name": "copy", "dtype": "float32", "work": 4, "median": 1e-12, "quartiles": [1e-12, 1e-12]},
    {"name": "product", "dtype": "bfloat16", "work": 8, "median": 1e-14, "quartiles": [0, 0]},
]
PHASE = Phase("roofs", "passed", 1.0, 20, "roofs.log", None, {"roofs": ROOFS})
RECORD = Record(
    dry_run=False,
    machine={"cpu": "a CPU"},
    gpu={"name": "a GPU", "driver": "1.2"},
    versions={"torch": "2.13.0", "triton": None},
    commit="abc",
    native_sources="0" * 64,
    date="2026-01-01T00:00:00+00:00",
    command="python -m benchmarks.gpu --out x",
    seconds=1.0,
    phases=(PHASE,),
)


def row(problem=None, work="forward"):
    results = [
        {"name": "eager_nchw", "role": "baseline", "median": 3e-5, "quartiles": [3e-5, 3e-5]},
        {"name": "cuda", "role": "ours", "error": 0.5, "problem": problem},
    ]
    if problem is None:
        results[1] |= {"median": 1e-5, "quartiles": [9e-6, 1.1e-5], "ratio": 3.0}
    return {
        "kind": "op",
        "subject": "depthwise_conv3x3",
        "use": "local: x",
        "work": work,
        "stage": 1,
        "shape": [256, 32, 56, 56],
        "dtype": "bfloat16",
        "flops": 1,
        "bytes": 30_000_000,
        "best": "eager_nchw",
        "results": results,
    }


def with_rows(*rows, **changes):
    results = {"rows": list(rows), "roofs": ROOFS, "missing": ["a row"]}
    ops = Phase("ops", "passed", 1.0, 180, "ops.log", None, results)
    return dataclasses.replace(RECORD, phases=(PHASE, ops), **changes)

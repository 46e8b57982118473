"""What the GPU can do: bytes per second of a copy, operations per second of a matrix product."""

import torch

from dsnet.bench.roofs import copy, product

from .clock import device_of
from .program import Context

COPY_BYTES = 2 << 30
MATRIX = 8192
DRY = {"copy_bytes": 1 << 20, "matrix": 64}
BUDGET = 2.0


def run(context: Context) -> None:
    copy_bytes = DRY["copy_bytes"] if context.dry_run else COPY_BYTES
    size = DRY["matrix"] if context.dry_run else MATRIX
    calls = {
        "copy": copy(copy_bytes, torch.bfloat16, context.device),
        "matrix": product(size, torch.bfloat16, context.device),
    }
    timings = device_of(context).timer(calls, budget=BUDGET)
    copied, multiplied = timings["copy"], timings["matrix"]
    context.results = {
        "copy_bytes_per_second": 2 * copy_bytes / copied.median,
        "copy_seconds": [copied.median, *copied.quartiles],
        "matrix_flops_per_second": 2 * size**3 / multiplied.median,
        "matrix_seconds": [multiplied.median, *multiplied.quartiles],
        "copy_bytes": copy_bytes,
        "matrix": size,
    }
    print(context.results)

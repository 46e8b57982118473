"""What the GPU can do: bytes per second of a copy, operations per second of a matrix product."""

import torch

from .clock import timer
from .program import Context

COPY_BYTES = 2 << 30
MATRIX = 8192
DRY = {"copy_bytes": 1 << 20, "matrix": 64}
BUDGET = 2.0


def run(context: Context) -> None:
    copy_bytes = DRY["copy_bytes"] if context.dry_run else COPY_BYTES
    size = DRY["matrix"] if context.dry_run else MATRIX
    # Random numbers: products of zeros draw less power and run faster.
    kind = {"dtype": torch.bfloat16, "device": context.device}
    source = torch.randn(copy_bytes // 2, **kind)
    target = torch.empty_like(source)
    a, b = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
    calls = {"copy": lambda: target.copy_(source), "matrix": lambda: a @ b}
    timings = timer(context.device)(calls, budget=BUDGET)
    copy, matrix = timings["copy"], timings["matrix"]
    context.results = {
        "copy_bytes_per_second": 2 * copy_bytes / copy.median,
        "copy_seconds": [copy.median, *copy.quartiles],
        "matrix_flops_per_second": 2 * size**3 / matrix.median,
        "matrix_seconds": [matrix.median, *matrix.quartiles],
        "copy_bytes": copy_bytes,
        "matrix": size,
    }
    print(context.results)

"""Every operation forward and backward at the stages of tiny, call by call and as a graph."""

import dataclasses
import time
from collections.abc import Sequence

import torch

from dsnet.bench.cases import CASES, Case, stages
from dsnet.bench.ops import op_row
from dsnet.bench.report import Row
from dsnet.bench.row import NATIVE

from .clock import device_of
from .program import Context

MODEL = "dsnet_tiny"
BATCHES = (256, 64)
SIZE = (224, 224)
DRY = {"batches": (10,), "size": (32, 32)}
BUDGET = 0.25
"""Seconds of timing per row."""

BACKENDS = ("cuda", "triton")


def run(context: Context) -> str | None:
    if context.dry_run:
        # Compiling would take longer than all the rest, and be no GPU's compiler.
        torch.compiler.set_stance("force_eager")
    batches, size = (DRY["batches"], DRY["size"]) if context.dry_run else (BATCHES, SIZE)
    device = device_of(context)
    context.results["rows"] = rows = []
    failures = []
    for batch in batches:
        for case in CASES:
            for stage in stages(MODEL, batch, size):
                for alone in (False, True):
                    start = time.monotonic()
                    found = [
                        op_row(
                            case,
                            stage,
                            dtype=torch.bfloat16,
                            backward=False,
                            alone=alone,
                            backends=our_backends(case, context.device),
                            baselines=(*case.baselines, NATIVE),
                            budget=BUDGET,
                            device=device,
                            graph=graph,
                        )
                        for graph in (False, True)
                    ]
                    rows += [dataclasses.asdict(row) for row in found]
                    failures += [_title(row) for row in found if row.failed()]
                    context.write()
                    print(f"{_title(found[0])}: {time.monotonic() - start:.1f} s", flush=True)
    return f"failed: {'; '.join(failures)}" if failures else None


def _title(row: Row) -> str:
    return f"{row.subject} {row.use.split(':')[0]}, stage {row.stage}, {row.shape}, {row.work}"


def our_backends(case: Case, device: str) -> Sequence[str]:
    """On a GPU its two, usable or not: the row says what is against one. The CPU stands in."""
    if device == "cuda":
        return BACKENDS
    available = case.available_backends()
    return [next(name for name in ("cpu", "reference") if name in available)]

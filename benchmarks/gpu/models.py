"""DS-Net-T: inference along the batch and training steps, and how many kernels a call launches."""

import dataclasses

import torch

from dsnet.bench.models import model_row
from dsnet.bench.row import GPU_BASELINES

from .clock import device_of
from .program import Context

MODEL = "dsnet_tiny"
COMPILED = ("eager_channels_last", "compile")
# Compiling takes longer than all the rest: last, where a time limit loses nothing else.
ROWS = (
    *(("inference", batch, GPU_BASELINES) for batch in (128, 1, 8, 32, 512)),
    ("training", 64, GPU_BASELINES),
    *(("inference", batch, COMPILED) for batch in (128, 1)),
)
SIZE = (224, 224)
DRY = {"batch": 10, "size": (32, 32)}
DRY_ROWS = (ROWS[0], ROWS[5])


def run(context: Context) -> str | None:
    context.results["rows"] = []
    device, failures = device_of(context), []
    for work, batch, baselines in DRY_ROWS if context.dry_run else ROWS:
        row = model_row(
            MODEL,
            batch=DRY["batch"] if context.dry_run else batch,
            size=DRY["size"] if context.dry_run else SIZE,
            dtype=torch.bfloat16,
            training=work == "training",
            backends=["auto"],
            baselines=baselines,
            device=device,
            graphs=True,
        )
        context.results["rows"].append(dataclasses.asdict(row))
        context.write()
        print(f"{work}, batch {batch}, {', '.join(baselines)}: done", flush=True)
        if row.failed():
            failures.append(f"{work}, batch {batch}")
    return f"failed: {'; '.join(failures)}" if failures else None

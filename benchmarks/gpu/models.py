"""DS-Net-T: inference and training steps, and how many kernels a call launches."""

import dataclasses
from collections.abc import Callable
from functools import cache

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dsnet.bench.models import model_row
from dsnet.bench.row import EAGER_BASELINES, BASELINES, Contender

from .clock import captured, timer
from .program import Context

MODEL = "dsnet_tiny"
# Compiling takes longer than all the rest: last, where a time limit loses nothing else.
ROWS = (("inference", EAGER_BASELINES), ("training", EAGER_BASELINES), ("inference", BASELINES))
BATCHES = {"inference": 128, "training": 64}
SIZE = (224, 224)
DRY = {"batch": 2, "size": (32, 32)}
BUDGET = 4.0


def run(context: Context) -> str | None:
    context.results |= {"rows": [], "launches": {}}
    failures = []
    for work, baselines in ROWS:
        if context.dry_run and baselines == BASELINES:
            continue
        launches = {}
        row = model_row(
            MODEL,
            batch=DRY["batch"] if context.dry_run else BATCHES[work],
            size=DRY["size"] if context.dry_run else SIZE,
            dtype=torch.bfloat16,
            training=work == "training",
            backends=["auto"],
            baselines=baselines,
            budget=BUDGET,
            device=context.device,
            timer=timer(context.device),
            extend=lambda found: _extended(found, work, context.device, launches),
        )
        context.results["rows"].append(dataclasses.asdict(row))
        context.results["launches"].setdefault(work, {}).update(launches)
        context.write()
        print(f"{work}, {', '.join(baselines)}: done", flush=True)
        if row.failed():
            failures.append(work)
    return f"failed: {'; '.join(failures)}" if failures else None

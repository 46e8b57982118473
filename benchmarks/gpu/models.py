"""DS-Net-T: inference and training steps, and how many kernels a call launches."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dsnet.bench.models import model_row
from dsnet.bench.row import BASELINES, EAGER_BASELINES, Contender

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
            extend=partial(_extended, work=work, device=context.device, launches=launches),
        )
        context.results["rows"].append(dataclasses.asdict(row))
        context.results["launches"].setdefault(work, {}).update(launches)
        context.write()
        print(f"{work}, {', '.join(baselines)}: done", flush=True)
        if row.failed():
            failures.append(work)
    return f"failed: {'; '.join(failures)}" if failures else None


def _extended(
    contenders: list[Contender], work: str, device: str, launches: dict[str, int | None]
) -> list[Contender]:
    """Counts what each launches; in inference adds each as a CUDA graph."""
    counted = [_counted(contender, device, launches) for contender in contenders]
    if work == "training":
        return counted
    return [*counted, *(_graphed(contender, device) for contender in contenders)]


def _counted(contender: Contender, device: str, launches: dict[str, int | None]) -> Contender:
    """Counts once its values are known: a training step would change them."""

    def values() -> Mapping[str, Tensor]:
        found = contender.values()
        launches[contender.name] = count_launches(contender.call, device)
        return found

    return dataclasses.replace(contender, values=values)


def _graphed(contender: Contender, device: str) -> Contender:
    replay = cache(lambda: captured(contender.call, device))
    return dataclasses.replace(
        contender,
        name=f"{contender.name}, CUDA graph",
        call=lambda: replay()(),
        values=lambda: {"logits": replay()()},
        compiles=False,
    )


def count_launches(call: Callable[[], object], device: str) -> int | None:
    """Kernels, copies and fills of one call on the GPU; None on the CPU, which launches none."""
    call()
    if device != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events())

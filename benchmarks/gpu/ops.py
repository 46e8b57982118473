"""Every operation at the stages of tiny, the forward and the backward alone, as CUDA graphs."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import dsnet_kernels
from dsnet.bench.cases import CASES, Case, Stage, stages
from dsnet.bench.device import Device
from dsnet.bench.ops import op_row
from dsnet.bench.report import Row
from dsnet.bench.row import GRAPH, NATIVE, SDPA
from dsnet.bench.suite import Task

from . import rows
from .counts import Count
from .devices import CALLS, device_of, many_calls
from .program import Context
from .roofs import measured
from .tables import MODEL
from .warm_up import variants, warm_up

SIZE, LARGE = (224, 224), (800, 1333)
BACKENDS = ("cuda", "triton")
BASELINES = ("eager_channels_last", NATIVE, SDPA)
AUTOTUNED = ("eager_channels_last", "compile")
BUDGET = 0.25
"""Seconds of timing per row."""

BF16, FLOAT32 = torch.bfloat16, torch.float32
FORWARD, BACKWARD = "forward", "backward"
MANY = f", {CALLS} calls per graph"


@dataclass(frozen=True)
class Plan:
    """Rows of every case that share their batch, dtype, pass and way to be timed.

    Args:
        batch: images per call.
        work: the forward, or the backward alone.
        dtype: of activations and parameters.
        size: of the images.
        stages: of the network.
        timed: :data:`GRAPH` with inputs outside the caches, :data:`MANY`, or empty: call by call,
            which is the time of the host where that is longer.
        baselines: to compare with.
    """

    batch: int
    work: str = FORWARD
    dtype: torch.dtype = BF16
    size: tuple[int, int] = SIZE
    stages: tuple[int, ...] = (1, 2, 3, 4)
    timed: str = GRAPH
    baselines: tuple[str, ...] = BASELINES

    def places(self) -> Iterator[tuple[Case, Stage]]:
        for case in CASES:
            for stage in stages(MODEL, self.batch, self.size):
                if stage.number in self.stages:
                    yield case, stage


# The most important first: a limit takes the last.
PLANS = (
    Plan(128),
    Plan(128, BACKWARD),
    *(Plan(batch, timed=MANY) for batch in (1, 8, 16)),
    *(Plan(1, work, size=LARGE, stages=(1,)) for work in (FORWARD, BACKWARD)),
    *(Plan(256, work) for work in (FORWARD, BACKWARD)),
    *(Plan(128, work, FLOAT32) for work in (FORWARD, BACKWARD)),
    Plan(128, timed=""),
    Plan(128, stages=(1, 3), baselines=AUTOTUNED),
)

DRY_SIZE = (32, 32)
DRY_PLANS = (
    *(Plan(10, work, size=DRY_SIZE, stages=(1, 3)) for work in (FORWARD, BACKWARD)),
    Plan(2, size=DRY_SIZE, stages=(1,), timed=MANY),
    Plan(2, dtype=FLOAT32, size=DRY_SIZE, stages=(1,), timed=""),
)

MOST_ROWS = 320
MOST_VARIANTS = 350
MOST_ELEMENTS = 5_000_000_000
"""Bounds of the dry run."""


def run(context: Context) -> str | None:
    problem = None
    if context.dry_run:
        problem = _count(context)
    elif "triton" in dsnet_kernels.available_backends("co_attention"):
        warm_up(operations_on_triton)
    device = device_of(context)
    context.results |= measured(device, context.dry_run)
    plans = DRY_PLANS if context.dry_run else PLANS
    found = rows.take(context, list(tasks(plans, device)))
    return "; ".join(filter(None, (problem, found))) or None


def tasks(plans: tuple[Plan, ...], device: Device) -> Iterator[Task]:
    for plan in plans:
        for case, stage in plan.places():
            dtype = str(plan.dtype).removeprefix("torch.")
            yield Task(
                f"{case.operation} {case.use}, stage {stage.number}, batch {stage.batch},"
                f" {plan.size[0]}×{plan.size[1]}, {dtype}, {plan.work}{plan.timed}",
                partial(_row, plan, case, stage, device),
            )


def _row(plan: Plan, case: Case, stage: Stage, device: Device, until: float) -> Row:
    row = op_row(
        case,
        stage,
        dtype=plan.dtype,
        backward=False,
        alone=plan.work == BACKWARD,
        backends=_backends(case, device),
        baselines=plan.baselines,
        budget=BUDGET,
        device=many_calls(device) if plan.timed == MANY else device,
        graph=plan.timed != "",
        until=until,
    )
    return dataclasses.replace(row, work=plan.work + plan.timed)


def _backends(case: Case, device: Device) -> tuple[str, ...]:
    """On a GPU its two, usable or not: the row names the reason against one."""
    if device.name != "cpu":
        return BACKENDS
    available = case.available_backends()
    return (next(name for name in ("cpu", "reference") if name in available),)


def operations_on_triton() -> None:
    """Every operation of the plans once on empty tensors, for the counting driver."""
    done = set()
    for plan in PLANS:
        for case, stage in plan.places():
            key = (case.operation, case.use, stage, plan.dtype, plan.work)
            if key in done or len(case.operations) > 1:
                continue
            done.add(key)
            tensors = case.empty(stage, plan.dtype, "cpu")
            function = case.function(partial(getattr, dsnet_kernels))
            if plan.work == FORWARD:
                with torch.inference_mode():
                    function(**tensors, **case.constants(stage))
                continue
            leaves = {name: value.requires_grad_() for name, value in tensors.items()}
            outputs = function(**leaves, **case.constants(stage))
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            grads = [torch.empty_like(out) for out in outputs]
            torch.autograd.grad(outputs, list(leaves.values()), grads)


def _count(context: Context) -> str | None:
    count = sum(1 for plan in PLANS for _ in plan.places())
    batches = {plan.batch for plan in PLANS}
    found = variants(operations_on_triton)
    return context.count(
        Count("rows of operations", count, MOST_ROWS, least=1),
        Count("rows of float32", _rows_of(FLOAT32), count, least=1),
        Count("batches among 1, 8, 16, 128 and 256", len(batches & {1, 8, 16, 128, 256}), 5, 5),
        Count("elements drawn on the GPU", elements_drawn(PLANS), MOST_ELEMENTS, least=1),
        *([] if found is None else [Count("Triton variants", found, MOST_VARIANTS, least=1)]),
    )


def _rows_of(dtype: torch.dtype) -> int:
    return sum(1 for plan in PLANS if plan.dtype == dtype for _ in plan.places())


def elements_drawn(plans: tuple[Plan, ...]) -> int:
    """Random numbers of one draw of the arguments of every row."""
    return sum(
        value.numel()
        for plan in plans
        for case, stage in plan.places()
        for value in case.empty(stage, plan.dtype, "meta").values()
    )

"""DS-Net-T: inference by batch, call by call and as CUDA graphs, a training step, max-autotune."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

import dsnet_kernels
from dsnet.bench.models import model_row
from dsnet.bench.row import GPU_BASELINES
from dsnet.bench.suite import Task

from . import rows
from .counts import Count
from .devices import device_of
from .program import Context
from .tables import MODEL
from .warm_up import variants, warm_up

SIZE = (224, 224)
BF16, FLOAT32 = torch.bfloat16, torch.float32

AUTOTUNED = ("eager_channels_last", "compile")
"""On a GPU ``compile`` is torch.compile with max-autotune, which takes minutes."""


@dataclass(frozen=True)
class Plan:
    """One row: batch, dtype, inference or a training step, and its baselines."""

    batch: int
    dtype: torch.dtype = BF16
    training: bool = False
    baselines: tuple[str, ...] = GPU_BASELINES

    @property
    def title(self) -> str:
        work = "training step" if self.training else "inference"
        dtype = str(self.dtype).removeprefix("torch.")
        tuned = ", against max-autotune" if "compile" in self.baselines else ""
        return f"{MODEL} {work}, batch {self.batch}, {dtype}{tuned}"


# What compiles for minutes comes last, where a limit loses nothing else.
PLANS = (
    *(Plan(batch) for batch in (1, 128, 8, 32, 512)),
    Plan(64, training=True),
    *(Plan(batch, FLOAT32) for batch in (128, 1)),
    *(Plan(batch, baselines=AUTOTUNED) for batch in (128, 1)),
)

DRY_SIZE = (32, 32)
# More images than are checked, once.
DRY_PLANS = (Plan(10), Plan(2, training=True), Plan(2, FLOAT32))

MOST_ROWS = 12
MOST_VARIANTS = 170
"""Bounds of the dry run."""


def run(context: Context) -> str | None:
    problem = None
    if context.dry_run:
        problem = _count(context)
    elif "cuda" not in dsnet_kernels.available_backends("co_attention"):
        # Without its library, auto runs on Triton, which compiles one variant after the other.
        warm_up(networks_on_triton)
    found = rows.take(context, list(tasks(context)))
    return "; ".join(filter(None, (problem, found))) or None


def tasks(context: Context) -> Iterator[Task]:
    device = device_of(context)
    size = DRY_SIZE if context.dry_run else SIZE
    for plan in DRY_PLANS if context.dry_run else PLANS:
        yield Task(
            plan.title,
            partial(
                model_row,
                MODEL,
                batch=plan.batch,
                size=size,
                dtype=plan.dtype,
                training=plan.training,
                backends=["auto"],
                baselines=plan.baselines,
                device=device,
                graphs=not plan.training,
            ),
        )


def networks_on_triton() -> None:
    """Inference and a training step on small images, for the counting driver."""
    import dsnet

    images = torch.zeros(2, 3, 64, 64, dtype=BF16)
    model = dsnet.create_model(MODEL).to(BF16)
    with torch.inference_mode():
        dsnet.optimize(model.eval())(images)
    model.train()(images).sum().backward()


def _count(context: Context) -> str | None:
    inference = [plan for plan in PLANS if not plan.training and plan.dtype == BF16]
    swept = {plan.batch for plan in inference if plan.baselines == GPU_BASELINES}
    tuned = {plan.batch for plan in inference if "compile" in plan.baselines}
    found = variants(networks_on_triton)
    return context.count(
        Count("rows of networks", len(PLANS), MOST_ROWS, least=1),
        Count("rows at batch 1 and 128", len(swept & {1, 128}), 2, least=2),
        Count("rows at batch 1 and 128 against max-autotune", len(tuned & {1, 128}), 2, least=2),
        Count("training steps", sum(plan.training for plan in PLANS), 2, least=1),
        *([] if found is None else [Count("Triton variants", found, MOST_VARIANTS, least=1)]),
    )

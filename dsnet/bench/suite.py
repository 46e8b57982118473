"""Which rows a run has, and running them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .cases import CASES, stages
from .models import model_row
from .ops import op_row
from .report import Row

OP_BATCHES = (8,)
INFERENCE_BATCHES = (1, 8)
TRAINING_BATCHES = (8,)


@dataclass(frozen=True)
class Settings:
    """What to measure; None stands for the defaults of each kind of row.

    Args:
        model: a published network.
        sizes: of the images, (rows, columns).
        dtypes: of activations and parameters.
        backends: ours.
        batches: images per call.
        baselines: to compare with.
        mode: ``"ops"``, ``"inference"``, ``"training"`` or ``"all"``.
        budget: seconds of timing per row.
    """

    model: str = "dsnet_tiny"
    sizes: Sequence[tuple[int, int]] = ((224, 224),)
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    backends: Sequence[str] = ("auto",)
    batches: Sequence[int] | None = None
    baselines: Sequence[str] | None = None
    mode: str = "all"
    budget: float | None = None


@dataclass(frozen=True)
class Task:
    """One row to come."""

    title: str
    run: Callable[[], Row]


def tasks(settings: Settings) -> list[Task]:
    """The rows of ``settings`` in the order of the table."""
    kinds = {"ops": _op_tasks, "inference": _inference_tasks, "training": _training_tasks}
    chosen = kinds if settings.mode == "all" else {settings.mode: kinds[settings.mode]}
    return [task for make in chosen.values() for task in make(settings)]


def _common(settings: Settings) -> dict:
    common = {"backends": settings.backends}
    if settings.baselines is not None:
        common["baselines"] = settings.baselines
    if settings.budget is not None:
        common["budget"] = settings.budget
    return common


def _op_tasks(settings: Settings) -> Iterator[Task]:
    for dtype in settings.dtypes:
        for size in settings.sizes:
            for batch in settings.batches or OP_BATCHES:
                for case in CASES:
                    for stage in stages(settings.model, batch, size):
                        for backward in (False, True):
                            direction = "forward+backward" if backward else "forward"
                            yield Task(
                                f"{case.operation} {case.use}, stage {stage.number}, {direction}",
                                partial(
                                    op_row,
                                    case,
                                    stage,
                                    dtype=dtype,
                                    backward=backward,
                                    **_common(settings),
                                ),
                            )


def _model_tasks(settings: Settings, batches: Sequence[int], training: bool) -> Iterator[Task]:
    work = "training step" if training else "inference"
    for dtype in settings.dtypes:
        for size in settings.sizes:
            for batch in settings.batches or batches:
                yield Task(
                    f"{settings.model} {work}, batch {batch}",
                    partial(
                        model_row,
                        settings.model,
                        batch=batch,
                        size=size,
                        dtype=dtype,
                        training=training,
                        **_common(settings),
                    ),
                )


def _inference_tasks(settings: Settings) -> Iterator[Task]:
    return _model_tasks(settings, INFERENCE_BATCHES, training=False)


def _training_tasks(settings: Settings) -> Iterator[Task]:
    return _model_tasks(settings, TRAINING_BATCHES, training=True)

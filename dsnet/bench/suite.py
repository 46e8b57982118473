"""Which rows a run has, and running them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .cases import CASES, Case, Stage, stages
from .models import model_row
from .ops import op_row
from .report import Row

SIZES = ((224, 224),)
OP_BATCHES = (8,)
INFERENCE_BATCHES = (1, 8)
TRAINING_BATCHES = (8,)
DETECTION_SIZES = ((800, 1333),)
DETECTION_BATCHES = (1,)
DETECTION_BUDGET = 8.0
"""Seconds of timing per row: a call of eager PyTorch takes seconds."""


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
        mode: ``"ops"``, ``"inference"``, ``"training"``, ``"all"`` for these three;
            ``"detection"``: the operations of the first stage on one large image, with memory; or
            ``"backbone"``: inference up to the stages' maps on one large image, with memory.
        budget: seconds of timing per row.
        operations: those measured alone, as the cases name them; None for all.
        stages: of which they are measured.
        exported: packages of ours that a network's inference is measured as too.
    """

    model: str = "dsnet_tiny"
    sizes: Sequence[tuple[int, int]] | None = None
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    backends: Sequence[str] = ("auto",)
    batches: Sequence[int] | None = None
    baselines: Sequence[str] | None = None
    mode: str = "all"
    budget: float | None = None
    operations: Sequence[str] | None = None
    stages: Sequence[int] = (1, 2, 3, 4)
    exported: Sequence[str] = ()

    def cases(self) -> list[Case]:
        """The cases of :attr:`operations`."""
        names = self.operations
        return [case for case in CASES if names is None or case.operation in names]


@dataclass(frozen=True)
class Task:
    """One row to come."""

    title: str
    run: Callable[[], Row]


def tasks(settings: Settings) -> list[Task]:
    """The rows of ``settings`` in the order of the table."""
    everything = (_op_tasks, _inference_tasks, _training_tasks)
    modes = {
        "all": everything,
        "ops": (_op_tasks,),
        "inference": (_inference_tasks,),
        "training": (_training_tasks,),
        "detection": (_detection_tasks,),
        "backbone": (_backbone_tasks,),
    }
    return [task for make in modes[settings.mode] for task in make(settings)]


def _common(settings: Settings) -> dict:
    common = {"backends": settings.backends}
    if settings.baselines is not None:
        common["baselines"] = settings.baselines
    if settings.budget is not None:
        common["budget"] = settings.budget
    return common


def _op_tasks(settings: Settings) -> Iterator[Task]:
    for dtype in settings.dtypes:
        for size in settings.sizes or SIZES:
            for batch in settings.batches or OP_BATCHES:
                for case in settings.cases():
                    for stage in stages(settings.model, batch, size):
                        if stage.number in settings.stages:
                            yield from _both_passes(case, stage, dtype, _common(settings))


def _detection_tasks(settings: Settings) -> Iterator[Task]:
    options = {"budget": DETECTION_BUDGET, "memory": True} | _common(settings)
    for dtype in settings.dtypes:
        for size in settings.sizes or DETECTION_SIZES:
            for batch in settings.batches or DETECTION_BATCHES:
                for case in settings.cases():
                    first = stages(settings.model, batch, size)[0]
                    yield from _both_passes(case, first, dtype, options)


def _both_passes(
    case: Case, stage: Stage, dtype: torch.dtype, options: Mapping[str, Any]
) -> Iterator[Task]:
    for backward in (False, True):
        direction = "forward+backward" if backward else "forward"
        title = f"{case.operation} {case.use}, stage {stage.number}, {direction}"
        yield Task(title, partial(op_row, case, stage, dtype=dtype, backward=backward, **options))


def _model_tasks(
    settings: Settings,
    work: str,
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int]] = SIZES,
    **options: Any,
) -> Iterator[Task]:
    options = {"training": False} | options | _common(settings)
    options["exported"] = settings.exported
    for dtype in settings.dtypes:
        for size in settings.sizes or sizes:
            for batch in settings.batches or batches:
                yield Task(
                    f"{settings.model} {work}, batch {batch}",
                    partial(
                        model_row, settings.model, batch=batch, size=size, dtype=dtype, **options
                    ),
                )


def _inference_tasks(settings: Settings) -> Iterator[Task]:
    return _model_tasks(settings, "inference", INFERENCE_BATCHES)


def _training_tasks(settings: Settings) -> Iterator[Task]:
    return _model_tasks(settings, "training step", TRAINING_BATCHES, training=True)


def _backbone_tasks(settings: Settings) -> Iterator[Task]:
    options = {"budget": DETECTION_BUDGET, "features": True, "memory": True}
    return _model_tasks(settings, "backbone", DETECTION_BATCHES, DETECTION_SIZES, **options)

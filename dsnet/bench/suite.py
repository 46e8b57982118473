"""Which rows a run has, what matters most first."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .cases import CASES, Case, Stage, stages
from .device import CPU, Device
from .models import model_row
from .ops import op_row
from .report import Row
from .row import GRAPH

SIZES = ((224, 224),)
OP_BATCHES = (8,)
INFERENCE_BATCHES = (1, 8)
TRAINING_BATCHES = (8,)
DETECTION_SIZES = ((800, 1333),)
DETECTION_BATCHES = (1,)
DETECTION_BUDGET = 8.0
"""Seconds of timing per row: a call of eager PyTorch takes seconds."""

DTYPES = (torch.float32,)

GPU_DTYPES = (torch.bfloat16, torch.float32)
GPU_OP_BATCHES = (128,)
GPU_INFERENCE_BATCHES = (1, 8, 32, 128, 512)
GPU_TRAINING_BATCHES = (64,)
GPU_SECOND_BATCHES = (1, 128)
"""Of inference in further dtypes, and against torch.compile, which compiles for minutes."""

GPU_COMPILED = ("eager_channels_last", "compile")

SECONDS = {"op": 1.0, "model": 8.0, "training": 20.0}
"""Time of a row with its checks, by which rows share what is left of a budget."""

COMPILE_SECONDS = 200.0
"""A guess, not measured: torch.compile with max-autotune of a network takes minutes."""


@dataclass(frozen=True)
class Settings:
    """What to measure; None stands for the defaults of each kind of row and of the device.

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
        device: where the rows run. A GPU has its own batches, dtypes and baselines; its operations
            are replayed as CUDA graphs, its networks are run both ways.
    """

    model: str = "dsnet_tiny"
    sizes: Sequence[tuple[int, int]] | None = None
    dtypes: Sequence[torch.dtype] | None = None
    backends: Sequence[str] = ("auto",)
    batches: Sequence[int] | None = None
    baselines: Sequence[str] | None = None
    mode: str = "all"
    budget: float | None = None
    operations: Sequence[str] | None = None
    stages: Sequence[int] = (1, 2, 3, 4)
    exported: Sequence[str] = ()
    device: Device = CPU

    def cases(self) -> list[Case]:
        """The cases of :attr:`operations`."""
        names = self.operations
        return [case for case in CASES if names is None or case.operation in names]

    def every_dtype(self) -> Sequence[torch.dtype]:
        """The dtypes, by default those of the device."""
        return self.dtypes or (GPU_DTYPES if self.device.gpu else DTYPES)


@dataclass(frozen=True)
class Task:
    """One row to come.

    Args:
        title: names it.
        run: measures it; takes ``until``, the time of :func:`time.perf_counter` to end at.
        seconds: it takes on an idle machine, roughly.
        least: seconds that have to be left for it to start, for work that cannot be cut short.
    """

    title: str
    run: Callable[..., Row]
    seconds: float = SECONDS["op"]
    least: float = 0.0


def tasks(settings: Settings) -> list[Task]:
    """The rows of ``settings`` in the order in which they are measured."""
    if settings.device.gpu:
        return list(_gpu_tasks(settings))
    make = {
        "all": (_inference_tasks, _training_tasks, _op_tasks),
        "ops": (_op_tasks,),
        "inference": (_inference_tasks,),
        "training": (_training_tasks,),
        "detection": (_detection_tasks,),
        "backbone": (_backbone_tasks,),
    }
    return [task for each in make[settings.mode] for task in each(settings)]


def _gpu_tasks(settings: Settings) -> Iterator[Task]:
    """Networks in the first dtype, operations, other dtypes, and last what compiles."""
    first, *others = settings.every_dtype()
    main = replace(settings, dtypes=[first])
    mode = settings.mode
    if mode in ("all", "inference"):
        yield from _inference_tasks(main, GPU_INFERENCE_BATCHES, graphs=True)
    if mode in ("all", "training"):
        yield from _training_tasks(main, GPU_TRAINING_BATCHES)
    if mode in ("all", "backbone"):
        yield from _backbone_tasks(_at_its_own_size(main), graphs=True)
    if mode in ("all", "ops"):
        yield from _op_tasks(main, GPU_OP_BATCHES)
    if mode in ("all", "detection"):
        yield from _detection_tasks(_at_its_own_size(main))
    for dtype in others:
        other = replace(settings, dtypes=[dtype])
        if mode in ("all", "inference"):
            yield from _inference_tasks(other, GPU_SECOND_BATCHES, graphs=True)
        if mode in ("all", "training"):
            yield from _training_tasks(other, GPU_TRAINING_BATCHES)
        if mode in ("ops", "detection", "backbone"):
            make = {"ops": _op_tasks, "detection": _detection_tasks, "backbone": _backbone_tasks}
            batches = [GPU_OP_BATCHES] if mode == "ops" else []
            yield from make[mode](other, *batches)
    if mode == "all" and settings.baselines is None:
        compiled = replace(main, baselines=GPU_COMPILED)
        for task in _inference_tasks(compiled, GPU_SECOND_BATCHES, graphs=True):
            title = f"{task.title}, against torch.compile"
            yield replace(task, title=title, least=COMPILE_SECONDS)


def _at_its_own_size(settings: Settings) -> Settings:
    """The batches and sizes given are those of the other rows."""
    return replace(settings, batches=None, sizes=None) if settings.mode == "all" else settings


def _common(settings: Settings) -> dict:
    common = {"backends": settings.backends, "device": settings.device}
    if settings.baselines is not None:
        common["baselines"] = settings.baselines
    if settings.budget is not None:
        common["budget"] = settings.budget
    return common


def _op_tasks(settings: Settings, batches: Sequence[int] = OP_BATCHES) -> Iterator[Task]:
    for dtype in settings.every_dtype():
        for size in settings.sizes or SIZES:
            for batch in settings.batches or batches:
                for case in settings.cases():
                    for stage in stages(settings.model, batch, size):
                        if stage.number in settings.stages:
                            yield from _both_passes(case, stage, dtype, settings)


def _detection_tasks(settings: Settings) -> Iterator[Task]:
    options = {"budget": DETECTION_BUDGET, "memory": True}
    for dtype in settings.every_dtype():
        for size in settings.sizes or DETECTION_SIZES:
            for batch in settings.batches or DETECTION_BATCHES:
                for case in settings.cases():
                    first = stages(settings.model, batch, size)[0]
                    yield from _both_passes(case, first, dtype, settings, **options)


def _both_passes(
    case: Case, stage: Stage, dtype: torch.dtype, settings: Settings, **options: Any
) -> Iterator[Task]:
    options |= _common(settings)
    if settings.device.gpu:
        options |= {"graph": True, "budget": settings.budget}
    for backward in (False, True):
        direction = "forward+backward" if backward else "forward"
        title = f"{case.operation} {case.use}, stage {stage.number}, {direction}"
        title += GRAPH if settings.device.gpu else ""
        yield Task(
            f"{title}{_told_apart(settings, stage.batch, stage.image, dtype)}",
            partial(op_row, case, stage, dtype=dtype, backward=backward, **options),
            options.get("budget") or SECONDS["op"],
        )


def _told_apart(
    settings: Settings, batch: int | None, size: tuple[int, int], dtype: torch.dtype
) -> str:
    """What distinguishes a title from those of other dtypes, sizes and batches."""
    several = [
        (batch is not None and len(settings.batches or ()) > 1, f"batch {batch}"),
        (settings.device.gpu or len(settings.sizes or ()) > 1, f"{size[0]}×{size[1]}"),
        (settings.device.gpu or len(settings.dtypes or ()) > 1, _short(dtype)),
    ]
    return "".join(f", {text}" for needed, text in several if needed)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _model_tasks(
    settings: Settings,
    work: str,
    batches: Sequence[int],
    sizes: Sequence[tuple[int, int]] = SIZES,
    **options: Any,
) -> Iterator[Task]:
    options = {"training": False} | options | _common(settings)
    options["exported"] = settings.exported
    kind = "training" if options["training"] else "model"
    for dtype in settings.every_dtype():
        for size in settings.sizes or sizes:
            for batch in settings.batches or batches:
                named = {"batch": batch, "size": size, "dtype": dtype}
                yield Task(
                    f"{settings.model} {work}, batch {batch}"
                    f"{_told_apart(settings, None, size, dtype)}",
                    partial(model_row, settings.model, **named, **options),
                    SECONDS[kind],
                )


def _inference_tasks(
    settings: Settings, batches: Sequence[int] = INFERENCE_BATCHES, **options: Any
) -> Iterator[Task]:
    return _model_tasks(settings, "inference", batches, **options)


def _training_tasks(
    settings: Settings, batches: Sequence[int] = TRAINING_BATCHES
) -> Iterator[Task]:
    return _model_tasks(settings, "training step", batches, training=True)


def _backbone_tasks(settings: Settings, **options: Any) -> Iterator[Task]:
    options |= {"features": True, "memory": True}
    if not settings.device.gpu:
        options["budget"] = DETECTION_BUDGET
    return _model_tasks(settings, "backbone", DETECTION_BATCHES, DETECTION_SIZES, **options)

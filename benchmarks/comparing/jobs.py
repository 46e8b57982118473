"""What both sides run: uses of an operation, and networks; with inputs, check and facts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dsnet.bench.cases import CASES, Case, Stage, stages
from dsnet.bench.networks import Problem, eager_values, judge
from dsnet.bench.ops import DRAWS, judge_of, make_inputs
from dsnet.bench.row import Judge
from dsnet_kernels.backends import OPERATIONS


@dataclass(frozen=True)
class Job:
    """One call to compare.

    Args:
        title: for the progress line.
        facts: of the row that it becomes.
        prepare: returns what a worker is told, and the check of what it computes.
    """

    title: str
    facts: dict[str, Any]
    prepare: Callable[[], tuple[dict[str, Any], Judge]]


def operations(
    model: str,
    batch: int,
    size: tuple[int, int],
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
    numbers: Sequence[int] = (1, 2, 3, 4),
) -> Iterator[Job]:
    """Every use of every operation; those composed of others are left to the others."""
    for case in CASES:
        if case.operation not in OPERATIONS or (names and case.operation not in names):
            continue
        for stage in stages(model, batch, size):
            for backward in (False, True):
                if stage.number in numbers:
                    yield _operation(case, stage, dtype, backward)


def _operation(case: Case, stage: Stage, dtype: torch.dtype, backward: bool) -> Job:
    work = "forward+backward" if backward else "forward"
    flops, moved = case.work(stage, dtype, backward)
    return Job(
        title=f"{case.operation} {case.use}, stage {stage.number}, {work}",
        facts={
            "kind": "op",
            "subject": case.operation,
            "use": f"{case.use}: {case.formula}",
            "work": work,
            "stage": stage.number,
            "shape": tuple(case.shapes(stage)[case.activations[0]]),
            "dtype": str(dtype).removeprefix("torch."),
            "flops": flops,
            "bytes": moved,
            "image": stage.image,
        },
        prepare=partial(_prepare_operation, case, stage, dtype, backward),
    )


def _prepare_operation(
    case: Case, stage: Stage, dtype: torch.dtype, backward: bool
) -> tuple[dict[str, Any], Judge]:
    draws = [make_inputs(case, stage, dtype, backward, seed) for seed in range(DRAWS)]
    inputs = draws[0]
    with torch.inference_mode(not backward):
        check = judge_of(case, draws)
    # Streams are both returned where both are exchanged.
    outputs = 1 if inputs.grads is None else len(inputs.grads)
    if inputs.grads is None:
        outputs = len(make_inputs(case, stage, dtype, True).grads)
    told = {
        "kind": "op",
        "operation": case.operation,
        "tensors": dict(inputs.tensors),
        "constants": dict(inputs.constants),
        "grads": inputs.grads,
        "outputs": outputs,
        "dispatched": list(OPERATIONS[case.operation].tensors),
        "options": list(case.options),
        "inference": not backward,
    }
    return told, check


def network(
    model: str, batch: int, size: tuple[int, int], dtype: torch.dtype, training: bool
) -> Job:
    """Inference, or forward, loss and backward."""
    work = "training" if training else "inference"
    return Job(
        title=f"{model} {work}, batch {batch}",
        facts={
            "kind": "model",
            "subject": model,
            "use": "image classification",
            "work": work,
            "stage": 0,
            "shape": (batch, 3, *size),
            "dtype": str(dtype).removeprefix("torch."),
            "flops": None,
            "bytes": None,
            "image": size,
        },
        prepare=partial(_prepare_network, model, batch, size, dtype, training),
    )


def _prepare_network(
    model: str, batch: int, size: tuple[int, int], dtype: torch.dtype, training: bool
) -> tuple[dict[str, Any], Judge]:
    problem = Problem.random(model, batch=batch, size=size, dtype=dtype, training=training)
    with torch.inference_mode(not training):
        check = partial(judge, references=eager_values(problem), oracle=problem.oracle())
    told = {
        "kind": "model",
        "name": model,
        "state": problem.rounded(),
        "images": problem.images,
        "labels": problem.labels,
        "training": training,
        "inference": not training,
    }
    return told, check

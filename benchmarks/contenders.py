"""What the pytest-benchmark cases of every operation share."""

import pytest
import torch

from dsnet.bench.cases import CASES, Case, Stage, stages
from dsnet.bench.ops import baseline, make_inputs, ours

STAGES = stages("dsnet_tiny", batch=8, size=(224, 224))


def of(operation: str) -> pytest.MarkDecorator:
    """Parametrizes by ``case`` and ``contender``: the operation's baselines, and ours."""
    return pytest.mark.parametrize(
        ("case", "contender"),
        [
            pytest.param(case, name, id=f"{case.use}-{name}")
            for case in CASES
            if case.operation == operation
            for name in (*case.offered, "auto")
        ],
    )


on_every_stage = pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"stage{stage.number}")
in_both_directions = pytest.mark.parametrize(
    "backward", [False, True], ids=["forward", "forward+backward"]
)


def run(benchmark, case: Case, contender: str, stage: Stage, backward: bool) -> None:
    """Times one contender; a group per use, stage and pass holds all of them."""
    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"{case.operation} {case.use}, stage {stage.number}, {direction}"
    inputs = make_inputs(case, stage, torch.float32, backward)
    make = ours if contender == "auto" else baseline
    entry = make(contender, case, inputs)
    benchmark.extra_info["chosen"] = entry.chosen
    with torch.inference_mode(not backward):
        values = benchmark(entry.call)
    assert values[0].shape == inputs.tensors[case.activations[0]].shape
    assert torch.isfinite(values[0]).all()

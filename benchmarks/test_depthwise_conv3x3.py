"""pytest-benchmark cases of ``depthwise_conv3x3``: ``pytest benchmarks --benchmark-only``.

A group per use, stage and pass holds every contender of ``dsnet bench``, which also interleaves
them, checks them against float64 and compares.
"""

import pytest
import torch

from dsnet.bench.cases import CASES, stages
from dsnet.bench.ops import baseline, make_inputs, ours
from dsnet.bench.row import BASELINES

OPERATION = "depthwise_conv3x3"
STAGES = stages("dsnet_tiny", batch=8, size=(224, 224))


@pytest.mark.parametrize("contender", [*BASELINES, "auto"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"stage{stage.number}")
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.operation == OPERATION], ids=lambda case: case.use
)
def test_depthwise_conv3x3(benchmark, case, stage, backward, contender):
    direction = "forward+backward" if backward else "forward"
    benchmark.group = f"{case.operation} {case.use}, stage {stage.number}, {direction}"
    inputs = make_inputs(case, stage, torch.float32, backward)
    make = ours if contender == "auto" else baseline
    entry = make(contender, case, inputs)
    benchmark.extra_info["chosen"] = entry.chosen
    with torch.inference_mode(not backward):
        values = benchmark(entry.call)
    assert values[0].shape == inputs.tensors["x"].shape
    assert torch.isfinite(values[0]).all()

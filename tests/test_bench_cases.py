"""The cases of ``dsnet bench``: what is computed, with which inputs, and how much work it is."""

import pytest
import torch

import dsnet_kernels
from dsnet.bench import cases, ops
from dsnet_kernels import reference

STAGES = cases.stages("dsnet_tiny", batch=2, size=(32, 48))
CASE_IDS = [f"{case.operation}-{case.use}" for case in cases.CASES]


def test_stages_of_the_published_network():
    shapes = [
        (s.channels, s.local_channels, s.num_heads, s.grid, s.global_grid)
        for s in cases.stages("dsnet_tiny", 8, (224, 224))
    ]
    assert shapes == [
        (64, 32, 1, (56, 56), (7, 7)),
        (128, 64, 2, (28, 28), (7, 7)),
        (320, 160, 5, (14, 14), (7, 7)),
        (512, 256, 8, (7, 7), (7, 7)),
    ]


def test_every_operation_with_a_kernel_has_a_case():
    with_kernel = {op.name for op in dsnet_kernels.backends.OPERATIONS.values() if op.present}
    assert with_kernel <= {name for case in cases.CASES for name in case.operations}


def test_co_attention_work_by_hand():
    stage = cases.stages("dsnet_tiny", 8, (224, 224))[0]
    pixels, tokens, width = 56 * 56, 7 * 7, 32
    local_macs = pixels * (3 * width * width + width * width)
    global_macs = tokens * (3 * width * width + width * width)
    macs = 8 * (local_macs + global_macs + 4 * pixels * tokens * width)
    elements = 8 * width * (pixels + tokens)
    case = named("co_attention")
    assert case.work(stage, torch.float32, False) == (2 * macs, 2 * 4 * elements)
    assert case.work(stage, torch.bfloat16, True) == (6 * macs, 5 * 2 * elements)


def test_depthwise_work_by_hand():
    local, position = (case for case in cases.CASES if case.operation == "depthwise_conv3x3")
    stage = cases.stages("dsnet_tiny", 8, (224, 224))[0]
    elements = 8 * 32 * 56 * 56
    assert local.work(stage, torch.float32, False) == (21 * elements, 2 * 4 * elements)
    assert local.work(stage, torch.bfloat16, True) == (63 * elements, 5 * 2 * elements)
    assert position.work(stage, torch.float32, True) == (57 * 2 * elements, 5 * 4 * 2 * elements)


@pytest.mark.parametrize("case", cases.CASES, ids=CASE_IDS)
def test_inputs_are_random_reproducible_and_channels_last(case):
    first, again, other = (case.tensors(STAGES[0], torch.float32, seed=seed) for seed in (1, 1, 2))
    for name, value in first.items():
        assert value.std() > 0.05
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
        if value.dim() == 4 and name in case.activations:
            assert value.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.operation}-{case.use}-{name}")
        for case in cases.CASES
        for name in case.offered
    ],
)
def test_contenders_compute_the_same(case, name, backward, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs = ops.make_inputs(case, STAGES[1], torch.float64, backward)
    values = ops.baseline(name, case, inputs).values()
    expected = ops.ours("reference", case, inputs).values()
    assert list(values) == list(expected)
    outputs = 2 if case.operation == "co_attention" else 1
    assert len(values) == (outputs + len(inputs.tensors) if backward else outputs)
    for key, value in values.items():
        torch.testing.assert_close(value, expected[key])


def named(operation):
    return next(case for case in cases.CASES if case.operation == operation)


def test_alignment_is_co_attention_then_upsample_concat():
    case, stage = named("alignment"), STAGES[0]
    inputs = ops.make_inputs(case, stage, torch.float64, False)
    tensors = dict(inputs.tensors)
    residual, weight, bias = (tensors.pop(name) for name in ("residual", "weight", "bias"))
    local, tokens = reference.co_attention(num_heads=stage.num_heads, **tensors)
    rows, columns = stage.global_grid
    global_ = tokens.reshape(stage.batch, rows, columns, -1).permute(0, 3, 1, 2)
    expected = reference.upsample_concat(local, global_, weight, bias, residual)
    entry = ops.ours("reference", case, inputs)
    torch.testing.assert_close(entry.values()["out 0"], expected)
    assert entry.chosen == {"co_attention": "reference", "upsample_concat": "reference"}


def test_unknown_baseline_is_refused():
    inputs = ops.make_inputs(cases.CASES[0], STAGES[0], torch.float32, False)
    with pytest.raises(ValueError, match="baselines: expected eager_nchw"):
        ops.baseline("tvm", cases.CASES[0], inputs)

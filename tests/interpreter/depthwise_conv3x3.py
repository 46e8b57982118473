"""What only ``depthwise_conv3x3`` has in Triton; ``test_interpreter.py`` runs this file."""

import pytest
import torch
from cases.depthwise_conv3x3 import CASE
from harness import compare, sample
from variants import variants

from dsnet_kernels import BackendUnavailable, depthwise_conv3x3, explain
from dsnet_kernels.triton import depthwise_conv3x3 as kernels

OP = torch.ops.dsnet_kernels.depthwise_conv3x3_triton
OP_BACKWARD = torch.ops.dsnet_kernels.depthwise_conv3x3_triton_backward
(TRITON,) = variants(CASE.name)


def test_programs_that_take_several_column_blocks(monkeypatch):
    inputs = sample(CASE, (3, 20, 9, 30))
    expected = compare(CASE, TRITON, inputs)
    few = kernels.launch_for(
        torch.Size((3, 20, 9, 30)), per_thread=4, max_programs=2, registers=168
    )
    assert few.column_programs < few.column_blocks
    monkeypatch.setattr(kernels, "backward_launch", lambda shape: few)
    got = compare(CASE, TRITON, inputs)
    assert torch.equal(got["grad x"], expected["grad x"])


X, WEIGHT = torch.zeros(2, 4, 5, 5), torch.zeros(4, 1, 3, 3)


@pytest.mark.parametrize(
    ("operator", "args", "error", "message"),
    [
        (OP, (X[0], WEIGHT, None, None, None, True), ValueError, "x: expected 4 dimensions"),
        (OP, (X[..., :0], WEIGHT, None, None, None, True), ValueError, "x: expected at least one"),
        (OP, (X, WEIGHT[:3], None, None, None, True), ValueError, "weight: expected shape"),
        (OP, (X, WEIGHT, WEIGHT, None, None, True), ValueError, "bias: expected shape"),
        (OP, (X, WEIGHT.double(), None, None, None, True), TypeError, "weight: expected"),
        (OP, (X.double(), WEIGHT, None, None, None, True), TypeError, "x is torch.float64"),
        (OP_BACKWARD, (X.half(), X, WEIGHT, None, None, True), TypeError, "grad: expected"),
        (OP_BACKWARD, (X[:1], X, WEIGHT, None, None, True), ValueError, "grad: expected shape"),
    ],
)
def test_the_raw_operators_check_too(operator, args, error, message):
    with pytest.raises(error, match=message):
        operator(*args)


def test_bfloat16_is_refused_with_the_reason():
    x, weight = X.bfloat16(), WEIGHT.bfloat16()
    with pytest.raises(BackendUnavailable, match=r"triton: x is .*bfloat16.*interpreter"):
        depthwise_conv3x3(x, weight, backend="triton")
    assert explain("depthwise_conv3x3", x).chosen != "triton"

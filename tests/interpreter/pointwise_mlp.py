"""What only ``pointwise_mlp`` has in Triton; ``test_interpreter.py`` runs this file."""

import math
import sys

import pytest
import torch
from cases.pointwise_mlp import CASE
from harness import assert_same_bits, compare, run, sample
from variants import variants

from dsnet_kernels import BackendUnavailable, pointwise_mlp
from dsnet_kernels.triton import pointwise_mlp as kernels
from dsnet_kernels.triton import products

OP = torch.ops.dsnet_kernels.pointwise_mlp_triton
OP_BACKWARD = torch.ops.dsnet_kernels.pointwise_mlp_triton_backward
PUBLIC = sys.modules["dsnet_kernels.pointwise_mlp"]
(TRITON,) = variants(CASE.name)

in_both_dtypes = pytest.mark.parametrize("dtype", TRITON.dtypes, ids=str)


@pytest.fixture
def recomputes(monkeypatch):
    """As on a GPU where channels are few, the forward keeps nothing for the backward."""
    monkeypatch.setattr(PUBLIC, "keeps_hidden", lambda x: False)


def compare_with_every_option(shape, dtype):
    for option in CASE.options.values():
        compare(CASE, TRITON, *(sample(CASE, shape, dtype, seed, option=option) for seed in (0, 1)))


SHAPES = [(1, 1, 1, 1, 1), (3, 5, 3, 9, 21), (2, 5, 7, 16, 130), (1, 3, 3, 130, 24)]


@in_both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_hidden_activations_kept(shape, dtype):
    compare_with_every_option(shape, dtype)


@in_both_dtypes
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 5, 80, 70)], ids=str)
def test_with_hidden_activations_computed_again(recomputes, shape, dtype):
    compare_with_every_option(shape, dtype)


@pytest.mark.parametrize("fused_width", [0, kernels.FUSED_WIDTH], ids=["products", "fused"])
def test_slots_of_several_row_blocks(recomputes, monkeypatch, fused_width):
    """Limits on slots and on the fused width stand in for shapes too large for the interpreter."""
    monkeypatch.setattr(kernels, "FUSED_WIDTH", fused_width)
    for module in (kernels, kernels.norm_linear, products):
        monkeypatch.setattr(module, "SLOTS", 2)
    compare(CASE, TRITON, sample(CASE, (3, 9, 11, 5, 7), TRITON.half, option={"factors": True}))


@pytest.mark.parametrize("fused_width", [0, kernels.FUSED_WIDTH], ids=["products", "fused"])
def test_the_kept_activations_are_those_before_gelu(monkeypatch, fused_width):
    monkeypatch.setattr(kernels, "FUSED_WIDTH", fused_width)
    inputs, _ = sample(CASE, (2, 3, 3, 8, 20), TRITON.half)
    args = [inputs.get(name) for name in ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
    args += [inputs["scale"], inputs["shift"], None]
    with TRITON.active():
        out, hidden = OP(*args, True)
        other, nothing = OP(*args, False)
    assert torch.equal(out, other)
    assert nothing.shape == (0,)
    assert hidden.shape == (PUBLIC.hidden_size(inputs["x"], inputs["fc1_weight"]),)
    z = inputs["x"].double() * inputs["scale"].double().view(-1, 1, 1)
    z += inputs["shift"].double().view(-1, 1, 1)
    expected = torch.einsum("bchw,rc->bhwr", z, inputs["fc1_weight"].double())
    expected += inputs["fc1_bias"].double()
    got = hidden.view(-1, 20)[:18].view(2, 3, 3, 20)
    torch.testing.assert_close(got.double(), expected, rtol=2e-3, atol=4e-3)
    assert torch.isfinite(hidden).all()


@in_both_dtypes
def test_nan_behind_the_last_row(recomputes, dtype):
    inputs, grads = sample(CASE, (1, 3, 7, 5, 9), dtype)

    def behind(t):
        memory = torch.full((t.numel() + 4096,), math.nan, dtype=t.dtype)
        return memory.as_strided(t.shape, t.stride()).copy_(t)

    spoilt = {name: behind(value) for name, value in inputs.items()}
    with TRITON.active():
        expected = run(CASE, TRITON, inputs, grads)
        got = run(CASE, TRITON, spoilt, [behind(grad) for grad in grads])
    assert all(torch.isfinite(value).all() for value in expected.values())
    assert_same_bits(got, expected)


def test_nan_in_the_padding_of_what_was_kept():
    inputs, (grad,) = sample(CASE, (1, 3, 7, 5, 9))
    weights = [inputs[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight")]
    affine = [inputs["scale"], inputs["shift"], None]
    x = inputs["x"]
    with TRITON.active():
        _, hidden = OP(x, *weights, None, *affine, True)
        expected = OP_BACKWARD(grad, x, hidden, *weights, *affine)
        hidden.view(-1, 9)[21:] = math.nan
        got = OP_BACKWARD(grad, x, hidden, *weights, *affine)
    assert all(map(torch.equal, got, expected))


# Bad arguments

X, FIRST, SECOND = torch.zeros(2, 4, 5, 5), torch.zeros(6, 4), torch.zeros(4, 6)
VECTOR, HIDDEN = torch.zeros(3), torch.zeros(64 * 6)


def forward(x=X, first=FIRST, bias=None, second=SECOND, scale=None, branch_scale=None):
    return OP(x, first, bias, second, None, scale, None, branch_scale, True)


def backward(grad=X, x=X, hidden=HIDDEN, first=FIRST, branch_scale=None):
    return OP_BACKWARD(grad, x, hidden, first, None, SECOND, None, None, branch_scale)


@pytest.mark.parametrize(
    ("call", "change", "error", "message"),
    [
        (forward, {"x": X[0]}, ValueError, "x: expected 4"),
        (forward, {"x": X.double()}, TypeError, "x is torch.float64"),
        (forward, {"first": FIRST[0]}, ValueError, "fc1_weight: expected 2"),
        (forward, {"first": FIRST[:0]}, ValueError, "fc1_weight: expected at least"),
        (forward, {"first": FIRST[:, :3]}, ValueError, r"fc1_weight: expected shape \(6, 4\)"),
        (forward, {"second": FIRST}, ValueError, r"fc2_weight: expected shape \(4, 6\)"),
        (forward, {"second": SECOND.double()}, TypeError, "fc2_weight: expected"),
        (forward, {"bias": VECTOR}, ValueError, r"fc1_bias: expected shape \(6,\)"),
        (forward, {"scale": VECTOR}, ValueError, r"scale: expected shape \(4,\)"),
        (forward, {"branch_scale": VECTOR}, ValueError, r"branch_scale: expected shape \(2,\)"),
        (backward, {"grad": X[:1]}, ValueError, "grad: expected shape"),
        (backward, {"grad": X.half()}, TypeError, "grad: expected"),
        (backward, {"hidden": HIDDEN[1:]}, ValueError, r"hidden: expected shape \(384,\)"),
        (backward, {"hidden": HIDDEN.half()}, TypeError, "hidden: expected"),
        (backward, {"branch_scale": VECTOR}, ValueError, "branch_scale: expected"),
    ],
)
def test_the_raw_operators_check_too(call, change, error, message):
    with pytest.raises(error, match=message):
        call(**change)


def test_refusals_with_the_reason():
    with pytest.raises(BackendUnavailable, match=r"triton: fc1_weight has shape \(0, 4\)"):
        pointwise_mlp(X, FIRST[:0], None, SECOND[:, :0], None, backend="triton")
    x, first, second = (t.bfloat16() for t in (X, FIRST, SECOND))
    with pytest.raises(BackendUnavailable, match=r"triton: x is .*bfloat16.*interpreter"):
        pointwise_mlp(x, first, None, second, None, backend="triton")

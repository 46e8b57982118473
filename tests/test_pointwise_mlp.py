"""pointwise_mlp beyond what every operation is held to: GELU, what the forward keeps, layouts."""

import importlib

import pytest
import torch
from cases.pointwise_mlp import CASE
from harness import assert_same_bits, compare, generator, inputs_on, placed, random, run, sample
from torch.nn import functional as F
from variants import on_variants

from dsnet_kernels import pointwise_mlp

# The package's attribute of that name is the function.
MODULE = importlib.import_module("dsnet_kernels.pointwise_mlp")

on_every_variant = on_variants(CASE.name)


@pytest.fixture(params=[False, True], ids=["recomputed", "kept"])
def kept(request, monkeypatch):
    """Whether the forward keeps the hidden activations, whatever the width."""
    monkeypatch.setattr(MODULE, "keeps_hidden", lambda x: request.param)
    return request.param


# GELU


def gelu_and_slope(variant, values):
    """GELU and its derivative at values, one image of one channel each, through the operation."""
    one = placed(torch.ones(1, 1), variant.device)
    x = placed(values.view(-1, 1, 1, 1), variant.device).requires_grad_()
    with variant.active():
        out = pointwise_mlp(x, one, None, one, None)
        (slope,) = torch.autograd.grad(out.sum(), x)
    out, slope = (each.detach().cpu().double().flatten() for each in (out, slope))
    return out - values.double(), slope - 1


@on_every_variant
def test_gelu_and_its_derivative_on_the_whole_line(variant, kept):
    values = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -40.0, 0.0, 40.0, 1e4])])
    x = values.double().requires_grad_()
    expected = F.gelu(x)
    (expected_slope,) = torch.autograd.grad(expected.sum(), x)
    found, slope = gelu_and_slope(variant, values)
    eps = torch.finfo(torch.float32).eps
    allowed = 4 * eps * values.double().abs().clamp(min=1)
    assert ((found - expected.detach()).abs() <= allowed).all()
    assert (slope - expected_slope).abs().max() <= 4 * eps


@on_every_variant
def test_gelu_of_what_is_not_finite(variant):
    values = torch.tensor([float("inf"), float("nan"), 1e38, -1e38, 1.0])
    x, one = (placed(each, variant.device) for each in (values.view(-1, 1, 1, 1), torch.ones(1, 1)))
    with variant.active():
        got = pointwise_mlp(x, one, None, one, None).cpu().flatten()
    expected = torch.tensor([float("inf"), float("nan"), 2e38, -1e38, 1.8413447])
    torch.testing.assert_close(got, expected, equal_nan=True)


# What the forward keeps


@on_every_variant
def test_kept_and_recomputed_hidden_activations(variant, kept):
    for dtype in variant.dtypes:
        for shape in CASE.small:
            compare(CASE, variant, *(sample(CASE, shape, dtype, seed) for seed in range(2)))


@on_every_variant
def test_nothing_is_kept_without_gradients(variant, monkeypatch):
    inputs, _ = sample(CASE, CASE.small[0])
    inputs = inputs_on(variant.device, inputs)
    asked = []
    monkeypatch.setattr(MODULE, "keeps_hidden", lambda x: asked.append(x) or True)
    with variant.active(), torch.no_grad():
        pointwise_mlp(**inputs)
    assert not asked


@on_every_variant
def test_a_kept_forward_is_the_same_forward(variant):
    inputs, _ = sample(CASE, CASE.small[1])
    inputs = inputs_on(variant.device, inputs)
    names = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "scale", "shift")
    arguments = [inputs[name] for name in names]
    name = MODULE.TRITON if variant.backend == "triton" else MODULE.NATIVE
    operator = getattr(torch.ops.dsnet_kernels, name)
    with variant.active():
        out, nothing = operator(*arguments, None, False)
        again, hidden = operator(*arguments, None, True)
    assert nothing.numel() == 0
    assert hidden.numel() == MODULE.hidden_size(inputs["x"], inputs["fc1_weight"])
    torch.testing.assert_close(out, again, rtol=0, atol=0)


# Layouts


@on_every_variant
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x[:, :, 1:-1, 2:],
        lambda x: x[::2],
        lambda x: x[:, 3:11],
        lambda x: x.transpose(2, 3),
        lambda x: x[:, :, :1, :1],
        lambda x: x[:, :, :, :1],
    ],
    ids=["window", "images", "channels", "transposed", "pixel", "column"],
)
def test_slices_give_what_their_copies_give(variant, layout):
    inputs, _ = sample(CASE, (4, 6, 7, 16, 24))
    x = layout(inputs["x"])
    width = x.shape[1]
    inputs |= {
        "x": x,
        "fc1_weight": inputs["fc1_weight"][:, :width],
        "fc2_weight": inputs["fc2_weight"][:width],
        "fc2_bias": inputs["fc2_bias"][:width],
        "scale": inputs["scale"][:width],
        "shift": inputs["shift"][:width],
    }
    grad = random(x.shape, x.dtype, generator(1))
    with variant.active():
        got = run(CASE, variant, inputs, [grad])
        copy = inputs | {"x": x.contiguous(memory_format=torch.channels_last)}
        expected = run(CASE, variant, copy, [grad.contiguous(memory_format=torch.channels_last)])
    assert_same_bits(got, expected)


@on_every_variant
def test_results_are_channels_last(variant):
    inputs, grads = sample(CASE, CASE.small[1])
    with variant.active():
        got = run(CASE, variant, inputs | {"x": inputs["x"].contiguous()}, grads)
    for name in ("out0", "grad x"):
        assert got[name].is_contiguous(memory_format=torch.channels_last), name


# Chunks of the backward, and widths


@on_every_variant
@pytest.mark.parametrize(
    "shape", [(1, 1, 16, 1, 1), (1, 3, 11, 1, 40), (2, 2, 3, 33, 2), (1, 10, 27, 5, 7)], ids=str
)
def test_widths_of_any_size(variant, shape, kept):
    compare(CASE, variant, *(sample(CASE, shape, variant.widest, seed) for seed in range(3)))


@on_every_variant
def test_more_tokens_than_one_chunk(variant, kept):
    """The CPU's backward keeps hidden activations of some tokens at a time, here of a third."""
    shape = (1, 25, 52, 8, 1800) if variant.is_compiled else (1, 3, 20, 8, 40)
    compare(CASE, variant, *(sample(CASE, shape, seed=seed) for seed in range(2)))

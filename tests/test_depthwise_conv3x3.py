"""depthwise_conv3x3 on every backend: what it promises beyond any other operation."""

import pytest
import torch
from cases.depthwise_conv3x3 import CASE
from harness import compare, placed, run, sample
from variants import on_variants

from dsnet_kernels import depthwise_conv3x3

on_every_variant = on_variants(CASE.name)


@on_every_variant
@pytest.mark.parametrize("mean", [10, 1000])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_a_norm_that_takes_a_large_mean_away(variant, mean, residual):
    """scale·x and shift cancel, as a BatchNorm's do where the mean is far above the deviation."""
    inputs, grads = sample(CASE, (2, 33, 12, 9))
    scale = inputs["scale"].abs() + 0.5
    scale[:2] = torch.tensor([0.0, 1e-30])
    shift = 0.1 * inputs["shift"] - mean * scale
    changed = {"x": inputs["x"] + mean, "scale": scale, "shift": shift, "residual": residual}
    compare(CASE, variant, (inputs | changed, grads))


@on_every_variant
def test_infinities_and_subnormals_survive(variant):
    for dtype in (torch.float32, variant.half):
        weight = torch.zeros(9, 1, 3, 3, dtype=dtype)
        weight[:, :, 1, 1] = 1
        tiny, infinity = torch.finfo(dtype).smallest_normal / 2, float("inf")
        largest = torch.finfo(dtype).max
        x = torch.tensor([infinity, -infinity, tiny, -tiny, 1, largest, 0, -1, 2], dtype=dtype)
        x = x.view(1, 9, 1, 1)
        with variant.active(), torch.inference_mode():
            out = depthwise_conv3x3(placed(x, variant.device), placed(weight, variant.device))
        assert torch.equal(out.cpu(), x)


@on_every_variant
def test_results_are_channels_last(variant):
    inputs, grads = sample(CASE, (2, 5, 4, 3))
    inputs["x"] = inputs["x"].contiguous()
    with variant.active():
        got = run(CASE, variant, inputs, grads)
    for name in ("out0", "grad x"):
        assert got[name].is_contiguous(memory_format=torch.channels_last)


@on_variants(CASE.name, lambda variant: variant.backend == "cpu")
def test_sums_over_the_wide_rows_of_a_large_image(variant):
    """Gradients of parameters are sums over all pixels; in float they have to be of short ones."""
    compare(CASE, variant, *(sample(CASE, (1, 16, 200, 333), seed=seed) for seed in range(2)))

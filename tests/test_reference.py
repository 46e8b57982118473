"""Each reference operation against its equation in the NumPy oracle."""

import block_oracle as oracle
import numpy as np
import pytest
import torch
from small_network import images
from torch.nn import functional as F

from dsnet_kernels import reference

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def image(channels, height, width, seed=1):
    return images(height, width, channels=channels, seed=seed)


def vectors(*widths, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*np.atleast_1d(w), generator=generator).double() for w in widths]


def close(got, expected):
    np.testing.assert_allclose(got.numpy(), expected, **TOLERANCE)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (7, 5)])
def test_reference_depthwise_conv_pads_after_the_affine(grid, affine, residual):
    x = image(6, *grid)
    weight, bias, scale, shift = vectors((6, 1, 3, 3), 6, 6, 6)
    if not affine:
        scale = shift = None
    z = x.numpy() if scale is None else x.numpy() * scale.numpy()[:, None, None]
    z = z if shift is None else z + shift.numpy()[:, None, None]
    p = {"conv.weight": weight.numpy(), "conv.bias": bias.numpy()}
    expected = oracle.depthwise3x3(z, p, "conv") + (x.numpy() if residual else 0)
    got = reference.depthwise_conv3x3(x, weight, bias, scale=scale, shift=shift, residual=residual)
    close(got, expected)


@pytest.mark.parametrize("given", ["scale", "shift"])
def test_reference_depthwise_conv_takes_half_an_affine(given):
    x, weight, (vector,) = image(4, 5, 6), vectors((4, 1, 3, 3))[0], vectors(4, seed=3)
    full = {"scale": torch.ones(4).double(), "shift": torch.zeros(4).double(), given: vector}
    torch.testing.assert_close(
        reference.depthwise_conv3x3(x, weight, **{given: vector}),
        reference.depthwise_conv3x3(x, weight, **full),
        **TOLERANCE,
    )


@pytest.mark.parametrize("tokens", [1, 9, 50])
@pytest.mark.parametrize("heads", [1, 3])
def test_reference_global_attention_matches_its_equation(tokens, heads):
    width = 12
    (x,) = vectors((2, tokens, width), seed=4)
    names = ("attention.norm.weight", "attention.norm.bias")
    names += ("attention.qkv.weight", "attention.qkv.bias")
    weights = vectors(width, width, (3 * width, width), 3 * width)
    p = {name: tensor.numpy() for name, tensor in zip(names, weights, strict=True)}
    close(
        reference.global_attention(x, heads, *weights),
        oracle.global_stream(x.numpy(), p, heads),
    )


def test_reference_co_attention_matches_its_equation_and_reads_the_incoming_streams():
    local, (tokens,) = image(6, 5, 7), vectors((2, 9, 10), seed=5)
    dim, heads = 8, 2
    shapes = {
        "global_norm.weight": 10,
        "global_norm.bias": 10,
        "local_qkv.weight": (3 * dim, 6),
        "local_qkv.bias": 3 * dim,
        "global_qkv.weight": (3 * dim, 10),
        "global_qkv.bias": 3 * dim,
        "local_proj.weight": (6, dim),
        "local_proj.bias": 6,
        "global_proj.weight": (10, dim),
        "global_proj.bias": 10,
    }
    weights = vectors(*shapes.values())
    scale, shift = vectors(6, 6, seed=6)
    p = {f"co_attention.{n}": w.numpy() for n, w in zip(shapes, weights, strict=True)}
    # scale·x + shift as a BatchNorm of mean 0 and variance 1 − ε.
    p |= {
        "co_attention.local_norm.running_mean": np.zeros(6),
        "co_attention.local_norm.running_var": np.full(6, 1 - oracle.EPS),
        "co_attention.local_norm.weight": scale.numpy(),
        "co_attention.local_norm.bias": shift.numpy(),
    }
    got = reference.co_attention(
        local, tokens, heads, *weights, local_scale=scale, local_shift=shift
    )
    expected = oracle.co_attention(local.numpy(), tokens.numpy(), p, heads)
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("coarse", [(1, 1), (2, 3), (3, 7), (7, 10), (9, 13)])
def test_reference_upsample_concat_is_bilinear_with_the_local_stream_first(coarse):
    local, global_ = image(3, 7, 10), image(5, *coarse, seed=7)
    residual, factors = image(4, 7, 10, seed=8), torch.tensor([0.0, 1.25]).double()
    weight, bias = vectors((4, 8), 4)
    p = {"fuse.weight": weight.numpy(), "fuse.bias": bias.numpy()}
    branch = oracle.fuse(np.zeros(residual.shape), local.numpy(), global_.numpy(), p)
    close(reference.upsample_concat(local, global_, weight, bias), branch)
    close(
        reference.upsample_concat(local, global_, weight, bias, residual, branch_scale=factors),
        residual.numpy() + factors.numpy()[:, None, None, None] * branch,
    )


@pytest.mark.parametrize("grid", [(2, 1), (3, 2), (4, 4)])
def test_downsampling_reads_two_pixels_per_axis_without_antialiasing(grid):
    x = image(3, 17, 9)
    got = F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
    close(got, oracle.bilinear(x.numpy(), grid))
    taps = np.count_nonzero(oracle.interpolation_matrix(17, grid[0]), axis=1)
    assert taps.max() <= 2


def test_reference_pointwise_mlp_matches_its_equation():
    x, factors = image(5, 4, 3), torch.tensor([2.0, 0.5]).double()
    fc1, fc1_bias, fc2, fc2_bias, scale, shift = vectors((11, 5), 11, (5, 11), 5, 5, 5)
    p = {"fc1.weight": fc1.numpy(), "fc1.bias": fc1_bias.numpy()}
    p |= {"fc2.weight": fc2.numpy(), "fc2.bias": fc2_bias.numpy()}
    z = x.numpy() * scale.numpy()[:, None, None] + shift.numpy()[:, None, None]
    branch = oracle.conv1x1(oracle.gelu(oracle.conv1x1(z, p, "fc1")), p, "fc2")
    got = reference.pointwise_mlp(
        x, fc1, fc1_bias, fc2, fc2_bias, scale=scale, shift=shift, branch_scale=factors
    )
    close(got, x.numpy() + factors.numpy()[:, None, None, None] * branch)

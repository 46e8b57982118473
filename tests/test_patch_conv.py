"""Convolutions of patches with packed weights on the CPU, against torch's."""

import pytest
import torch
from harness import assert_within_budget, generator, random
from layouts import channels_first, embedded, every_second, transposed
from torch import nn
from torch.nn import functional as F

import dsnet_kernels
from dsnet.optimized import PatchEmbedding
from dsnet_kernels import PackedCache, native, patch_conv

RAW = torch.ops.dsnet_kernels
DTYPES = (torch.float32, torch.bfloat16)
INTROSPECTION, _ = native.introspection()
CAPABILITIES = INTROSPECTION.cpu_capabilities() if INTROSPECTION is not None else []

pytestmark = pytest.mark.skipif(not CAPABILITIES, reason="the native libraries are not built")

in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Batch, channels, rows, columns, outputs, patch.
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 16, 20, 64, 4),
    (3, 5, 7, 9, 17, 2),
    (1, 64, 14, 14, 130, 2),
    (2, 21, 5, 3, 40, 1),
    (4, 32, 30, 30, 48, 1),
    (1, 16, 11, 6, 33, 5),
]


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    before = INTROSPECTION.cpu_capability()
    INTROSPECTION.set_cpu_capability(request.param)
    yield request.param
    INTROSPECTION.set_cpu_capability(before)


def sample(shape, dtype=torch.float32, seed=0, exact=False):
    batch, channels, height, width, outputs, patch = shape
    numbers = generator(seed)
    x = random((batch, channels, height, width), dtype, numbers, exact)
    weight = random((outputs, channels, patch, patch), dtype, numbers, exact)
    return x, weight, random((outputs,), dtype, numbers, exact)


def convolved(x, weight, bias):
    return F.conv2d(x, weight, bias, stride=weight.shape[2])


@in_both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_on_small_integers(capability, shape, dtype):
    x, weight, bias = sample(shape, dtype, exact=True)
    got = patch_conv(x, weight, bias, PackedCache())
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    expected = convolved(*(each.double() for each in (x, weight, bias))).to(dtype)
    assert torch.equal(got, expected)


@in_both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_budget(capability, shape, dtype):
    got, same_dtype, oracle = {}, {}, {}
    for seed in range(3):
        tensors = sample(shape, dtype, seed)
        got[seed] = patch_conv(*tensors, PackedCache())
        same_dtype[seed] = convolved(*tensors)
        oracle[seed] = convolved(*(each.double() for each in tensors))
    stacked = [{"out": torch.stack([*each.values()])} for each in (got, same_dtype, oracle)]
    assert_within_budget(*stacked)


@in_both_dtypes
@pytest.mark.parametrize(
    "layout",
    [channels_first, transposed, every_second, lambda x: embedded(x, 3, 2)],
    ids=["channels_first", "transposed", "every_second", "embedded"],
)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_layouts_do_not_change_bits(shape, layout, dtype):
    x, weight, bias = sample(shape, dtype)
    expected = patch_conv(x, weight, bias, PackedCache())
    assert torch.equal(patch_conv(layout(x), weight, bias, PackedCache()), expected)


def test_parameters_of_any_layout_and_a_wider_bias():
    x, weight, bias = sample(SHAPES[3], torch.bfloat16)
    expected = patch_conv(x, weight, bias, PackedCache())
    other = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(patch_conv(x, other, bias.float(), PackedCache()), expected)


def test_pixels_behind_the_last_patch_count_for_nothing():
    x, weight, bias = sample((2, 3, 9, 11, 8, 4))
    expected = patch_conv(x, weight, bias, PackedCache())
    assert expected.shape == (2, 8, 2, 2)
    x[:, :, 8:] = torch.nan
    x[:, :, :, 8:] = torch.nan
    assert torch.equal(patch_conv(x, weight, bias, PackedCache()), expected)


def test_empty_batches_pass():
    x, weight, bias = sample((0, 3, 8, 8, 5, 4))
    assert patch_conv(x, weight, bias, PackedCache()).shape == (0, 5, 2, 2)


def test_a_changed_weight_is_packed_again():
    x, weight, bias = sample(SHAPES[2])
    cache = PackedCache()
    patch_conv(x, weight, bias, cache)
    weight.mul_(2)
    bias.add_(1)
    torch.testing.assert_close(
        patch_conv(x, weight, bias, cache), convolved(x, weight, bias), rtol=1e-5, atol=1e-5
    )


def test_opcheck():
    x, weight, bias = sample(SHAPES[2])
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    torch.library.opcheck(RAW.patch_conv_pack, (matrix, bias))
    torch.library.opcheck(RAW.patch_conv_pack, (matrix, None))
    packed = RAW.patch_conv_pack(matrix, bias)
    torch.library.opcheck(RAW.patch_conv, (x, packed, 17, 2))


@pytest.mark.parametrize(
    ("x", "size", "outputs", "patch", "message"),
    [
        (torch.zeros(3, 8, 8), 208, 5, 2, r"x: expected shape \(B, C, H, W\)"),
        (torch.zeros(1, 3, 8, 8), 208, 0, 2, "outputs: expected at least 1, got 0"),
        (torch.zeros(1, 3, 8, 8), 208, 5, 9, "patch: expected a side within"),
        (torch.zeros(1, 3, 8, 8), 208, 5, 0, "patch: expected a side within"),
        (torch.zeros(1, 3, 8, 8), 207, 5, 2, r"packed: expected shape \(208\)"),
        (torch.zeros(1, 3, 8, 8).double(), 208, 5, 2, "packed: expected Double"),
        (torch.zeros(1, 3, 8, 8).half(), 208, 5, 2, "x: expected float32, bfloat16 or float64"),
    ],
)
def test_bad_arguments(x, size, outputs, patch, message):
    with pytest.raises(RuntimeError, match=message):
        RAW.patch_conv(x, torch.zeros(size), outputs, patch)


def test_bad_weights():
    with pytest.raises(RuntimeError, match=r"weight: expected shape \(O, K\)"):
        RAW.patch_conv_pack(torch.zeros(3), None)
    with pytest.raises(RuntimeError, match="weight: expected at least one row and column"):
        RAW.patch_conv_pack(torch.zeros(0, 3), None)
    with pytest.raises(RuntimeError, match=r"bias: expected shape \(2\)"):
        RAW.patch_conv_pack(torch.zeros(2, 3), torch.zeros(3))


# The module


def embedding(backend=None, **kwargs):
    source = nn.Conv2d(3, 8, 4, 4, **kwargs)
    return source, PatchEmbedding(source, backend)


def test_module_runs_the_operator_where_it_serves(monkeypatch):
    calls = []
    monkeypatch.setattr(
        dsnet_kernels, "patch_conv", lambda *args: calls.append(args) or patch_conv(*args)
    )
    source, module = embedding()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(module(x), source(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 1
    with pytest.raises(RuntimeError):
        module(x[:, :, :3])
    source, module = embedding("reference")
    assert torch.equal(module(x), source(x))
    x.requires_grad_()
    _, module = embedding()
    module(x).sum().backward()
    assert x.grad is not None
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("module", "stands"),
    [
        (nn.Conv2d(3, 8, 4, 4), True),
        (nn.Conv2d(3, 8, 4, 2), False),
        (nn.Conv2d(3, 8, (4, 2), (4, 2)), False),
        (nn.Conv2d(3, 8, 4, 4, padding=1), False),
        (nn.Conv2d(4, 8, 4, 4, groups=2), False),
        (nn.Conv2d(3, 8, 4, 4, bias=False), False),
        (nn.Identity(), False),
    ],
)
def test_module_stands_for_convolutions_of_patches(module, stands):
    assert PatchEmbedding.stands_for(module) is stands

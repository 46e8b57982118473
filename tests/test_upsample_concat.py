"""upsample_concat beyond what every operation is held to: grids, positions, memory, choice."""

import pytest
import torch
from cases.upsample_concat import CASE
from harness import compare, placed, run, sample
from peak_memory import printed_by
from torch.nn import functional as F
from variants import on_variants

import dsnet_kernels
from dsnet_kernels import BackendUnavailable, upsample_concat

on_every_variant = on_variants(CASE.name)


# Grids


@on_every_variant
@pytest.mark.parametrize(
    ("grid", "coarse"),
    [
        ((1, 1), (1, 1)),
        ((1, 1), (3, 5)),
        ((5, 3), (1, 1)),
        ((3, 3), (7, 7)),
        ((2, 9), (7, 4)),
        ((6, 31), (6, 31)),
        ((16, 58), (2, 7)),
    ],
    ids=str,
)
def test_any_ratio_of_grids(variant, grid, coarse):
    shape = (2, *grid, *coarse, 6, 10, 17)
    compare(CASE, variant, *(sample(CASE, shape, variant.widest, seed) for seed in range(3)))


@on_every_variant
def test_a_detection_grid(variant):
    """8 rows to a coarse one, and 8.12 columns, which so repeat no position between two."""
    fine, coarse = ((200, 333), (25, 41)) if variant.is_compiled else ((24, 41), (3, 5))
    shape = (1, *fine, *coarse, 8, 8, 16)
    compare(CASE, variant, *(sample(CASE, shape, seed=seed) for seed in range(2)))


@on_every_variant
@pytest.mark.parametrize(("fine", "coarse"), [(56, 7), (41, 25), (7, 7), (3, 7), (50, 1)])
def test_source_positions_are_torchs(variant, fine, coarse):
    """An identity for the weight leaves the upsampled stream alone; a ramp shows its positions."""
    dtype = variant.widest
    for grid, size in (((coarse, 1), (fine, 2)), ((1, coarse), (2, fine))):
        ramp = torch.arange(coarse, dtype=dtype).view(1, 1, *grid).expand(1, 8, *grid)
        local = torch.ones(1, 8, *size, dtype=dtype)
        weight = torch.cat([torch.zeros(8, 8), torch.eye(8)], dim=1).to(dtype)
        expected = F.interpolate(ramp.double(), size=size, mode="bilinear", align_corners=False)
        arguments = [placed(each, variant.device) for each in (local, ramp, weight)]
        with variant.active():
            out = upsample_concat(*arguments, None).cpu()
        tolerance = 8 * torch.finfo(dtype).eps * coarse
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


# Layout


@on_every_variant
def test_results_are_channels_last(variant):
    inputs, grads = sample(CASE, CASE.small[1])
    plain = inputs | {name: inputs[name].contiguous() for name in CASE.activations}
    with variant.active():
        got = run(CASE, variant, plain, grads)
    for name in ("out0", "grad local", "grad global_"):
        assert got[name].is_contiguous(memory_format=torch.channels_last), name


# Memory and choice

PEAK = """
def run(size):
    def pixels(channels, size):
        # In its layout at once: a copy on the way would be part of the peak before.
        empty = torch.empty(1, channels, size, size, memory_format=torch.channels_last)
        return empty.uniform_().requires_grad_()
    local, global_, residual, grad = pixels(8, size), pixels(8, 8), pixels(8, size), pixels(8, size)
    weight, bias = torch.randn(8, 16), torch.randn(8)
    before = peak()
    out = dsnet_kernels.upsample_concat(local, global_, weight, bias, residual, backend="{backend}")
    between = peak()
    torch.autograd.grad(out, [local, global_], grad)
    after = peak()
    return between - before, after - between
run(8)
print(*run(1024))
"""
MAP = 8 * 1024**2 * 4 // 1024
"""KiB of one map of 8 channels."""


def peaks(backend, folder):
    """KiB that the forward, and then the backward, add to the peak."""
    return printed_by(PEAK.format(backend=backend), folder)


@pytest.mark.skipif(dsnet_kernels.native.CPU.refusal is not None, reason="needs the CPU's library")
def test_neither_the_upsampled_map_nor_the_concatenation_is_in_memory(tmp_path):
    """The kernel adds its results and little more; the reference shows what they would take."""
    forward, backward = peaks("cpu", tmp_path)
    plain_forward, _ = peaks("reference", tmp_path)
    print(f"{forward} and {backward} KiB, the reference {plain_forward}, a map {MAP}")
    assert MAP <= forward < 1.25 * MAP
    assert MAP <= backward < 1.25 * MAP
    assert plain_forward > 3.5 * MAP


@pytest.mark.parametrize(
    ("local", "global_", "reason"),
    [(0, 8, "local is empty"), (8, 0, "global_ has no channels")],
    ids=["no local", "no global"],
)
def test_one_stream_alone_is_the_references(local, global_, reason):
    streams = torch.randn(2, local, 4, 6), torch.randn(2, global_, 2, 3)
    explanation = dsnet_kernels.explain(CASE.name, *streams)
    assert explanation.chosen == "reference"
    assert explanation.refusals["cpu"].startswith(reason)
    with pytest.raises(BackendUnavailable, match=reason):
        upsample_concat(*streams, torch.randn(8, 8), None, backend="cpu")


@pytest.mark.skipif(dsnet_kernels.native.CPU.refusal is not None, reason="needs the CPU's library")
def test_auto_takes_the_kernel_on_the_cpu():
    streams = torch.randn(2, 3, 4, 6), torch.randn(2, 5, 2, 3)
    assert dsnet_kernels.explain(CASE.name, *streams).chosen == "cpu"

"""The CUDA kernels of ``upsample_concat``, run in the emulator."""

import emulated
import emulator_build
import pytest
import torch
from cases.upsample_concat import CASE
from harness import assert_same_bits, compare, exact_results, generator, random, sample
from torch.nn import functional as F
from variants import GPU_DTYPES, Variant

forward, backward = emulated.functions("upsample_concat")
EMULATED = Variant("upsample_concat", "cuda", stand_in="emulated")
# Both sides of the limits of a tile of 64 rows, 64 columns and 32 of depth; grids that are equal,
# coarser and finer than the pixels; widths that are no multiple of 8.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 7, 9, 3, 4, 32, 40, 64),
    (1, 5, 13, 5, 13, 40, 32, 72),
    (3, 3, 4, 5, 7, 72, 64, 8),
    (2, 11, 3, 2, 1, 33, 35, 65),
    (1, 9, 2, 4, 3, 7, 136, 16),
]
NAMES = ("local", "global_", "weight", "bias")


@pytest.fixture(scope="module")
def emulator():
    return emulator_build.load("upsample_concat")


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_in_float64(shape, dtype):
    option = {"factors": True}
    compare(CASE, EMULATED, *(sample(CASE, shape, dtype, i, option=option) for i in range(2)))


def results(inputs, grads, **options):
    """Output and gradients by name, those of weight and bias in float32."""
    streams = (inputs["local"], inputs["global_"], inputs["weight"])
    out = forward(*streams, inputs["bias"], inputs["residual"], None, **options)
    found = backward(*grads, *streams, None, **options)
    return {"out0": out} | {f"grad {name}": g for name, g in zip(NAMES, found, strict=True)}


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("slots", "pixels", "cells"), [(1, 128, 32), (3, 60, 11), (4, 33, 8), (40, 4, 1)]
)
def test_sums_over_slots_of_any_size_are_exact(slots, pixels, cells, dtype):
    """Among them slots behind the last cell."""
    inputs, grads = sample(CASE, (2, 8, 8, 4, 4, 8, 72, 16), dtype, exact=True)
    fields = {"slots": slots, "pixels_of_slot": pixels, "cells_of_slot": cells}
    found = results(inputs, grads, **fields)
    exact = exact_results(CASE, inputs, grads)
    assert_same_bits(found, {name: exact[name].to(found[name].dtype) for name in found})


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_results_do_not_depend_on_the_order_of_threads(dtype):
    inputs, grads = sample(CASE, (2, 9, 8, 2, 3, 40, 8, 24), dtype)
    expected = results(inputs, grads, seed=100)
    for seed in range(3):
        assert_same_bits(results(inputs, grads, seed=seed), expected)


@pytest.mark.parametrize(
    ("grid", "cells"),
    [
        ((1, 1), (1, 1)),
        ((7, 6), (7, 6)),
        ((14, 1), (7, 1)),
        ((1, 56), (1, 7)),
        ((1, 83), (1, 41)),
        ((7, 3), (3, 2)),
        ((9, 5), (1, 1)),
        ((3, 1), (10, 1)),
        ((2, 3), (5, 7)),
        ((3, 5), (5, 2)),
    ],
    ids=str,
)
def test_gradient_gathers_with_the_weights_of_the_forward(grid, cells):
    """One image per cell, then one per pixel, shows each weight by itself; both are bit-equal."""
    pixel_count, cell_count = grid[0] * grid[1], cells[0] * cells[1]
    weight = torch.tensor([[0.0, 1.0]])

    def images(count, extents):
        return torch.eye(count)[:, :count].reshape(count, 1, *extents)

    local = torch.zeros(cell_count, 1, *grid)
    out = forward(local, images(cell_count, cells), weight, None, None, None)
    expected = F.interpolate(images(cell_count, cells), size=grid, mode="bilinear")
    torch.testing.assert_close(out, expected)

    local = torch.zeros(pixel_count, 1, *grid)
    coarse = torch.zeros(pixel_count, 1, *cells)
    _, gathered, _, _ = backward(images(pixel_count, grid), local, coarse, weight, None)
    assert torch.equal(gathered.flatten(1), out.flatten(1).t())


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_equal_grids_are_not_resampled(dtype):
    """With W = [0, 1] the output is the global stream itself."""
    values = random((2, 8, 5, 6), dtype, generator(0))
    weight = torch.cat([torch.zeros(8, 8), torch.eye(8)], dim=1)
    out = forward(torch.zeros_like(values), values, weight, None, None, None)
    assert torch.equal(out, values)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1, 1, 1),
        (256, 56, 56, 7, 7, 32, 32, 64),
        (256, 14, 14, 7, 7, 160, 160, 320),
        (256, 7, 7, 7, 7, 256, 256, 512),
        (1, 200, 333, 25, 41, 32, 32, 64),
        (70_000, 3, 5, 9, 2, 17, 1, 130),
        (2, 2**31 - 1, 1, 1, 1, 8, 8, 8),
        (1, 1, 1, 2**15, 2**15, 8, 8, 8),
    ],
    ids=str,
)
def test_launches_cover_every_value_within_the_limits_of_a_grid(emulator, shape):
    batch, height, width, rows, columns, local, global_, channels = shape
    pixels, cells = batch * height * width, batch * rows * columns
    for launch in emulator.launches(shape, emulator.Storage.bfloat16, 0):
        assert launch.pixel_blocks * launch.block_rows >= pixels
        assert launch.cell_blocks * launch.block_rows >= cells
        assert launch.mixed_blocks * launch.block_columns >= channels
        assert launch.local_blocks * launch.block_columns >= local
        assert launch.global_blocks * launch.block_columns >= global_
        assert launch.gather_rows % launch.lanes == 0
        assert launch.gather_blocks * launch.gather_rows >= cells * launch.lanes
        assert launch.gather_groups * launch.gather_packs * launch.pack >= channels
        assert launch.slots * launch.pixels_of_slot >= pixels
        assert launch.slots * launch.cells_of_slot >= cells
        widest = max(launch.mixed_blocks, launch.local_blocks, launch.global_blocks)
        assert max(launch.pixel_blocks, launch.cell_blocks) * widest < 2**31
        assert launch.gather_blocks * launch.gather_groups < 2**31
        assert launch.slots * launch.mixed_blocks * widest < 2**31
        assert f"slots {launch.slots}" in launch.text


@pytest.mark.parametrize(
    ("channels", "address", "packed"),
    [((8, 16, 24), 0, True), ((8, 16, 24), 8, False), ((8, 16, 20), 0, False)],
)
def test_access_is_as_wide_as_channels_and_alignment_allow(emulator, channels, address, packed):
    sizes = (1, 5, 5, 2, 2, *channels)
    for launch in emulator.launches(sizes, emulator.Storage.bfloat16, address):
        assert launch.packed == packed
        assert launch.pack == (8 if packed else 1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 2**31, 1, 1, 1, 8, 8, 8), "2147483647 rows, columns and channels"),
        ((1, 1, 1, 2**20, 2**20, 8, 8, 8), "2147483647 blocks of 64 pixels and 64 channels"),
        ((2**31, 9, 9, 3, 3, 8, 8, 8), "2147483647 blocks of 64 pixels and 64 channels"),
    ],
)
def test_more_than_a_grid_holds_is_refused(emulator, shape, message):
    with pytest.raises(ValueError, match=f"local: expected at most {message}"):
        emulator.launches(shape, emulator.Storage.float32, 0)

"""The CUDA kernels of ``pointwise_mlp``, run in the emulator."""

import emulated
import emulator_build
import pytest
import torch
from cases.pointwise_mlp import CASE
from harness import (
    assert_same_bits,
    assert_within_budget,
    evaluate,
    exact_results,
    sample,
)
from variants import GPU_DTYPES

forward, backward = emulated.functions("pointwise_mlp")
HALVES = (torch.bfloat16, torch.float16)
# Batch, height, width, C, R: both sides of the limits of a block's 64 or 128 rows and columns, of
# 32 of depth, and of the widths of the fused kernel; widths that are no multiple of 8.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 9, 15, 64, 72),
    (2, 3, 11, 72, 32),
    (3, 4, 11, 128, 136),
    (1, 8, 8, 136, 128),
    (2, 5, 7, 33, 65),
    (1, 3, 43, 129, 31),
]
NAMES = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "scale", "shift")


@pytest.fixture(scope="module")
def emulator():
    return emulator_build.load("pointwise_mlp")


def results(inputs, grads, keep_hidden=True, seed=0, forward_fields=None, backward_fields=None):
    """Output and gradients by name, those of parameters in the dtype of x."""
    x, *parameters = (inputs.get(name) for name in NAMES)
    factors = inputs.get("branch_scale")
    fields = forward_fields or {}
    out, hidden = forward(x, *parameters, factors, keep_hidden, seed=seed, **fields)
    fc1_weight, fc1_bias, fc2_weight, _, scale, shift = parameters
    saved = (x, hidden if keep_hidden else None, fc1_weight, fc1_bias, fc2_weight)
    fields = backward_fields or {}
    found = backward(*grads, *saved, scale, shift, factors, seed=seed, **fields)
    named = dict(zip(NAMES, found, strict=True))
    return {"out0": out} | {
        f"grad {name}": named[name].to(x.dtype) for name in NAMES if inputs.get(name) is not None
    }


def assert_agrees(samples, **options):
    """Results of all samples together against the reference in float64."""
    kinds = ([], [], [])
    for inputs, grads in samples:
        found = results(inputs, grads, **options)
        for kind, each in zip(
            kinds,
            (found, evaluate(CASE.reference, inputs, grads), exact_results(CASE, inputs, grads)),
            strict=True,
        ):
            kind.append({name: each[name] for name in found})
    assert_within_budget(
        *({name: torch.stack([each[name] for each in kind]) for name in kind[0]} for kind in kinds)
    )


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("keep_hidden", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_in_float64(shape, keep_hidden, dtype):
    option = {"factors": True}
    samples = [sample(CASE, shape, dtype, seed, option=option) for seed in range(2)]
    assert_agrees(samples, keep_hidden=keep_hidden)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("keep_hidden", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("option", [{"affine": False}, {"bias": False}], ids=str)
def test_absent_parameters(option, keep_hidden, dtype):
    samples = [sample(CASE, (2, 3, 5, 16, 40), dtype, seed, option=option) for seed in range(2)]
    assert_agrees(samples, keep_hidden=keep_hidden)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_narrow_tokens_through_memory_agree(dtype):
    """What a GPU does where the hidden activations are kept, without keeping them."""
    samples = [sample(CASE, (1, 7, 10, 40, 48), dtype, seed) for seed in range(2)]
    fields = {"fused": False}
    slots = {"tokens_of_slot": 64, "hidden_slots": 2}
    assert_agrees(samples, keep_hidden=False, forward_fields=fields, backward_fields=fields | slots)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(3, 9, 15, 136, 200), (1, 3, 43, 35, 129)], ids=str)
def test_large_blocks_agree(shape, dtype):
    samples = [sample(CASE, shape, dtype, i, option={"factors": True}) for i in range(2)]
    slots = -(-shape[0] * shape[1] * shape[2] // 128)
    assert_agrees(
        samples,
        forward_fields={"large_hidden": True, "large_out": True},
        backward_fields={"large_hidden": True, "hidden_slots": slots, "tokens_of_slot": 128},
    )


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("keep_hidden", [False, True], ids=["recomputed", "kept"])
def test_slabs_change_nothing_but_the_order_of_the_weights_sums(keep_hidden, dtype):
    inputs, grads = sample(CASE, (3, 7, 13, 24, 40), dtype, option={"factors": True})
    memory = {"fused": False, "tokens_of_slot": 64, "hidden_slots": 5}
    whole = results(inputs, grads, keep_hidden, 0, memory, memory)
    slabs = memory | {"slab_tokens": 128, "slabs": 3}
    cut = results(inputs, grads, keep_hidden, 0, slabs, slabs)
    for name in ("grad fc1_weight", "grad fc2_weight"):
        torch.testing.assert_close(cut.pop(name), whole.pop(name))
    assert_same_bits(cut, whole)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("slots", "tokens"), [(1, 288), (3, 96), (9, 32)])
@pytest.mark.parametrize("widths", [(24, 136), (72, 72)], ids=str)
def test_sums_over_slots_of_any_size_agree(widths, slots, tokens, dtype):
    """The last slot's tokens are not all there."""
    samples = [
        sample(CASE, (3, 7, 13, *widths), dtype, i, option={"factors": True}) for i in (0, 1)
    ]
    fields = {"hidden_slots": slots, "tokens_of_slot": tokens}
    assert_agrees(samples, keep_hidden=False, backward_fields=fields)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("keep_hidden", [False, True], ids=["recomputed", "kept"])
def test_results_do_not_depend_on_the_order_of_threads(keep_hidden, dtype):
    inputs, grads = sample(CASE, (2, 9, 8, 72, 40), dtype, option={"factors": True})
    expected = results(inputs, grads, keep_hidden, seed=100)
    for seed in range(3):
        assert_same_bits(results(inputs, grads, keep_hidden, seed=seed), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_stays_in_its_image_where_fused(dtype):
    inputs, _ = sample(CASE, (3, 5, 7, 24, 40), dtype)
    values = [inputs[name] for name in NAMES]
    clean, _ = forward(*values, None, False)
    spoilt = values[0].clone()
    spoilt[1] = float("nan")
    out, _ = forward(spoilt, *values[1:], None, False)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


# The checks themselves


def test_a_missing_slab_is_noticed():
    inputs, grads = sample(CASE, (3, 7, 13, 24, 40))
    fields = {"slab_tokens": 128, "slabs": 2}
    with pytest.raises(AssertionError, match="some values of result 0 are unwritten"):
        results(inputs, grads, forward_fields=fields)
    with pytest.raises(RuntimeError, match=r"nobody wrote byte .* of allocation"):
        results(inputs, grads, backward_fields=fields)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda hidden: hidden.flip(0),
        lambda hidden: hidden.relu(),
        lambda hidden: hidden.unflatten(0, (-1, 40)).roll(1, 1).flatten(),
    ],
    ids=["order", "negative", "channel"],
)
def test_wrong_hidden_activations_are_noticed(spoil):
    inputs, grads = sample(CASE, (2, 4, 8, 24, 40))
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift = (inputs[n] for n in NAMES)
    _, hidden = forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, None, True)
    saved = (x, spoil(hidden), fc1_weight, fc1_bias, fc2_weight, scale, shift, None)
    found = backward(*grads, *saved)
    oracle, same_dtype = exact_results(CASE, inputs, grads), evaluate(CASE.reference, inputs, grads)
    for name, value in zip(NAMES, found, strict=True):
        if name == "fc2_bias":
            continue
        key = f"grad {name}"
        with pytest.raises(AssertionError, match=f"^{key}: "):
            assert_within_budget({key: value}, {key: same_dtype[key]}, {key: oracle[key]})


# GELU of 16-bit activations


def test_gelu_of_16_bits_is_exact_far_below_their_rounding(emulator):
    u = torch.linspace(-9, 9, 3001, dtype=torch.float64).float().double().requires_grad_()
    exact = torch.nn.functional.gelu(u)
    (slope,) = torch.autograd.grad(exact.sum(), u)
    found = torch.tensor([emulator.gelu(value) for value in u.tolist()], dtype=torch.float64)
    assert (found[:, 0] - exact).abs().max() < 4e-6
    assert (found[:, 1] - exact).abs().max() < 3e-5
    assert (found[:, 2] - slope).abs().max() < 4e-6


@pytest.mark.parametrize("u", [-65504.0, -300.0, 300.0, 65504.0])
def test_gelu_of_16_bits_at_its_ends(emulator, u):
    expected = max(u, 0.0)
    assert emulator.gelu(u) == (expected, expected, float(u > 0))


def test_gelu_of_16_bits_keeps_nan(emulator):
    assert torch.tensor(emulator.gelu(float("nan"))).isnan().all()


# Launches


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (256, 56, 56, 64, 256),
        (256, 14, 14, 320, 1280),
        (256, 7, 7, 512, 2048),
        (1, 200, 333, 64, 256),
        (70_000, 2, 1, 3, 5),
        (2**20, 56, 56, 8, 8),
        (1, 2, 3, 2**31 - 1, 1),
        (2, 300, 300, 1, 2**31 - 1),
    ],
    ids=str,
)
def test_launches_cover_every_token_within_the_limits_of_a_grid(emulator, shape):
    batch, height, width, channels, hidden = shape
    tokens = batch * height * width
    for storage in (emulator.Storage.bfloat16, emulator.Storage.float32):
        for kept in (0, 16):
            for launch in emulator.launches(shape, storage, 0, kept):
                assert launch.slab_tokens % launch.large_rows == 0
                slabs = [launch.slab(i) for i in {0, launch.slabs - 1}]
                assert sum(slabs[-1]) == tokens
                assert all(0 < count <= launch.slab_tokens for _, count in slabs)
                most = max(launch.slab_tokens * max(channels, hidden), 1)
                assert most <= max(2**24, 128 * max(channels, hidden))
                slots = launch.hidden_slots
                assert (slots - 1) * launch.tokens_of_slot < tokens <= slots * launch.tokens_of_slot
                blocks = -(-hidden // launch.fused_hidden)
                assert not launch.fused or slots * blocks < 2**31
                assert launch.channel_slots * launch.channel_rows >= tokens
                assert -(-tokens // launch.fused_tokens) < 2**31
                columns = -(-max(channels, hidden) // 64)
                assert launch.slab_tokens // 64 * columns < 2**31
                assert ("fused" if launch.fused else f"slabs {launch.slabs}") in launch.text


def test_narrow_tokens_of_16_bits_are_fused_where_nothing_is_kept(emulator):
    half, single = emulator.Storage.float16, emulator.Storage.float32
    for channels, storage, hidden, fused in (
        (128, half, 0, True),
        (136, half, 0, False),
        (128, single, 0, False),
        (128, half, 16, False),
    ):
        first, second = emulator.launches((1, 7, 7, channels, 64), storage, 0, hidden)
        assert first.fused == fused
        assert second.fused == fused


def test_large_blocks_are_for_kept_activations_of_large_shapes(emulator):
    large, small = (256, 14, 14, 320, 1280), (1, 14, 14, 320, 1280)
    half, single = emulator.Storage.bfloat16, emulator.Storage.float32
    for shape, storage, hidden, expected in (
        (large, half, 16, (True, True)),
        (large, half, 0, (True, False)),
        (small, half, 16, (False, False)),
        (large, single, 16, (False, False)),
    ):
        found = emulator.launches(shape, storage, 0, hidden)
        assert tuple(launch.large_hidden for launch in found) == expected


@pytest.mark.parametrize(
    ("widths", "address", "packed"),
    [((16, 24), 0, True), ((16, 24), 8, False), ((16, 20), 0, False), ((20, 16), 0, False)],
)
def test_access_is_as_wide_as_channels_and_alignment_allow(emulator, widths, address, packed):
    for launch in emulator.launches((1, 5, 5, *widths), emulator.Storage.bfloat16, address, 0):
        assert launch.packed == packed


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 1, 8, 2**31), "fc1_weight: expected at most 2147483647 rows and columns"),
        ((2**36, 2, 2, 8, 8), "x: expected at most 137438953472 pixels"),
    ],
)
def test_more_than_a_grid_holds_is_refused(emulator, shape, message):
    with pytest.raises(ValueError, match=message):
        emulator.launches(shape, emulator.Storage.float32, 0, 0)


def test_padding_of_hidden_activations_is_not_read():
    """Of 15 tokens the sixteenth's are NaN; in the emulator they could not even be loaded."""
    inputs, grads = sample(CASE, (1, 3, 5, 8, 16))
    values = [inputs[name] for name in NAMES]
    _, hidden = forward(*values, None, True)
    assert hidden.shape == (16 * 16,)
    assert hidden[15 * 16 :].isnan().all()
    found = results(inputs, grads)
    assert all(value.isfinite().all() for value in found.values())

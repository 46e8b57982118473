"""The emulator runs CUDA kernels as a GPU would, and reports those that a GPU would let pass."""

import re

import emulator_build
import numpy as np
import pytest
import torch

SEEDS = range(6)
FULL_WARP = np.arange(32)

# What must be reported for each planted fault.
REPORTS = {
    "missing_barrier": "unwritten load|race: load",
    "missing_barrier_between_rounds": "race: (load|store)",
    "missing_warp_barrier": "unwritten load|race: load",
    "missing_wait": "asynchronous copy to byte .* has not been waited for|unwritten load",
    "short_wait": "asynchronous copy to byte .* has not been waited for|unwritten load",
    "missing_barrier_after_wait": "unwritten load|race: load|has not been waited for",
    "barrier_in_a_branch": r"divergent barrier: .*line \d+ while thread \(\d+, 0, 0\) has returned",
    "return_before_barrier": r"divergent barrier: .*while thread \(5, 0, 0\) has returned",
    "two_barriers_for_one": r"divergent barrier: at __syncthreads of line \d+ while",
    "store_past_the_end": r"thread \(0, 0, 0\): out-of-bounds store .* offset 256 from out",
    "shared_store_past_the_end": r"thread \(63, 0, 0\): out-of-bounds store .* in shared",
    "dynamic_shared_past_the_end": r"thread \(63, 0, 0\): out-of-bounds store .* in shared",
    "store_to_an_input": "store of 4 bytes in global memory: in is read-only",
    "unwritten_shared_read": r"thread \(63, 0, 0\): unwritten load .* nobody wrote byte 0 ",
    "unwritten_global_read": r"unwritten load .* nobody wrote byte \d+ of out",
    "load_of_what_the_kernel_stores": r"unordered load .* this launch wrote byte \d+ of out",
    "two_stores_to_one_place": r"second store .* this launch already wrote byte \d+ of out",
    "misaligned_vector_load": "misaligned load of 16 bytes .* got 12 bytes past",
    "lanes_that_never_come": r"shuffle with mask 0xffffffff is never reached by thread \(",
    "mask_without_the_caller": "shuffle: mask 0xffff lacks the calling lane",
    "source_outside_the_mask": "shuffle_xor: reads lane .* not in the mask",
    "mismatched_shuffles": "mismatched warp primitives: shuffle_(down|xor)",
    "product_in_two_branches": (
        r"mismatched warp primitives: mma\S+ of line \d+ .* waits at mma\S+ of line \d+"
    ),
    "rows_in_the_same_banks": "bank conflict: ldmatrix reads the rows of matrix 0 in 8 passes",
}


@pytest.fixture(scope="module")
def emulator():
    return emulator_build.load("selftest")


def run(module, kernel, inputs, out_dtype, out_shape, *arguments):
    """kernel(*input addresses, *arguments, out address); the output as an array."""
    buffers = [module.Buffer(f"input {i}", np.ascontiguousarray(a)) for i, a in enumerate(inputs)]
    count = int(np.prod(out_shape))
    out = module.Buffer("out", count * np.dtype(out_dtype).itemsize)
    kernel(*(buffer.address for buffer in buffers), *arguments, out.address)
    assert out.written.all()
    return out.bytes.view(out_dtype).reshape(out_shape)


def reverse(module, name, fault):
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    source, out = module.Buffer("in", values), module.Buffer("out", 256)
    module.reverse(name, fault, source.address, out.address)
    np.testing.assert_array_equal(out.bytes.view(np.float32), values[::-1])


def test_every_planted_fault_has_an_expected_report(emulator):
    assert sorted(REPORTS) == sorted(emulator.reversals)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", REPORTS)
def test_a_planted_fault_is_reported_with_kernel_block_and_thread(emulator, name, seed):
    emulator.set_seed(seed)
    with pytest.raises(emulator.Error, match=REPORTS[name]) as caught:
        reverse(emulator, name, fault=True)
    place = rf"kernel {name}, block \(0, 0, 0\), thread \(\d+, 0, 0\): "
    assert re.match(place, str(caught.value))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", REPORTS)
def test_without_the_fault_the_kernel_passes(emulator, name, seed):
    emulator.set_seed(seed)
    reverse(emulator, name, fault=False)


def test_a_kernel_runs_correctly_after_one_that_failed(emulator):
    for _ in range(3):
        with pytest.raises(emulator.Error):
            reverse(emulator, "barrier_in_a_branch", fault=True)
        reverse(emulator, "barrier_in_a_branch", fault=False)


def order(module, seed, blocks=4, threads=96):
    module.set_seed(seed)
    count = blocks * threads
    source = module.Buffer("in", np.arange(count, dtype=np.int32))
    out = module.Buffer("out", 4 * count)
    module.order_of_threads(source.address, out.address, blocks, threads)
    return out.bytes.view(np.int32)


def test_a_seed_repeats_its_order_of_blocks_and_threads(emulator):
    np.testing.assert_array_equal(order(emulator, 3), order(emulator, 3))


def test_seeds_differ_in_the_order_of_blocks_warps_and_lanes(emulator):
    orders = [order(emulator, seed) for seed in range(8)]
    for run_order in orders:
        np.testing.assert_array_equal(np.sort(run_order), np.arange(4 * 96))
    assert len({tuple(o // 96) for o in orders}) > 1
    assert len({tuple(o // 32) for o in orders}) > 1
    assert len({tuple(o % 32) for o in orders}) == len(orders)


def test_a_launch_on_another_stream_than_the_current_device_has_is_refused(emulator):
    emulator.launch_on(16, 16)
    try:
        with pytest.raises(emulator.Error, match="kernel on_a_stream: launched on another stream"):
            emulator.launch_on(0, 16)
    finally:
        emulator.launch_on(0, 0)


@pytest.mark.parametrize(
    ("blocks", "threads", "what"), [(1, 1025, "threads per block"), (0, 32, "one")]
)
def test_a_launch_outside_the_limits_is_refused(emulator, blocks, threads, what):
    with pytest.raises(emulator.Error, match=f"kernel order_of_threads: .*{what}"):
        order(emulator, 0, blocks, threads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("kind", ["index", "up", "down", "xor"])
def test_shuffles_read_the_lane_of_their_definition(emulator, kind, width, dtype):
    rng = np.random.default_rng(width)
    values = rng.standard_normal(32).astype(dtype)
    operands = rng.integers(0, width, 32).astype(np.uint32)
    out = run(
        emulator,
        lambda values, operands, out: emulator.shuffles(
            ["index", "up", "down", "xor"].index(kind),
            values,
            operands,
            width,
            out,
            np.dtype(dtype).itemsize,
        ),
        [values, operands],
        dtype,
        32,
    )
    begin, by = FULL_WARP // width * width, operands.astype(int)
    source = {
        "index": begin + by % width,
        "up": np.where(FULL_WARP - by >= begin, FULL_WARP - by, FULL_WARP),
        "down": np.where(FULL_WARP + by < begin + width, FULL_WARP + by, FULL_WARP),
        "xor": FULL_WARP ^ by,
    }[kind]
    np.testing.assert_array_equal(out, values[source])


@pytest.mark.parametrize("width", [32, 8])
def test_votes_and_reductions(emulator, width):
    values = np.random.default_rng(width).integers(-6, 7, 32).astype(np.int32)
    out = run(emulator, emulator.votes, [values], np.int32, (32, 5), width)
    bits = (values > 0).astype(np.int64) << FULL_WARP
    halves = np.where(FULL_WARP < 16, bits[:16].sum(), bits[16:].sum()).astype(np.uint32)
    segments = values.reshape(-1, width)
    expected = [
        halves.view(np.int32),
        np.full(32, (values > 5).any()),
        np.full(32, (values > -5).all()),
        np.repeat(segments.sum(1), width),
        np.repeat(segments.max(1), width),
    ]
    np.testing.assert_array_equal(out, np.stack(expected, axis=1))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_hands_out_pairs_of_a_row_or_of_a_column(emulator, matrices, transposed):
    values = np.random.default_rng(0).integers(0, 1 << 16, (matrices, 8, 8)).astype(np.uint16)
    load = emulator.load_matrices_transposed if transposed else emulator.load_matrices
    out = run(
        emulator,
        lambda source, out: load(matrices, source, out),
        [values],
        np.uint16,
        (32, matrices, 2),
    )
    rows = values.transpose(0, 2, 1) if transposed else values
    expected = rows.reshape(matrices, 32, 2).transpose(1, 0, 2)
    np.testing.assert_array_equal(out, expected)


def half_bits(values, dtype):
    """Float32 values rounded to a 16-bit dtype: its bits, and what they stand for."""
    rounded = torch.from_numpy(values).to(dtype)
    return rounded.view(torch.int16).numpy(), rounded.double().numpy()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mma_m16n8k16_multiplies_what_ldmatrix_loads(emulator, dtype, seed):
    emulator.set_seed(seed)
    rng = np.random.default_rng(seed)
    a, a_values = half_bits(rng.standard_normal((16, 16), np.float32), dtype)
    b, b_values = half_bits(rng.standard_normal((16, 8), np.float32), dtype)
    c = rng.standard_normal((16, 8), np.float32)
    kernel = emulator.product_bf16 if dtype == torch.bfloat16 else emulator.product_f16
    out = run(emulator, kernel, [a, b, c], np.float32, (16, 8))
    np.testing.assert_allclose(out, a_values @ b_values + c, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rounded", [False, True])
def test_mma_m16n8k8_tf32_drops_bits_that_were_not_rounded_away(emulator, rounded):
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(s, np.float32) for s in [(16, 8), (8, 8), (16, 8)])
    out = run(emulator, emulator.product_tf32, [a, b, c], np.float32, (16, 8), rounded)

    def tf32(x):
        bits = x.view(np.uint32) + np.uint32(0x1000 if rounded else 0)
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)

    np.testing.assert_allclose(out, tf32(a) @ tf32(b) + c, rtol=1e-6, atol=1e-6)
    assert np.abs(out - (a.astype(np.float64) @ b + c)).max() > 1e-5


def test_an_asynchronous_copy_fills_with_zeros_past_its_source(emulator):
    values = np.random.default_rng(0).integers(1, 256, (32, 16)).astype(np.uint8)
    sizes = (np.arange(32) % 17).astype(np.int32)
    out = run(emulator, emulator.zero_fill, [values, sizes], np.uint8, (32, 16))
    np.testing.assert_array_equal(out, np.where(np.arange(16) < sizes[:, None], values, 0))


def test_bytes_that_are_zero_filled_are_not_read(emulator):
    sizes = (np.arange(32) % 17).astype(np.int32)
    present = np.arange(16) < sizes[:, None]
    values = emulator.Buffer("in", np.full((32, 16), 7, np.uint8), present=present)
    out = emulator.Buffer("out", 512)
    partial = emulator.Buffer("sizes", sizes)
    emulator.zero_fill(values.address, partial.address, out.address)
    np.testing.assert_array_equal(out.bytes.reshape(32, 16), np.where(present, 7, 0))
    whole = emulator.Buffer("sizes", np.full(32, 16, np.int32))
    with pytest.raises(emulator.Error, match=r"nobody wrote byte \d+ of in"):
        emulator.zero_fill(values.address, whole.address, out.address)


def floats_of_all_exponents():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    # Between neighbouring halves: ties, and a little to either side of them.
    ties = (halves.view(np.uint32) + np.array([[0x0FFF], [0x1000], [0x1001]], np.uint32)).ravel()
    return np.concatenate([bits, halves.view(np.uint32), ties]).view(np.float32)


@pytest.mark.parametrize(
    ("name", "dtype"), [("round_bf16", torch.bfloat16), ("round_f16", torch.half)]
)
def test_rounding_to_16_bits_is_to_nearest_even(emulator, name, dtype):
    values = floats_of_all_exponents()
    bits = getattr(emulator, name)(values)
    expected = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(bits[numbers], expected[numbers])
    assert (bits[~numbers] == 0x7FFF).all()


def test_widening_a_half_is_exact(emulator):
    bits = np.arange(1 << 16, dtype=np.uint16)
    np.testing.assert_array_equal(
        emulator.widen_f16(bits), bits.view(np.float16).astype(np.float32)
    )

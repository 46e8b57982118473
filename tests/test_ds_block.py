"""A whole block as one operator on the CPU, against its operations one by one."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import assert_within_budget, generator, random
from layouts import channels_first, embedded, every_second, transposed
from small_network import randomise

import dsnet
import dsnet_kernels
from dsnet.optimized import OptimizedBlock
from dsnet_kernels import BlockSizes, PackedCache, native, packed

RAW = torch.ops.dsnet_kernels
DTYPES = (torch.float32, torch.bfloat16)
INTROSPECTION, _ = native.introspection()
CAPABILITIES = INTROSPECTION.cpu_capabilities() if INTROSPECTION is not None else []

pytestmark = pytest.mark.skipif(not CAPABILITIES, reason="the native libraries are not built")

in_both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

BLOCKS = {
    "stage1": {"dim": 64, "num_heads": 1, "global_reduction": 8},
    "stage3": {"dim": 80, "num_heads": 5, "global_reduction": 2},
    "same grid": {"dim": 32, "num_heads": 2, "global_reduction": 1},
    "unequal": {
        "dim": 43,
        "num_heads": 2,
        "global_reduction": 3,
        "alpha": 16 / 43,
        "co_attention_dim": 48,
        "mlp_ratio": 2.3,
    },
}


@pytest.fixture(autouse=True)
def in_inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    before = INTROSPECTION.cpu_capability()
    INTROSPECTION.set_cpu_capability(request.param)
    yield request.param
    INTROSPECTION.set_cpu_capability(before)


def optimized(name="stage3", dtype=torch.float32, **kwargs):
    with torch.inference_mode(False), torch.no_grad():
        block = randomise(dsnet.DSBlock(**BLOCKS[name]).double()).eval()
        return OptimizedBlock(block, name, dtype=dtype, **kwargs)


def image(block, height, width, batch=2, dtype=torch.float32, seed=0):
    return random((batch, block.dim, height, width), dtype, generator(seed))


def results(streams):
    return {f"out{i}": each for i, each in enumerate(streams)}


def one_by_one(block, x, dtype, backend):
    """What the operations give, with the same constants in ``dtype``."""
    with torch.inference_mode(False), torch.no_grad():
        block = copy.deepcopy(block).to(dtype)
    block.backend = backend
    return results(block._streams(x.to(dtype)))


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the operator."""
    made = []
    whole = dsnet_kernels.ds_block

    def counted(*args, **kwargs):
        made.append(args)
        return whole(*args, **kwargs)

    monkeypatch.setattr(dsnet_kernels, "ds_block", counted)
    return made


# Results


@in_both_dtypes
@pytest.mark.parametrize("grid", [(1, 1), (7, 9), (16, 24), (33, 20)], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_within_budget(calls, capability, name, grid, dtype):
    block = optimized(name, dtype)
    got, same_dtype, oracle = [], [], []
    for seed in range(3):
        x = image(block, *grid, dtype=dtype, seed=seed)
        got.append(results(block.forward_streams(x)))
        same_dtype.append(one_by_one(block, x, dtype, "reference"))
        oracle.append(one_by_one(block, x, torch.float64, "reference"))
    assert len(calls) == 3
    stacked = [
        {key: torch.stack([each[key] for each in of]) for key in of[0]}
        for of in (got, same_dtype, oracle)
    ]
    assert_within_budget(*stacked)


@in_both_dtypes
def test_streams_are_returned_where_asked_for(dtype):
    block = optimized(dtype=dtype)
    x = image(block, 12, 10, dtype=dtype)
    out, local, global_ = block.forward_streams(x)
    assert torch.equal(block(x), out)
    assert local.shape == (2, 40, 12, 10)
    assert global_.shape == (2, 40, 6, 5)
    for each in (out, local, global_):
        assert each.is_contiguous(memory_format=torch.channels_last)


@in_both_dtypes
@pytest.mark.parametrize(
    "layout",
    [channels_first, transposed, every_second, lambda x: embedded(x, 3, 2)],
    ids=["channels_first", "transposed", "every_second", "embedded"],
)
def test_layouts_do_not_change_bits(layout, dtype):
    block = optimized(dtype=dtype)
    x = image(block, 9, 11, dtype=dtype)
    for got, expected in zip(
        block.forward_streams(layout(x)), block.forward_streams(x), strict=True
    ):
        assert torch.equal(got, expected)


def test_images_are_taken_a_few_at_a_time():
    """More than fit the cache at once; NaN in one leaves the others as they were."""
    block = optimized("stage1")
    x = image(block, 56, 56, batch=3)
    expected = block.forward_streams(x)
    spoilt = x.clone()
    spoilt[1, 0, 5, 5] = torch.nan
    for got, clean in zip(block.forward_streams(spoilt), expected, strict=True):
        assert torch.equal(got[[0, 2]], clean[[0, 2]])
        assert not torch.isfinite(got[1]).all()
    for number in range(3):
        for got, all_ in zip(block.forward_streams(x[number : number + 1]), expected, strict=True):
            assert torch.equal(got[0], all_[number])


def test_threads_do_not_change_bits():
    block = optimized()
    x = image(block, 14, 14)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = block(x)
        torch.set_num_threads(4)
        for _ in range(50):
            assert torch.equal(block(x), expected)
    finally:
        torch.set_num_threads(before)


def test_eight_threads_at_once():
    block = optimized()
    inputs = [image(block, 6 + n, 14 - n, seed=n) for n in range(8)]
    expected = [optimized()(x) for x in inputs]

    @torch.inference_mode()
    def run(index):
        return [block(inputs[index]) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for found, value in zip(pool.map(run, range(8)), expected, strict=True):
            assert all(torch.equal(each, value) for each in found)


def test_vmap_leaves_nothing_of_its_own_behind():
    """Neither in the cache nor in the results of calls that follow."""
    block = optimized()
    x = torch.stack([image(block, 8, 8, seed=seed) for seed in range(3)])
    got = torch.vmap(block)(x)
    for number in range(3):
        torch.testing.assert_close(got[number], block(x[number]), rtol=1e-4, atol=1e-4)


def test_the_raw_operator_has_a_rule_for_vmap():
    x, packed_ = arguments()
    several = torch.stack([x, 2 * x, x - 1])
    run = RAW.ds_block
    for got, number in zip(
        torch.vmap(lambda x: run(x, packed_, SIZES, 1e-5, 1e-5, False)[0])(several),
        range(3),
        strict=True,
    ):
        assert torch.equal(got, run(several[number], packed_, SIZES, 1e-5, 1e-5, False)[0])


# What is packed


@pytest.mark.parametrize("name", ["position", "fuse", "mlp", "co_attention"])
def test_a_changed_parameter_is_packed_again(name):
    block = optimized()
    x = image(block, 8, 8)
    before = block(x)
    with torch.inference_mode(False), torch.no_grad():
        next(iter(getattr(block, name)._parameters.values())).mul_(1.5)
        fresh = copy.deepcopy(block)
    after = block(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(x))


def test_a_loaded_state_is_packed_again():
    block, other = optimized(), optimized()
    with torch.inference_mode(False), torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    x = image(block, 8, 8)
    block(x)
    with torch.inference_mode(False):
        block.load_state_dict(other.state_dict())
    assert torch.equal(block(x), other(x))
    block = optimized()
    block(x)
    with torch.inference_mode(False):
        block.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(block(x), other(x))


def test_each_instruction_set_has_its_own(capability):
    block = optimized(dtype=torch.bfloat16)
    x = image(block, 8, 8, dtype=torch.bfloat16)
    block(x)
    for other in CAPABILITIES:
        INTROSPECTION.set_cpu_capability(other)
        assert torch.equal(block(x), optimized(dtype=torch.bfloat16)(x))


def test_grids_share_what_is_packed_unless_its_layout_differs():
    block = optimized()
    for side in (8, 9, 10):
        block(image(block, side, side))
    assert len(block.cache._packed) == 1
    # Other taps of the depthwise convolutions, and another form of co-attention.
    block(image(block, 1, 8))
    assert len(block.cache._packed) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])
def test_copies_begin_with_nothing_packed(copied):
    block = optimized()
    x = image(block, 8, 8)
    expected = block(x)
    with torch.inference_mode(False):
        twin = copied(block)
    assert not twin.cache._packed
    assert torch.equal(twin(x), expected)


# Where the operations run one by one


@pytest.mark.parametrize("backend", ["reference", ["sdpa", "auto"], ["reference", "cpu"]])
def test_another_backend_is_respected(calls, backend):
    block = optimized(backend=backend)
    block(image(block, 8, 8))
    assert not calls
    with dsnet_kernels.backend(backend):
        optimized()(image(block, 8, 8))
    assert not calls


def test_what_the_operator_does_not_take_runs_one_by_one(calls):
    block = optimized()
    x = image(block, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        block(x)
    optimized(dtype=torch.float64)(x.double())
    with torch.inference_mode(False):
        wanted = image(block, 8, 8).requires_grad_()
        block(wanted).sum().backward()
        assert wanted.grad is not None
    unaligned = randomise(dsnet.DSBlock(16, 1, 2, alignment=False)).eval()
    narrow = randomise(dsnet.DSBlock(16, 2, 2)).eval()
    with torch.inference_mode(False):
        for each in (unaligned, narrow):
            OptimizedBlock(each, "block")(image(each, 8, 8))
    made_here = copy.deepcopy(block)
    assert made_here.fuse.weight.is_inference()
    assert made_here(x).shape == x.shape
    assert not calls
    block(x)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.half(), "float16"),
        (lambda x: x.to("meta"), "meta"),
    ],
)
def test_refusals_say_why(change, message):
    block = optimized()
    assert packed.refusal(image(block, 8, 8), block._in_order(), "cpu") is None
    assert message in packed.refusal(change(image(block, 8, 8)), block._in_order(), "cpu")


def test_empty_batches_pass():
    block = optimized()
    assert block(image(block, 8, 8, batch=0)).shape == (0, 80, 8, 8)


# The raw operators

SIZES = [80, 40, 40, 40, 5, 320, 4, 4]


def arguments():
    block = optimized()
    x = image(block, 8, 8)
    return x, RAW.ds_block_pack(x, block._in_order(), SIZES)


def test_opcheck():
    with torch.inference_mode(False), torch.no_grad():
        x, packed_ = arguments()
        parameters = [each.detach() for each in optimized()._in_order()]
        torch.library.opcheck(RAW.ds_block, (x, packed_, SIZES, 1e-5, 1e-5, True))
        torch.library.opcheck(RAW.ds_block, (x[:0], packed_, SIZES, 1e-5, 1e-5, False))
        torch.library.opcheck(RAW.ds_block_pack, (x, parameters, SIZES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 80, 8)}, r"x: expected shape \(B, C, H, W\)"),
        ({"x": torch.zeros(2, 79, 8, 8)}, r"x: expected shape \(2, 80, 8, 8\)"),
        ({"x": torch.zeros(2, 80, 8, 8, dtype=torch.float64)}, "x: expected float32 or bfloat16"),
        ({"packed": torch.zeros(5)}, "packed: expected shape"),
        ({"packed": torch.zeros(5).double()}, "packed: expected shape"),
        ({"sizes": SIZES[1:]}, "sizes: expected .*got as many as 7"),
        ({"sizes": [80, 40, 39, *SIZES[3:]]}, "sizes: expected Cl .* Cg = C"),
        ({"sizes": [80, 40, 40, 40, 3, *SIZES[5:]]}, "sizes: expected heads that divide"),
        ({"sizes": [80, 40, 40, 40, 10, *SIZES[5:]]}, "expected heads of 8"),
        ({"sizes": [80, 40, 40, 40, 5, 0, 4, 4]}, "sizes: expected each to be at least 1"),
    ],
)
def test_bad_arguments(change, message):
    x, packed_ = arguments()
    given = {"x": x, "packed": packed_, "sizes": SIZES} | change
    with pytest.raises(RuntimeError, match=message):
        RAW.ds_block(given["x"], given["packed"], given["sizes"], 1e-5, 1e-5, True)


def test_bad_parameters():
    block = optimized()
    x, parameters = image(block, 8, 8), block._in_order()
    with pytest.raises(RuntimeError, match="parameters: expected 32 tensors, got 31"):
        RAW.ds_block_pack(x, parameters[1:], SIZES)
    with pytest.raises(RuntimeError, match=r"parameters\[0\]: expected shape \(80, 1, 3, 3\)"):
        RAW.ds_block_pack(x, parameters[:1][::-1] * 0 + [parameters[2], *parameters[1:]], SIZES)
    wrong = [each.half() for each in parameters]
    with pytest.raises(RuntimeError, match="expected x's dtype or float32"):
        RAW.ds_block_pack(x, wrong, SIZES)


def test_steps_are_timed_only_while_watched():
    block = optimized()
    x = image(block, 8, 8)
    INTROSPECTION.watch_block_steps(True)
    block(x)
    INTROSPECTION.watch_block_steps(False)
    seconds = dict(INTROSPECTION.block_step_seconds())
    assert len(seconds) == 8
    assert all(value > 0 for value in seconds.values())
    block(x)
    assert dict(INTROSPECTION.block_step_seconds()) == seconds


def test_sizes_refuse_what_kernels_cannot():
    assert BlockSizes(*SIZES).refusal() is None
    assert "two streams" in BlockSizes(80, 80, 0, 40, 5, 320, 4, 4).refusal()
    assert "heads have 4" in BlockSizes(40, 20, 20, 20, 5, 320, 4, 4).refusal()


def test_cache_keeps_the_last_of_a_layout():
    cache, weight = PackedCache(), torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    with torch.inference_mode(False):
        weight = torch.zeros(3)
        made = iter(range(9))
        assert [cache.get([weight], "a", lambda: next(made)) for _ in range(2)] == [0, 0]
        weight.add_(1)
        assert cache.get([weight], "a", lambda: next(made)) == 1
        assert cache.get([weight], "b", lambda: next(made)) == 2
        assert cache.get([weight], "a", lambda: next(made)) == 1
        cache.clear()
        assert cache.get([weight], "a", lambda: next(made)) == 3

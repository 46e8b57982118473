"""The CUDA kernels of ``global_attention``, run in the emulator."""

import emulated
import emulator_build
import pytest
import torch
from harness import assert_within_budget

from dsnet_kernels.reference import global_attention as reference
from dsnet_kernels.reference.dropout import keep_mask

forward, backward = emulated.functions("global_attention")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
# Batch, tokens, heads, head dimension: both sides of the fused kernel's and of every tile's limit.
SHAPES = [
    (2, 1, 1, 32),
    (3, 9, 2, 8),
    (2, 49, 2, 32),
    (1, 50, 3, 16),
    (1, 63, 1, 24),
    (1, 64, 5, 32),
    (1, 65, 2, 32),
    (1, 9, 1, 40),
    (1, 49, 2, 64),
    (1, 33, 1, 128),
    (1, 130, 1, 40),
    (1, 97, 1, 128),
]
NAMES = ("x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias")


@pytest.fixture(scope="module")
def emulator():
    return emulator_build.load("global_attention")


def make_inputs(shape, dtype, gain=1.0):
    """Arguments (x, norm_weight, norm_bias, qkv_weight, qkv_bias) and the output's gradient."""
    batch, tokens, heads, head_dim = shape
    width = heads * head_dim
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator)

    parameters = (
        1 + 0.1 * random(width),
        0.1 * random(width),
        gain * random(3 * width, width) / width**0.5,
        0.1 * random(3 * width),
    )
    x, grad = (random(batch, tokens, width).to(dtype) for _ in range(2))
    return (x, *parameters), grad


def evaluate(inputs, grad, heads, dropout_p=0.0, seed=None, convert=torch.Tensor.clone):
    """The reference's output and gradients by name."""
    leaves = [convert(value.detach()).requires_grad_() for value in inputs]
    out = reference(leaves[0], heads, *leaves[1:], dropout_p=dropout_p, seed=seed)
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    named = dict(zip((f"grad {name}" for name in NAMES), grads, strict=True))
    return {"out": out.detach()} | named


def run(inputs, grad, heads, dropout_p=0.0, dropout_seed=None, **options):
    """The kernels' output and gradients by name, and lse; the gradients in their inputs' dtypes."""
    x, *parameters = inputs
    tail = (*parameters, EPS, dropout_p, dropout_seed)
    out, lse, _ = forward(x, heads, *tail, False, **options)
    grads = backward(grad, x, lse, None, heads, *tail, **options)
    grads = [value.to(given.dtype) for value, given in zip(grads, inputs, strict=True)]
    named = dict(zip((f"grad {name}" for name in NAMES), grads, strict=True))
    return {"out": out} | named, lse


def assert_correct(inputs, grad, heads, dropout_p=0.0, dropout_seed=None, **options):
    dropout = (dropout_p, dropout_seed)
    found, _ = run(inputs, grad, heads, *dropout, **options)
    same = evaluate(inputs, grad, heads, *dropout)
    exact = evaluate(inputs, grad, heads, *dropout, torch.Tensor.double)
    if inputs[0].shape[1] == 1:
        # The softmax over one key is 1 whatever Q and K are: all of their gradients are rounding.
        width = inputs[0].shape[2]
        for result in (found, same, exact):
            result["grad qkv_weight"] = result["grad qkv_weight"][2 * width :]
            result["grad qkv_bias"] = result["grad qkv_bias"][2 * width :]
    assert_within_budget(found, same, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_in_float64(shape, dtype):
    inputs, grad = make_inputs(shape, dtype)
    assert_correct(inputs, grad, shape[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens(dtype):
    inputs, grad = make_inputs((1, 257, 1, 32), dtype)
    assert_correct(inputs, grad, 1)


def test_tokens_of_a_large_image():
    inputs, grad = make_inputs((1, 1025, 1, 8), torch.bfloat16)
    assert_correct(inputs, grad, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [9, 49, 64])
def test_one_kernel_or_several_for_few_tokens(tokens, dtype):
    """Both regimes are within the budget, and have the same sums: Q, K and V are bit-equal."""
    inputs, _ = make_inputs((2, tokens, 2, 32), dtype)
    tail = (*inputs[1:], EPS, 0.0, None)
    results = [forward(inputs[0], 2, *tail, False, fused=fused) for fused in (False, True)]
    exact = reference(inputs[0].double(), 2, *(value.double() for value in inputs[1:]))
    same = reference(inputs[0], 2, *inputs[1:])
    for out, *_ in results:
        assert_within_budget({"out": out}, {"out": same}, {"out": exact})
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [9, 65])
def test_lse_is_the_logarithm_of_the_softmax_sum(tokens, dtype):
    inputs, _ = make_inputs((2, tokens, 2, 16), dtype)
    _, lse, _ = forward(inputs[0], 2, *inputs[1:], EPS, 0.0, None, False)
    x, norm_weight, norm_bias, qkv_weight, qkv_bias = (value.double() for value in inputs)
    normalized = torch.nn.functional.layer_norm(x, (32,), norm_weight, norm_bias, EPS)
    qkv = torch.nn.functional.linear(normalized, qkv_weight, qkv_bias)
    q, k, _ = qkv.view(2, tokens, 3, 2, 16).permute(2, 0, 3, 1, 4)
    expected = torch.logsumexp(q @ k.transpose(-2, -1) / 4, dim=-1)
    assert lse.dtype == torch.float32
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), expected, rtol=tolerance, atol=tolerance)


def strongly_negative(tokens, dtype, low=-500.0, high=-100.0):
    """Inputs whose logits are all between `low` and `high`: K opposes Q along one direction."""
    # So many tokens that the largest error is no single rounding.
    inputs, grad = make_inputs((max(2, 128 // tokens), tokens, 1, 32), dtype, gain=0.3)
    bias = inputs[4].clone()
    # d·(−s²)/√d with s² = 53 is −300; the projections vary it by some tens.
    size = (-(low + high) / 2 / 32**0.5) ** 0.5
    bias[:32] += size
    bias[32:64] -= size
    return (*inputs[:4], bias), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 49, 50, 63, 64, 65, 129])
def test_strongly_negative_logits(tokens, dtype):
    """Padded keys with logits of 0 would take all the weight, and exp(0 − lse) is infinite."""
    inputs, grad = strongly_negative(tokens, dtype)
    _, lse, _ = forward(inputs[0], 1, *inputs[1:], EPS, 0.0, None, False)
    assert -500 < lse.min() <= lse.max() < -100
    assert_correct(inputs, grad, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [9, 32, 70])
def test_dropout_mask_is_that_of_the_reference(tokens, dtype):
    """With K zero every weight is 1 / tokens before dropout; V shows a few keys at a time."""
    heads, head_dim, dropout_p, seed = 2, 32, 0.4, torch.tensor(2**62 + 12345)
    width = heads * head_dim
    keep = keep_mask((2, heads, tokens, tokens), dropout_p, seed).double()
    weights = keep / (1 - dropout_p) / tokens
    qkv_weight = torch.zeros(3 * width, width)
    qkv_weight[2 * width :] = torch.eye(head_dim).repeat(heads, heads)
    qkv_weight[2 * width :, head_dim:] = 0
    parameters = (torch.ones(width), torch.zeros(width), qkv_weight, torch.zeros(3 * width))
    for first in range(0, tokens, head_dim):
        keys = range(first, min(first + head_dim, tokens))
        x = torch.zeros(2, tokens, width, dtype=dtype)
        for key in keys:
            x[:, key, key - first] = 1
        out, *_ = forward(x, heads, *parameters, EPS, dropout_p, seed, False)
        branch = (out - x).double().view(2, tokens, heads, head_dim).transpose(1, 2)
        values = torch.nn.functional.layer_norm(x.double(), (width,), eps=EPS)[..., :head_dim]
        # A key more or fewer changes a value by more than 7 / tokens.
        assert (branch - weights @ values[:, None]).abs().max() < 1 / tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 2, 8), (2, 49, 2, 32), (1, 67, 2, 40)], ids=str)
def test_dropout_forward_and_backward(shape, dtype):
    inputs, grad = make_inputs(shape, dtype)
    assert_correct(inputs, grad, shape[2], 0.3, torch.tensor(987654321987))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 49, 2, 32), (2, 66, 1, 40)], ids=str)
def test_results_do_not_depend_on_the_order_of_threads(shape, dtype):
    inputs, grad = make_inputs(shape, dtype)
    expected, expected_lse = run(inputs, grad, shape[2], seed=100)
    for seed in range(3):
        found, lse = run(inputs, grad, shape[2], seed=seed)
        assert torch.equal(lse, expected_lse)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def offset(tensor, count):
    """The same values `count` elements behind an aligned address, between others that are NaN."""
    flat = torch.full((tensor.numel() + count + 8,), float("nan"), dtype=tensor.dtype)
    flat[count : count + tensor.numel()] = tensor.flatten()
    return flat[count : count + tensor.numel()].view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 8])
def test_arguments_at_any_address(count, dtype):
    """With and without accesses of 16 bytes; what lies around the arguments is not read."""
    inputs, grad = make_inputs((1, 65, 1, 40), dtype)
    expected, _ = run(inputs, grad, 1)
    inputs = tuple(offset(value, count) for value in inputs)
    found, _ = run(inputs, offset(grad, count), 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", [(0, 49, 2, 32), (2, 0, 2, 32)], ids=str)
def test_no_tokens_have_empty_results_and_zero_parameter_gradients(shape):
    inputs, grad = make_inputs(shape, torch.float32)
    found, lse = run(inputs, grad, 2)
    assert found["out"].shape == found["grad x"].shape == inputs[0].shape
    assert lse.shape == (shape[0], 2, shape[1])
    for name in NAMES[1:]:
        assert torch.equal(found[f"grad {name}"], torch.zeros_like(inputs[NAMES.index(name)]))


def test_parameter_gradients_gather_several_slots():
    inputs, grad = make_inputs((3, 60, 1, 16), torch.float32)
    assert_correct(inputs, grad, 1, slots=12, slot_rows=15)


def test_a_constant_token_has_a_finite_gradient():
    inputs, grad = make_inputs((1, 9, 1, 32), torch.float32)
    inputs[0][0, 3] = 2.5
    assert_correct(inputs, grad, 1)


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "heads"),
    [
        (1, 1, 8, 1),
        (256, 49, 32, 1),
        (256, 49, 256, 8),
        (16, 1025, 160, 5),
        (1, 4096, 384, 3),
        (70_000, 49, 64, 2),
        (9000, 65, 256, 8),
        (3, 2**27, 32, 1),
        (0, 49, 32, 1),
    ],
)
def test_launches_cover_every_row_within_the_limits_of_a_grid(
    emulator, batch, tokens, width, heads
):
    for launch in emulator.launches((batch, tokens, width), heads, 0):
        assert launch.fused == (tokens <= 64 and width // heads <= 32)
        assert launch.head_tile >= width // heads
        assert launch.row_tiles * launch.block_rows >= tokens
        assert launch.attention_blocks == batch * heads * launch.row_tiles < 2**31
        assert launch.token_blocks * launch.block_rows >= batch * tokens
        assert launch.column_blocks * launch.block_columns >= 3 * width
        assert launch.projection_blocks < 2**31
        assert launch.slots <= 128
        assert launch.slots * launch.slot_rows >= batch * tokens
        assert launch.fused_threads // 2 >= min(tokens, 64)
        assert f"slots {launch.slots}" in launch.text


@pytest.mark.parametrize(("address", "packed"), [(0, True), (8, False), (2, False)])
def test_access_is_as_wide_as_alignment_allows(emulator, address, packed):
    found = [launch.packed for launch in emulator.launches((1, 9, 32), 1, address)]
    assert found == [packed, packed]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 2**31, 8, 1), "2147483647 tokens"), ((2**31, 49, 32, 1), "2147483647 blocks")],
)
def test_more_tokens_than_a_grid_holds_are_refused(emulator, shape, message):
    with pytest.raises(ValueError, match=f"x: expected at most {message}"):
        emulator.launches(shape[:3], shape[3], 0)

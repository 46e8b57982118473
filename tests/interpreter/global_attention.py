"""The Triton kernels of ``global_attention``, run by Triton's interpreter.

Needs ``TRITON_INTERPRET=1`` before Triton is imported; ``test_global_attention_triton.py`` runs
this file so.
"""

import math
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from harness import Variant, assert_within_budget, evaluate, mapped, random

from dsnet_kernels import BackendUnavailable, explain, global_attention
from dsnet_kernels.reference import dropout
from dsnet_kernels.reference import global_attention as reference
from dsnet_kernels.triton import global_attention as kernels
from dsnet_kernels.triton.global_attention_kernels import keep_mask

TRITON = Variant("triton")
OP = torch.ops.dsnet_kernels.global_attention_triton
OP_BACKWARD = torch.ops.dsnet_kernels.global_attention_triton_backward
TOKENS = (1, 9, 49, 50, 63, 64, 65, 130)
HEAD_DIMS = (8, 16, 32, 40, 128)

in_both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16], ids=["float32", "float16"]
)
few_and_many = pytest.mark.parametrize("tokens", [9, 67])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def make(shape, num_heads, dtype, seed=0):
    """Inputs of (B, M, C) whose logits are of order 1."""
    rng = generator(seed)
    width = shape[2]
    values = [random(s, torch.float32, rng) for s in (shape, *parameter_shapes(width))]
    x, norm_weight, norm_bias, qkv_weight, qkv_bias = values
    parameters = (1 + norm_weight / 4, norm_bias / 4, qkv_weight / math.sqrt(width), qkv_bias / 4)
    return (x.to(dtype), num_heads, *(p.to(dtype) for p in parameters)), {}


def parameter_shapes(width):
    return (width,), (width,), (3 * width, width), (3 * width,)


def run(inputs, grads, **kwargs):
    with TRITON.active():
        return evaluate(partial(global_attention, **kwargs), inputs, grads)


def compare(inputs, **kwargs):
    """Forward and backward within the error budget."""
    function = partial(reference, **kwargs)
    grads = [random(inputs[0][0].shape, inputs[0][0].dtype, generator(1))]
    oracle = evaluate(function, mapped(inputs, torch.Tensor.double), [g.double() for g in grads])
    got = run(inputs, grads, **kwargs)
    assert_within_budget(got, evaluate(function, inputs, grads), oracle)
    return got


@in_both_dtypes
@pytest.mark.parametrize("tokens", TOKENS)
def test_numbers_of_tokens(dtype, tokens):
    compare(make((2, tokens, 32), 2, dtype))


@in_both_dtypes
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@few_and_many
def test_head_dimensions(dtype, head_dim, tokens):
    heads = 1 if head_dim == 128 else 2
    compare(make((1, tokens, heads * head_dim), heads, dtype))


@pytest.mark.parametrize(("width", "heads"), [(160, 5), (24, 3)])
def test_widths_that_are_no_power_of_two(width, heads):
    compare(make((2, 17, width), heads, torch.float16))


@in_both_dtypes
def test_rows_wider_than_a_block(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "WHOLE_ROWS", 32)
    inputs = make((2, 9, 80), 2, dtype)
    launch = kernels.grad_x_launch(kernels.Problem(2, 9, 80, 2, dtype))
    assert launch.constants["BLOCK_C"] == 32
    compare(inputs)


def test_float32_parameters_beside_float16():
    (x, heads, *parameters), _ = make((2, 20, 64), 2, torch.float32)
    got = compare(((x.half(), heads, *parameters), {}))
    assert got["out0"].dtype == got["grad 0"].dtype == torch.float16
    assert all(got[f"grad {i}"].dtype == torch.float32 for i in (2, 3, 4, 5))


# Numbers that find bugs


def skewed(tokens, level, dtype):
    """Logits of every pair of tokens around ``level``: a constant query meets a constant key."""
    (x, heads, norm_weight, norm_bias, qkv_weight, qkv_bias), _ = make((2, tokens, 32), 1, dtype)
    root = math.sqrt(-level * math.sqrt(32) / 32)
    qkv_bias[:32], qkv_bias[32:64] = root, -root
    return (x, heads, norm_weight, norm_bias, qkv_weight, qkv_bias), {}


@in_both_dtypes
@pytest.mark.parametrize(
    ("tokens", "level"),
    [*((tokens, -500) for tokens in (1, 9, 49, 50, 63, 64, 65, 129)), (49, -100), (65, -100)],
)
def test_padded_keys_beside_strongly_negative_logits(dtype, tokens, level):
    inputs = skewed(tokens, level, dtype)
    (x, heads, *parameters), _ = inputs
    _, lse = OP(x, heads, *parameters, 1e-5, 0.0, None)
    assert (lse < level / 2).all()
    compare(inputs)


@few_and_many
def test_nan_behind_the_last_row(tokens):
    (x, heads, *parameters), _ = make((1, tokens, 40), 1, torch.float32)
    grad = random(x.shape, x.dtype, generator(1))

    def behind(t):
        memory = torch.full((t.numel() + 4096,), math.nan)
        return memory[: t.numel()].view(t.shape).copy_(t)

    expected = run(((x, heads, *parameters), {}), [grad])
    got = run(((behind(x), heads, *map(behind, parameters)), {}), [behind(grad)])
    for name, value in expected.items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(got[name], value), name


@few_and_many
def test_nan_stays_in_its_image(tokens):
    inputs = make((2, tokens, 32), 2, torch.float32)
    (x, *others), _ = inputs
    spoilt = x.clone()
    spoilt[1, tokens // 2, 5] = math.nan
    grads = [random(x.shape, x.dtype, generator(1))]
    clean, got = run(inputs, grads), run(((spoilt, *others), {}), grads)
    for name in ("out0", "grad 0"):
        assert got[name][1].isnan().all()
        assert torch.equal(got[name][0], clean[name][0])
    assert got["grad 4"].isnan().all()


def test_a_mean_far_above_the_deviation():
    (x, *others), _ = make((2, 9, 64), 2, torch.float32)
    compare(((x + 1000, *others), {}))


@in_both_dtypes
@few_and_many
def test_layouts_and_repeats_do_not_change_bits(dtype, tokens):
    (x, *others), _ = make((1, tokens, 24), 3, dtype)
    grad = random(x.shape, dtype, generator(1))
    plain = run(((x, *others), {}), [grad])
    for change in (
        torch.clone,
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t),
    ):
        other = run(((change(x), *others), {}), [change(grad)])
        for name, value in plain.items():
            assert torch.equal(value, other[name]), name


@few_and_many
def test_every_output_is_written(tokens):
    """Under deterministic algorithms torch fills fresh memory with NaN."""
    inputs = make((2, tokens, 40), 1, torch.float32)
    grads = [random((2, tokens, 40), torch.float32, generator(1))]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = run(inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("shape", [(0, 9, 32), (2, 0, 32), (0, 70, 32)], ids=str)
def test_nothing(shape):
    got = run(make(shape, 2, torch.float16), [torch.zeros(shape, dtype=torch.float16)])
    assert got["out0"].shape == got["grad 0"].shape == shape
    for i, expected in zip((2, 3, 4, 5), parameter_shapes(32), strict=True):
        assert torch.equal(got[f"grad {i}"], torch.zeros(expected, dtype=torch.float16))


@few_and_many
def test_lse_is_the_logarithm_of_the_sum(tokens):
    (x, heads, norm_weight, norm_bias, weight, bias), _ = make((2, tokens, 64), 2, torch.float32)
    _, lse = OP(x, heads, norm_weight, norm_bias, weight, bias, 1e-5, 0.0, None)
    normal = torch.nn.functional.layer_norm(
        x.double(), (64,), norm_weight.double(), norm_bias.double()
    )
    q, k, _ = (normal @ weight.double().T + bias).view(2, tokens, 3, 2, 32).unbind(2)
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(32)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-6, atol=1e-6)


# Dropout


@triton.jit
def store_mask(out, seed, i_image, threshold):
    """out (heads, 16, 32): queries from 5 on, keys from 8 on."""
    i_head = tl.program_id(0)
    b_keep = keep_mask(seed, i_image.to(tl.int64), i_head, 5, 8, threshold, 16, 32)
    o_query = i_head * 16 + tl.arange(0, 16)
    tl.store(out + o_query[:, None] * 32 + tl.arange(0, 32)[None, :], b_keep)


@pytest.mark.parametrize("p", [0.1, 0.9])
@pytest.mark.parametrize("seed", [0, 2**40 + 12345, 2**63 - 1])
def test_the_mask_is_the_reference_s(p, seed):
    seed = torch.tensor(seed)
    got = torch.empty(3, 16, 32, dtype=torch.bool)
    store_mask[(3,)](got, seed, 2, dropout.threshold(p))
    expected = dropout.keep_mask((3, 3, 21, 40), p, seed)[2, :, 5:, 8:]
    assert torch.equal(got, expected)


@in_both_dtypes
@few_and_many
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_is_the_reference_s(dtype, tokens, p):
    compare(make((2, tokens, 16), 2, dtype), dropout_p=p, seed=torch.tensor(2**35 + 7))


def test_a_seed_without_dropout_changes_nothing():
    (x, heads, *parameters), _ = make((1, 9, 16), 1, torch.float32)
    plain = OP(x, heads, *parameters, 1e-5, 0.0, None)
    seeded = OP(x, heads, *parameters, 1e-5, 0.0, torch.tensor(3))
    assert all(torch.equal(a, b) for a, b in zip(plain, seeded, strict=True))


# Under torch's transformations, and bad arguments


@pytest.mark.parametrize(
    ("shape", "dropout_p", "dtype"),
    [
        ((2, 9, 16), 0.5, torch.float32),
        ((1, 9, 16), 0.0, torch.float16),
        ((1, 65, 8), 0.0, torch.float32),
        ((0, 9, 16), 0.5, torch.float16),
    ],
    ids=str,
)
def test_opcheck(shape, dropout_p, dtype):
    (x, heads, *parameters), _ = make(shape, shape[2] // 8, dtype)
    rest = (heads, *parameters, 1e-5, dropout_p, torch.tensor(1) if dropout_p else None)
    torch.library.opcheck(OP, (x, *rest))
    _, lse = OP(x, *rest)
    torch.library.opcheck(OP_BACKWARD, (x, x, lse, *rest))


def test_compiles_without_a_graph_break():
    inputs = make((2, 9, 32), 2, torch.float32)
    grads = [random((2, 9, 32), torch.float32, generator(1))]
    compiled = torch.compile(global_attention, fullgraph=True, backend="aot_eager")
    expected = run(inputs, grads)
    with TRITON.active():
        got = evaluate(compiled, inputs, grads)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


X, PARAMETERS = torch.zeros(2, 4, 16), [torch.zeros(s) for s in parameter_shapes(16)]
LSE, REST = torch.zeros(2, 2, 4), (1e-5, 0.0, None)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X[0], 2, *PARAMETERS, *REST), ValueError, "x: expected 3 dimensions"),
        ((X, 3, *PARAMETERS, *REST), ValueError, "num_heads: expected a divisor"),
        ((X, 4, *PARAMETERS, *REST), ValueError, "num_heads: expected heads of 8"),
        ((X, 2, X, *PARAMETERS[1:], *REST), ValueError, "norm_weight: expected shape"),
        ((X.double(), 2, *PARAMETERS, *REST), TypeError, "x is torch.float64"),
        ((X, 2, *PARAMETERS, 1e-5, 1.0, None), ValueError, "dropout_p: expected"),
        ((X, 2, *PARAMETERS, 1e-5, 0.1, None), ValueError, "seed: expected a tensor"),
        ((X, 2, *PARAMETERS, 1e-5, 0.1, torch.tensor(1.0)), TypeError, "seed: expected"),
    ],
)
def test_the_raw_operator_checks_too(args, error, message):
    with pytest.raises(error, match=message):
        OP(*args)


@pytest.mark.parametrize(
    ("grad", "lse", "error", "message"),
    [
        (X[:1], LSE, ValueError, "grad: expected shape"),
        (X.half(), LSE, TypeError, "grad: expected"),
        (X, LSE[:, :1], ValueError, "lse: expected shape"),
        (X, LSE.half(), TypeError, "lse: expected"),
    ],
)
def test_the_raw_gradient_checks_too(grad, lse, error, message):
    with pytest.raises(error, match=message):
        OP_BACKWARD(grad, X, lse, 2, *PARAMETERS, *REST)


def test_refusals_with_the_reason():
    with pytest.raises(BackendUnavailable, match="triton: the head dimension is 4"):
        global_attention(X, 4, *PARAMETERS, backend="triton")
    x, *parameters = (t.bfloat16() for t in (X, *PARAMETERS))
    with pytest.raises(BackendUnavailable, match=r"triton: x is .*bfloat16.*interpreter"):
        global_attention(x, 2, *parameters, backend="triton")
    assert explain("global_attention", x, num_heads=2).chosen != "triton"


@few_and_many
def test_more_rows_than_slots_times_a_block(monkeypatch, tokens):
    """Each slot of the partial sums takes several blocks of rows."""
    monkeypatch.setattr(kernels, "SLOTS", 2)
    shape = (80 // tokens + 1, tokens, 32)
    launch, slots = kernels.grad_weight_launch(kernels.Problem(*shape, 2, torch.float32))
    assert slots == 2 < math.prod(shape[:2]) // launch.constants["BLOCK_T"]
    compare(make(shape, 2, torch.float32))

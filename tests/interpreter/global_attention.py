"""What only ``global_attention`` has in Triton; ``test_interpreter.py`` runs this file."""

import math

import pytest
import torch
import triton
import triton.language as tl
from cases.global_attention import CASE
from harness import assert_same_bits, compare, run, sample
from variants import variants

from dsnet_kernels import BackendUnavailable, explain, global_attention
from dsnet_kernels.reference import dropout
from dsnet_kernels.triton import norm_linear
from dsnet_kernels.triton.common_kernels import keep_mask

OP = torch.ops.dsnet_kernels.global_attention_triton
OP_BACKWARD = torch.ops.dsnet_kernels.global_attention_triton_backward
(TRITON,) = variants(CASE.name)

in_both_dtypes = pytest.mark.parametrize("dtype", TRITON.dtypes, ids=str)
few_and_many = pytest.mark.parametrize("tokens", [9, 67])


def raw(inputs, dropout_p=0.0, seed=None):
    """Arguments of the raw operator."""
    return (*inputs.values(), 1e-5, dropout_p, seed, False)


@in_both_dtypes
@pytest.mark.parametrize("tokens", [49, 64, 130])
def test_numbers_of_tokens(dtype, tokens):
    compare(CASE, TRITON, sample(CASE, (2, tokens, 1, 16), dtype))


@in_both_dtypes
@pytest.mark.parametrize("head_dim", [8, 16, 32, 40, 128])
@few_and_many
def test_head_dimensions(dtype, head_dim, tokens):
    heads = 1 if head_dim == 128 else 2
    compare(CASE, TRITON, sample(CASE, (1, tokens, heads, head_dim), dtype))


def test_a_width_that_is_no_power_of_two():
    compare(CASE, TRITON, sample(CASE, (2, 17, 5, 32), torch.float16))


@in_both_dtypes
def test_rows_wider_than_a_block(monkeypatch, dtype):
    monkeypatch.setattr(norm_linear, "WHOLE_ROWS", 32)
    launch = norm_linear.grad_x_launch(norm_linear.NormLinear(18, 80, 240, dtype))
    assert launch.constants["BLOCK_C"] == 32
    compare(CASE, TRITON, sample(CASE, (2, 9, 2, 40), dtype))


@few_and_many
def test_slots_of_several_row_blocks(monkeypatch, tokens):
    monkeypatch.setattr(norm_linear, "SLOTS", 2)
    batch = 80 // tokens + 1
    p = norm_linear.NormLinear(batch * tokens, 32, 96, torch.float32)
    launch, slots = norm_linear.grad_weight_launch(p)
    assert slots == 2 < batch * tokens // launch.constants["BLOCK_T"]
    compare(CASE, TRITON, sample(CASE, (batch, tokens, 2, 16)))


# Numbers that find bugs


@in_both_dtypes
@pytest.mark.parametrize(
    ("tokens", "level"),
    [*((tokens, -500) for tokens in (1, 9, 49, 50, 63, 64, 65, 129)), (49, -100), (65, -100)],
)
def test_padded_keys_beside_strongly_negative_logits(dtype, tokens, level):
    """Logits of every pair of tokens around ``level``: a constant query meets a constant key."""
    inputs, grads = sample(CASE, (2, tokens, 1, 32), dtype)
    root = math.sqrt(-level / math.sqrt(32))
    inputs["qkv_bias"][:32], inputs["qkv_bias"][32:64] = root, -root
    _, lse, _ = OP(*raw(inputs))
    assert (lse < level / 2).all()
    compare(CASE, TRITON, (inputs, grads))


@few_and_many
def test_nan_behind_the_last_row(tokens):
    inputs, grads = sample(CASE, (1, tokens, 1, 40))

    def behind(t):
        memory = torch.full((t.numel() + 4096,), math.nan)
        return memory[: t.numel()].view(t.shape).copy_(t)

    spoilt = {k: behind(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with TRITON.active():
        expected = run(CASE, TRITON, inputs, grads)
        got = run(CASE, TRITON, spoilt, [behind(grad) for grad in grads])
    assert all(torch.isfinite(value).all() for value in expected.values())
    assert_same_bits(got, expected)


def test_a_mean_far_above_the_deviation():
    inputs, grads = sample(CASE, (2, 9, 2, 32))
    inputs["x"] += 1000
    compare(CASE, TRITON, (inputs, grads))


@few_and_many
def test_lse_is_the_logarithm_of_the_sum(tokens):
    inputs, _ = sample(CASE, (2, tokens, 2, 32))
    _, lse, _ = OP(*raw(inputs))
    x, _, *norm, weight, bias = (
        v.double() if isinstance(v, torch.Tensor) else v for v in inputs.values()
    )
    normal = torch.nn.functional.layer_norm(x, (64,), *norm)
    q, k, _ = (normal @ weight.T + bias).view(2, tokens, 3, 2, 32).unbind(2)
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
    option = {"dropout_p": p, "seed": torch.tensor(2**35 + 7)}
    compare(CASE, TRITON, sample(CASE, (2, tokens, 2, 8), dtype, option=option))


def test_a_seed_without_dropout_changes_nothing():
    inputs, _ = sample(CASE, (1, 9, 1, 16))
    plain, seeded = OP(*raw(inputs)), OP(*raw(inputs, 0.0, torch.tensor(3)))
    assert all(torch.equal(a, b) for a, b in zip(plain, seeded, strict=True))


# Bad arguments

X, PARAMETERS = torch.zeros(2, 4, 16), [torch.zeros(s) for s in ((16,), (16,), (48, 16), (48,))]
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
        OP(*args, False)


def test_nothing_is_kept():
    with pytest.raises(ValueError, match="keep_qkv: expected False"):
        OP(X, 2, *PARAMETERS, *REST, True)


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
        OP_BACKWARD(grad, X, lse, None, 2, *PARAMETERS, *REST)


def test_refusals_with_the_reason():
    with pytest.raises(BackendUnavailable, match="triton: the head dimension is 4"):
        global_attention(X, 4, *PARAMETERS, backend="triton")
    x, *parameters = (t.bfloat16() for t in (X, *PARAMETERS))
    with pytest.raises(BackendUnavailable, match=r"triton: x is .*bfloat16.*interpreter"):
        global_attention(x, 2, *parameters, backend="triton")
    assert explain("global_attention", x, num_heads=2).chosen != "triton"

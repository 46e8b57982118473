"""What only ``co_attention`` has in Triton; ``test_interpreter.py`` runs this file."""

import math

import pytest
import torch
from cases.co_attention import CASE
from harness import assert_same_bits, compare, evaluate, run, sample
from variants import variants

from dsnet_kernels import BackendUnavailable, co_attention
from dsnet_kernels.triton import co_attention_launches as kernels

OP = torch.ops.dsnet_kernels.co_attention_triton
OP_BACKWARD = torch.ops.dsnet_kernels.co_attention_triton_backward
(TRITON,) = variants(CASE.name)

in_both_dtypes = pytest.mark.parametrize("dtype", TRITON.dtypes, ids=str)
in_both_forms = pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])


def raw(inputs, absorbed, dropout_p=0.0, seed=None):
    """Arguments of the raw operator."""
    tokens = inputs["local"].flatten(2).transpose(1, 2)
    _, *others = inputs.values()
    return (tokens, *others, 1e-5, dropout_p, seed, absorbed, False)


@in_both_forms
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 35, 17, 2, 40, 5, 7),
        (1, 1, 3, 17, 1, 128, 40, 24),
        (2, 1, 2, 3, 1, 8, 1, 3),
        (1, 5, 5, 9, 3, 8, 72, 12),
    ],
    ids=str,
)
def test_shapes(shape, absorbed):
    for dtype in TRITON.dtypes:
        compare(CASE, TRITON, sample(CASE, shape, dtype, option={"absorbed": absorbed}))


@in_both_forms
def test_splits_of_several_blocks(monkeypatch, absorbed):
    monkeypatch.setattr(kernels, "SPLITS", 2)
    inputs, grads = sample(CASE, (1, 1, 130, 9, 1, 8, 8, 8), option={"absorbed": absorbed})
    p = kernels.Problem(1, 130, 9, 8, 8, 1, 8, torch.float32, absorbed)
    for launch, splits in (kernels.to_global_launch(p), kernels.grad_global_launch(p)):
        assert splits == 2 < 130 // launch.constants["BLOCK_N"]
    compare(CASE, TRITON, (inputs, grads))


@in_both_forms
@pytest.mark.parametrize(("height", "tokens"), [(7, 49), (9, 17)])
def test_padded_keys_beside_strongly_negative_logits(height, tokens, absorbed):
    """Logits of every pair of tokens around −500: a constant query meets a constant key."""
    for dtype in TRITON.dtypes:
        shape, root = (1, height, 7, tokens, 1, 32, 32, 32), math.sqrt(500 / math.sqrt(32))
        inputs, grads = sample(CASE, shape, dtype, option={"absorbed": absorbed})
        for stream in ("local", "global"):
            inputs[f"{stream}_qkv_bias"][:32] = root
            inputs[f"{stream}_qkv_bias"][32:64] = -root
        del inputs["absorbed"]
        _, _, local_softmax, global_softmax, *_ = OP(*raw(inputs, absorbed))
        assert (local_softmax[..., 0] < -250).all()
        if not absorbed:
            # The key bias adds one number to all logits of a query; absorbed it is left out.
            assert (global_softmax[..., 0] < -250).all()
        compare(CASE, TRITON, (inputs | {"absorbed": absorbed}, grads))


@in_both_forms
def test_nan_behind_the_last_row(absorbed):
    inputs, grads = sample(CASE, (1, 3, 7, 9, 1, 8, 5, 7), option={"absorbed": absorbed})

    def behind(t):
        memory = torch.full((t.numel() + 4096,), math.nan)
        return memory.as_strided(t.shape, t.stride()).copy_(t)

    spoilt = {k: behind(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with TRITON.active():
        expected = run(CASE, TRITON, inputs, grads)
        got = run(CASE, TRITON, spoilt, [behind(grad) for grad in grads])
    assert all(torch.isfinite(value).all() for value in expected.values())
    assert_same_bits(got, expected)


@in_both_forms
def test_saved_softmaxes(absorbed):
    """The maximum of the logits and the sum beside it give the logarithm of the softmax's sum."""
    inputs, _ = sample(CASE, (2, 5, 7, 19, 2, 8, 12, 20))
    inputs["local_qkv_bias"][16:32] = 0
    _, _, *found, _, _, _ = OP(*raw(inputs, absorbed))
    i = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    local = i["local"] * i["local_scale"].view(-1, 1, 1) + i["local_shift"].view(-1, 1, 1)
    local = local.flatten(2).transpose(1, 2) @ i["local_qkv_weight"].T + i["local_qkv_bias"]
    norm = (i["global_norm_weight"], i["global_norm_bias"])
    global_ = torch.nn.functional.layer_norm(i["global_"], (20,), *norm)
    global_ = global_ @ i["global_qkv_weight"].T + i["global_qkv_bias"]
    (q1, k2, _), (q2, k1, _) = (x.unflatten(2, (3, 2, 8)).unbind(2) for x in (local, global_))
    for softmax, q, k in zip(found, (q1, q2), (k1, k2), strict=True):
        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
        torch.testing.assert_close(softmax[..., 0].double(), logits.amax(-1), rtol=1e-5, atol=1e-5)
        lse = softmax[..., 0] + softmax[..., 1].log()
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_the_form_follows_the_products():
    """Whichever has fewer, as ``absorbs`` says: not a bit differs from asking for it."""
    for shape, absorbed in (((1, 7, 9, 9, 1, 8, 8, 8), True), ((1, 3, 3, 49, 3, 8, 8, 8), False)):
        inputs, _ = sample(CASE, shape)
        with TRITON.active():
            expected = evaluate(co_attention, inputs | {"absorbed": absorbed})
            assert_same_bits(evaluate(co_attention, inputs), expected)
            other = evaluate(co_attention, inputs | {"absorbed": not absorbed})
        assert not torch.equal(other["out0"], expected["out0"])


# Bad arguments

LOCAL, GLOBAL = torch.zeros(2, 6, 12), torch.zeros(2, 3, 20)
SHAPES = ((20,), (20,), (48, 12), (48,), (48, 20), (48,), (12, 16), (12,), (20, 16), (20,))
PARAMETERS = [*(torch.zeros(shape) for shape in SHAPES), None, None]
REST = (1e-5, 0.0, None, None)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((LOCAL[0], GLOBAL, 2, *PARAMETERS, *REST), ValueError, "local: expected 3 dimensions"),
        ((LOCAL, GLOBAL[:1], 2, *PARAMETERS, *REST), ValueError, "global_: expected shape"),
        ((LOCAL[:, :0], GLOBAL, 2, *PARAMETERS, *REST), ValueError, "local: expected at least"),
        ((LOCAL, GLOBAL, 3, *PARAMETERS, *REST), ValueError, "num_heads: expected a divisor"),
        ((LOCAL, GLOBAL, 4, *PARAMETERS, *REST), ValueError, "num_heads: expected heads of 8"),
        ((LOCAL, GLOBAL, 2, LOCAL, *PARAMETERS[1:], *REST), ValueError, "global_norm_weight: exp"),
        ((LOCAL, GLOBAL, 2, *PARAMETERS[:-1], LOCAL, *REST), ValueError, "local_shift: expected"),
        ((LOCAL.double(), GLOBAL, 2, *PARAMETERS, *REST), TypeError, "local is torch.float64"),
        ((LOCAL, GLOBAL, 2, *PARAMETERS, 1e-5, 1.0, None, None), ValueError, "dropout_p: expected"),
        ((LOCAL, GLOBAL, 2, *PARAMETERS, 1e-5, 0.1, None, None), ValueError, "seed: expected a"),
    ],
)
def test_the_raw_operator_checks_too(args, error, message):
    with pytest.raises(error, match=message):
        OP(*args, False)


def test_nothing_is_kept():
    with pytest.raises(ValueError, match="keep_qkv: expected False"):
        OP(LOCAL, GLOBAL, 2, *PARAMETERS, *REST, True)


SAVED = (torch.zeros(2, 2, 6, 2), torch.zeros(2, 2, 3, 2), torch.zeros(2, 3, 16))


@pytest.mark.parametrize(
    ("grads", "saved", "error", "message"),
    [
        ((LOCAL[:1], GLOBAL), SAVED, ValueError, "grad_local: expected shape"),
        ((LOCAL, GLOBAL.half()), SAVED, TypeError, "grad_global: expected"),
        ((LOCAL, GLOBAL), (SAVED[1], *SAVED[1:]), ValueError, "local_softmax: expected shape"),
        ((LOCAL, GLOBAL), (*SAVED[:2], SAVED[2].half()), TypeError, "attended: expected"),
    ],
)
def test_the_raw_gradient_checks_too(grads, saved, error, message):
    with pytest.raises(error, match=message):
        OP_BACKWARD(*grads, LOCAL, GLOBAL, *saved, None, None, 2, *PARAMETERS, *REST)


def test_refusals_with_the_reason():
    inputs, _ = sample(CASE, (1, 2, 2, 3, 2, 8, 8, 8))
    with pytest.raises(BackendUnavailable, match="triton: the head dimension is 4"):
        co_attention(**inputs | {"num_heads": 4}, backend="triton")
    half = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with pytest.raises(BackendUnavailable, match=r"triton: local is .*bfloat16.*interpreter"):
        co_attention(**half, backend="triton")

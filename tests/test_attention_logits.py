"""The softmax of both attentions: large logits, many tiles, rows that only pad a tile."""

import dataclasses

import pytest
import torch
from cases.co_attention import CASE as CO_ATTENTION
from cases.global_attention import CASE as GLOBAL_ATTENTION
from harness import compare, exact_results, mapped, run, sample
from layouts import followed_by_nan
from torch.nn import functional as F
from variants import on_variants

from dsnet_kernels.reference import co_attention as reference
from dsnet_kernels.reference.co_attention import co_attend
from dsnet_kernels.reference.common import attend

in_both_forms = pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
on_global_attention = on_variants("global_attention", lambda variant: variant.is_kernel)
on_co_attention = on_variants("co_attention", lambda variant: variant.is_kernel)

EPS = torch.finfo(torch.float32).eps


def assert_close(got, oracle, tolerance, place=""):
    """The largest error of each result, in units of its largest value."""
    for name, value in got.items():
        exact = oracle[name]
        error = (value.double() - exact).abs().max() / exact.abs().max()
        assert error <= tolerance, f"{name}{place}: {error:.3g}, expected at most {tolerance:.3g}"


# Rows that pad a tile, in global_attention

TOKENS = (9, 49, 50, 63, 64, 65)


def shifted_biases(bias, dim, head_dim, logit):
    """The biases of Q, K and V with those of Q and K moved: scaled logits grow by ``logit``."""
    size = (abs(logit) / head_dim**0.5) ** 0.5
    bias = bias.clone()
    bias[:dim] += size
    bias[dim : 2 * dim] += size if logit > 0 else -size
    return bias


def with_global_logits_around(inputs, logit):
    width = inputs["x"].shape[2]
    bias = shifted_biases(inputs["qkv_bias"], width, width // inputs["num_heads"], logit)
    return inputs | {"qkv_bias": bias}


@on_global_attention
@pytest.mark.parametrize("logit", [-100, -500, 300])
def test_padding_never_counts_in_global_attention(variant, logit):
    """Against negative logits a padded key would win with 0; positive ones overflow in its row."""
    # Logits of this size round by more than the weights differ: of single errors chance decides. A
    # padded key that wins is an error of the results' own size.
    case = dataclasses.replace(GLOBAL_ATTENTION, slack={variant.backend: 8.0})
    counts = TOKENS if logit < 0 else TOKENS[2:]
    for count in (*counts, 1025) if variant.is_compiled else counts:
        samples = []
        for seed in range(4 if variant.is_compiled and count < 100 else 2):
            inputs, grads = sample(GLOBAL_ATTENTION, (1, count, 2, 16), seed=seed)
            inputs = with_global_logits_around(inputs, logit)
            inputs["x"], grads = followed_by_nan(inputs["x"]), [followed_by_nan(grads[0])]
            samples.append((inputs, grads))
        compare(case, variant, *samples)


# The same in co_attention

SMALL_PAIRS = [(9, 1), (1, 9), (63, 50), (49, 65)]
"""N and M about the extents of tiles."""
PAIRS = [*SMALL_PAIRS, (1, 1), (9, 49), (50, 63), (64, 64), (65, 9), (1025, 64), (65, 1025)]


def with_logits_around(inputs, logit):
    """Shifts the logits of both directions by ``logit``, those of the absorbed form too.

    That one leaves out what is the same for all of a query's keys. The local tokens themselves are
    therefore moved by the u with W_q·u = s, W_k·u = −s, W_v·u = 0; d·(−s²)/√d is the logit.
    """
    dim = inputs["local_proj_weight"].shape[1]
    size = (abs(logit) / (dim // inputs["num_heads"]) ** 0.5) ** 0.5
    shift = inputs["local"].new_tensor([size, -size, 0.0]).repeat_interleave(dim)
    bias = inputs["global_qkv_bias"] + shift
    move = torch.linalg.pinv(inputs["local_qkv_weight"]) @ shift
    local = inputs["local"] + (move / inputs["local_scale"]).view(-1, 1, 1)
    return inputs | {"global_qkv_bias": bias, "local": local}


def compare_beside_nan(variant, inputs, grads, tolerance, place):
    """Results and gradients against float64; behind both streams lie NaN."""
    oracle = exact_results(CO_ATTENTION, inputs, grads)
    inputs |= {name: followed_by_nan(inputs[name]) for name in CO_ATTENTION.activations}
    with variant.active():
        got = run(CO_ATTENTION, variant, inputs, [followed_by_nan(grad) for grad in grads])
    assert_close(got, oracle, tolerance, place)


@in_both_forms
@on_co_attention
@pytest.mark.parametrize("logit", [-100, -500])
def test_keys_that_pad_a_tile_never_win_in_co_attention(variant, logit, absorbed):
    """A padded key has the logit 0, far above the real ones."""
    pairs, heads, width = (PAIRS, 2, 72) if variant.is_compiled else (SMALL_PAIRS, 1, 32)
    # Logits are wrong by some of their roundings, weights by as much of their size. A padded key
    # that wins is an error of the results' own size.
    for seed, (local_tokens, tokens) in enumerate(pairs):
        shape = (1, 1, local_tokens, tokens, heads, 8, width, 24)
        form = {"absorbed": absorbed}
        inputs, grads = sample(CO_ATTENTION, shape, seed=seed, option=form)
        inputs, place = with_logits_around(inputs, logit), f" of {local_tokens} × {tokens}"
        compare_beside_nan(variant, inputs, grads, 16 * EPS * abs(logit), place)


def test_a_padded_key_of_logit_zero_would_show():
    """In both directions, by far more than the test above tolerates."""

    def padded(q, k, v, first_head):
        k, v = (F.pad(rows, (0, 0, 0, 1)) for rows in (k, v))
        return attend(q, k, v, 0.0)

    inputs, _ = sample(CO_ATTENTION, (1, 1, 9, 50, 2, 8, 72, 24), torch.float64)
    inputs = with_logits_around(inputs, -100)
    expected, found = reference(**inputs), co_attend(padded, **inputs, eps=1e-5)
    for stream, other in zip(expected, found, strict=True):
        assert (stream - other).abs().max() > 0.01 * stream.abs().max()


@in_both_forms
@on_co_attention
def test_queries_that_pad_a_tile_have_no_gradient(variant, absorbed):
    """The keys' bias of the absorbed form is 300: exp of it is infinite in a query's padded row."""
    for local_tokens, tokens in ((49, 9), (9, 50)):
        shape = (1, 1, local_tokens, tokens, 1, 32, 32, 24)
        inputs, grads = sample(CO_ATTENTION, shape, option={"absorbed": absorbed})
        for name in ("local_qkv_bias", "global_qkv_bias"):
            inputs[name] = shifted_biases(inputs[name], 32, 32, 300.0)
        place = f" of {local_tokens} × {tokens}"
        compare_beside_nan(variant, inputs, grads, 16 * EPS * 300, place)


# Many tiles


def two_halves(tokens, channels):
    """(1, tokens, channels): early and late tokens differ, so that no error of weights hides."""
    signs = torch.linspace(-1, 1, tokens).sign()
    return 4 * signs.view(1, -1, 1) * torch.linspace(-1, 1, channels)


@on_global_attention
def test_an_unchanged_maximum_corrects_no_sum_of_global_attention(variant):
    """All keys are the same, and so all weights, however many tiles an online softmax adds.

    A product that is fused with a subtraction is not rounded. If it is once and once not, the
    correction of an unchanged maximum is not 1, and every tile shrinks or grows the earlier sums.
    """
    inputs, _ = sample(GLOBAL_ATTENTION, (1, 1025, 1, 8))
    inputs = with_global_logits_around(inputs, 100)
    inputs["qkv_weight"][8:16] = 0
    inputs["x"] += two_halves(1025, 8)
    exact = GLOBAL_ATTENTION.reference(**mapped(inputs, torch.Tensor.double))
    with variant.active():
        got = run(GLOBAL_ATTENTION, variant, inputs)
    branches = [{"out": each.double() - inputs["x"]} for each in (got["out0"], exact)]
    assert_close(*branches, 2e-5)


@in_both_forms
@on_co_attention
@pytest.mark.parametrize("pair", [(9, 513), (513, 9)], ids=str)
def test_an_unchanged_maximum_corrects_no_sum_of_co_attention(variant, pair, absorbed):
    """The same in both directions."""
    shape = (1, 1, *pair, 1, 8, 8, 8)
    inputs, _ = sample(CO_ATTENTION, shape, option={"absorbed": absorbed, "affine": False})
    for name in ("local", "global"):
        inputs[f"{name}_qkv_bias"] = shifted_biases(inputs[f"{name}_qkv_bias"], 8, 8, 100)
        inputs[f"{name}_qkv_weight"][8:16] = 0
    inputs["local"] += two_halves(pair[0], 8).mT.unsqueeze(2)
    inputs["global_"] += two_halves(pair[1], 8)
    exact = CO_ATTENTION.reference(**mapped(inputs, torch.Tensor.double))
    with variant.active():
        got = run(CO_ATTENTION, variant, inputs)
    for stream, name, value in zip(("local", "global_"), got, exact, strict=True):
        branches = [{stream: each.double() - inputs[stream]} for each in (got[name], value)]
        assert_close(*branches, 2e-5)

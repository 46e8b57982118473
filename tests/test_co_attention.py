"""co_attention beyond what every operation is held to: padded keys, dropout, forms, memory."""

import pytest
import torch
from cases.co_attention import CASE, make
from harness import exact_results, generator, inputs_on, run, sample
from layouts import followed_by_nan
from peak_memory import printed_by
from torch.nn import functional as F
from variants import gpu_mark, on_variants, variants

import dsnet_kernels
from dsnet_kernels import BackendUnavailable, co_attention
from dsnet_kernels.backends import OPERATIONS
from dsnet_kernels.co_attention import absorbs
from dsnet_kernels.reference import co_attention as reference
from dsnet_kernels.reference.dropout import keep_mask


def on(keep):
    """Parametrizes by the variants to ``keep``."""
    return pytest.mark.parametrize(
        "variant",
        [
            pytest.param(variant, id=str(variant), marks=gpu_mark(variant))
            for variant in variants(CASE.name)
            if keep(variant)
        ],
    )


on_every_variant = on_variants(CASE.name)
on_every_kernel = on(lambda variant: variant.is_kernel)
on_compiled_kernels = on(lambda variant: variant.is_compiled)
in_both_forms = pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
needs_cpu_library = pytest.mark.skipif(
    dsnet_kernels.native.CPU.refusal is not None, reason="needs the CPU's library"
)


# Padded keys

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
    shift = torch.tensor([size, -size, 0.0]).repeat_interleave(dim)
    bias = inputs["global_qkv_bias"] + shift
    move = torch.linalg.pinv(inputs["local_qkv_weight"]) @ shift
    local = inputs["local"] + (move / inputs["local_scale"]).view(-1, 1, 1)
    return inputs | {"global_qkv_bias": bias, "local": local}


@in_both_forms
@on_every_kernel
@pytest.mark.parametrize("logit", [-100, -500])
def test_keys_that_pad_a_tile_never_win(variant, logit, absorbed):
    """A padded key has the logit 0, far above the real ones."""
    pairs, heads, width = (PAIRS, 2, 72) if variant.is_compiled else (SMALL_PAIRS, 1, 32)
    # Logits are wrong by some of their roundings, weights by as much of their size. A padded key
    # that wins is an error of the results' own size.
    tolerance = 16 * torch.finfo(torch.float32).eps * abs(logit)
    for seed, (local_tokens, tokens) in enumerate(pairs):
        shape = (1, 1, local_tokens, tokens, heads, 8, width, 24)
        inputs, grads = sample(CASE, shape, seed=seed, option={"absorbed": absorbed})
        inputs = with_logits_around(inputs, logit)
        oracle = exact_results(CASE, inputs, grads)
        inputs |= {name: followed_by_nan(inputs[name]) for name in CASE.activations}
        with variant.active():
            got = run(CASE, variant, inputs, [followed_by_nan(grad) for grad in grads])
        for name, exact in oracle.items():
            error = (got[name].double() - exact).abs().max() / exact.abs().max()
            assert error <= tolerance, f"{name} of {local_tokens} × {tokens}: {error:.3g}"


# Dropout


def kept(variant, local_tokens, tokens, dropout_p, seed, absorbed):
    """Weights of two heads over their average, (2, N, M) and (2, M, N): queries of zero.

    One-hot values and projections that copy the heads side by side put each weight in a channel of
    its own.
    """
    heads, most = 2, max(local_tokens, tokens)
    head_dim = -(-most // 8) * 8
    dim = heads * head_dim
    local_width, width = max(local_tokens, heads * tokens), heads * most
    global_ = torch.eye(tokens, width)[None]
    normal = F.layer_norm(global_, (width,))
    low, high = normal.min(), normal.max()
    values = {
        "local": torch.zeros(3, heads, head_dim, local_width),
        "global": torch.zeros(3, heads, head_dim, width),
    }
    values["local"][2] = torch.eye(head_dim, local_width)
    values["global"][2] = torch.eye(head_dim, width) / (high - low)
    bias = torch.zeros(3, dim)
    bias[2] = -low / (high - low)

    def side_by_side(width, channels):
        rows = torch.eye(head_dim)[:channels]
        return F.pad(torch.block_diag(*[rows] * heads), (0, 0, 0, width - heads * channels))

    inputs = {
        "local": torch.eye(local_width, local_tokens)[None, :, None],
        "global_": global_,
        "num_heads": heads,
        "global_norm_weight": torch.ones(width),
        "global_norm_bias": torch.zeros(width),
        "local_qkv_weight": values["local"].flatten(0, 2),
        "local_qkv_bias": torch.zeros(3 * dim),
        "global_qkv_weight": values["global"].flatten(0, 2),
        "global_qkv_bias": bias.flatten(),
        "local_proj_weight": side_by_side(local_width, tokens),
        "local_proj_bias": torch.zeros(local_width),
        "global_proj_weight": side_by_side(width, local_tokens),
        "global_proj_bias": torch.zeros(width),
        "dropout_p": dropout_p,
        "seed": seed,
        "absorbed": absorbed,
    }
    with variant.active():
        local_out, global_out = co_attention(**inputs_on(variant.device, inputs))
    by_local = (local_out.cpu() - inputs["local"]).flatten(2)[0, : heads * tokens]
    by_global = (global_out.cpu() - global_)[0, :, : heads * local_tokens]
    return (
        by_local.unflatten(0, (heads, tokens)).transpose(1, 2) * tokens,
        by_global.unflatten(1, (heads, local_tokens)).transpose(0, 1) * local_tokens,
    )


@in_both_forms
@on_every_kernel
@pytest.mark.parametrize(("local_tokens", "tokens"), [(7, 50), (69, 9), (65, 64)])
def test_every_backend_draws_the_same_masks(variant, local_tokens, tokens, absorbed):
    """The heads of global queries are counted behind those of local ones."""
    p, seed = 0.4, torch.tensor(2**40 + 3)
    by_local, by_global = kept(variant, local_tokens, tokens, p, seed, absorbed)
    for found, first_head in ((by_local, 0), (by_global, 2)):
        expected = keep_mask((1, *found.shape), p, seed, first_head)[0] / (1 - p)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@in_both_forms
@on_every_kernel
def test_masks_follow_the_seed_and_without_one_torchs_generator(variant, absorbed):
    options = {"dropout_p": 0.5, "absorbed": absorbed}
    inputs = inputs_on(
        variant.device, make(CASE.small[0], torch.float32, generator(0), **options)
    )

    def call(**seed):
        with variant.active():
            return co_attention(**inputs, **seed)

    def drawn(state):
        torch.manual_seed(state)
        return call()

    seeds = [torch.tensor(seed, device=variant.device) for seed in (1, 2)]
    given = [call(seed=seed) for seed in (seeds[0], seeds[0].clone(), seeds[1])]
    for results in (given, [drawn(state) for state in (1, 1, 2)]):
        for first, same, other in zip(*results, strict=True):
            assert torch.equal(first, same)
            assert not torch.equal(first, other)


@on(lambda variant: variant.backend == "sdpa")
def test_sdpa_refuses_dropout_with_the_reason(variant):
    inputs = inputs_on(variant.device, make(CASE.small[0], torch.float32, generator(0)))
    with variant.active(), pytest.raises(BackendUnavailable, match="a dropout mask of its own"):
        co_attention(**inputs, dropout_p=0.5)

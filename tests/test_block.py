"""The DS-Block against the NumPy oracle, and its training form against torch's own layers."""

import itertools
import re

import block_oracle as oracle
import numpy as np
import pytest
import torch
from small_network import images, randomise
from torch.nn import functional as F

from dsnet import DSBlock
from dsnet.block import DropPath, stream_widths

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def make_block(dim=16, heads=2, reduction=2, **kwargs):
    return randomise(DSBlock(dim, heads, reduction, **kwargs).double()).eval()


def image(channels, height, width, batch=2, seed=1):
    return images(height, width, batch, channels, seed=seed)


def arrays(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def run_oracle(block, x, heads):
    return oracle.ds_block(
        x.numpy(),
        arrays(block),
        num_heads=heads,
        global_dim=block.global_dim,
        reduction=block.global_reduction,
        alignment=block.co_attention is not None,
    )


@torch.no_grad()
def compare(block, x, heads):
    results = block.forward_streams(x)
    for got, expected in zip(results, run_oracle(block, x, heads), strict=True):
        np.testing.assert_allclose(got.numpy(), expected, **TOLERANCE)
    torch.testing.assert_close(block(x), results[0], rtol=0, atol=0)


# The block in evaluation


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("alignment", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_block_matches_oracle_for_every_share_of_the_streams(alpha, alignment, backend):
    block = make_block(alpha=alpha, alignment=alignment, backend=backend)
    assert (block.co_attention is not None) == (alignment and 0 < alpha < 1)
    compare(block, image(16, 7, 5), heads=2)


@pytest.mark.parametrize("reduction", [1, 2, 8])
@pytest.mark.parametrize("grid", [(7, 5), (9, 14), (8, 8), (1, 3), (16, 17)])
def test_block_matches_oracle_on_any_grid_and_reduction(grid, reduction):
    block = make_block(reduction=reduction)
    expected = tuple(max(1, size // reduction) for size in grid)
    assert block.global_grid(*grid) == expected
    compare(block, image(16, *grid), heads=2)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_block_matches_oracle_for_any_number_of_heads(heads):
    compare(make_block(heads=heads), image(16, 6, 9), heads)


@pytest.mark.parametrize("alpha", [0.25, 0.5])
@pytest.mark.parametrize("width", [2, 6, 24])
def test_block_matches_oracle_when_co_attention_has_its_own_width(width, alpha):
    block = make_block(alpha=alpha, co_attention_dim=width)
    assert block.co_attention.local_qkv.out_features == 3 * width
    compare(block, image(16, 9, 6), heads=2)


def test_block_matches_oracle_with_channels_last_input_and_another_mlp_ratio():
    block = make_block(mlp_ratio=1.5)
    assert block.mlp.fc1.out_features == 24
    compare(block, image(16, 7, 10).to(memory_format=torch.channels_last), heads=2)


def test_images_of_a_batch_do_not_see_each_other():
    block, x = make_block(), image(16, 7, 5)
    poisoned = x.clone()
    poisoned[1] = torch.nan
    with torch.no_grad():
        whole, alone = block(poisoned), block(x[:1])
    torch.testing.assert_close(whole[:1], alone, **TOLERANCE)
    assert whole[1].isnan().all()


# The comparison itself: each wrong reading of the paper must fail it


def swapped_streams(y, global_dim):
    return y[:, -global_dim:], y[:, :-global_dim]


def interleaved_heads(x, num_heads):
    return [x[:, :, k::num_heads] for k in range(num_heads)]


def padding_before_norm(y, p):
    padded = np.pad(y, ((0, 0), (0, 0), (1, 1), (1, 1)))
    normalised = oracle.batch_norm(padded, p, "local_conv.norm")
    return y + oracle.depthwise3x3(normalised, p, "local_conv.conv")[:, :, 1:-1, 1:-1]


def aligned_corners(i, size_in, size_out):
    return i * (size_in - 1) / max(1, size_out - 1)


def global_reads_updated_local(original):
    def co_attention(local, tokens, p, num_heads):
        new_local, _ = original(local, tokens, p, num_heads)
        return new_local, original(new_local, tokens, p, num_heads)[1]

    return co_attention


MUTATIONS = {
    "swapped streams": ("split_streams", swapped_streams),
    "swapped heads": ("join_heads", lambda heads: np.concatenate(heads[::-1], axis=2)),
    "interleaved heads": ("split_heads", interleaved_heads),
    "unscaled logits": ("temperature", lambda head_dim: 1.0),
    "padding before the norm": ("local_stream", padding_before_norm),
    "global stream first in the concatenation": (
        "concatenate",
        lambda local, global_: np.concatenate([global_, local], axis=1),
    ),
    "corners aligned": ("source_coordinate", aligned_corners),
    "co-attention of updated streams": (
        "co_attention",
        global_reads_updated_local(oracle.co_attention),
    ),
    "tanh GELU": (
        "gelu",
        lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    ),
    "no position": ("position", lambda x, p: x),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_oracle_comparison_notices(mutation, monkeypatch):
    block, x = make_block(), image(16, 9, 14)
    monkeypatch.setattr(oracle, *MUTATIONS[mutation])
    with torch.no_grad():
        difference = np.abs(block(x).numpy() - run_oracle(block, x, heads=2)[0]).max()
    assert difference > 1e-5
    with pytest.raises(AssertionError):
        compare(block, x, heads=2)


# Training


def plain_training_block(block, x, heads, factors=(None, None)):
    """The same block from torch's own layers, statistics of the batch, dropped branches scaled."""

    def norm(module, x):
        return F.batch_norm(x, None, None, module.weight, module.bias, training=True)

    def attend(q, k, v):
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def scaled(branch, factor):
        return branch if factor is None else branch * factor.view(-1, 1, 1, 1)

    def resize(x, grid):
        return F.interpolate(x, size=grid, mode="bilinear", align_corners=False)

    x1 = x + block.position.conv(x)
    y = block.split(norm(block.norm, x1))
    y_global, y_local = y[:, : block.global_dim], y[:, block.global_dim :]
    local = y_local + block.local_conv.conv(norm(block.local_conv.norm, y_local))
    grid = block.global_grid(*x.shape[2:])
    g0 = resize(y_global, grid).flatten(2).mT
    g1 = g0 + attend(*block.attention.qkv(block.attention.norm(g0)).chunk(3, dim=2))
    co = block.co_attention
    local_qkv = co.local_qkv(norm(co.local_norm, local).flatten(2).mT).chunk(3, dim=2)
    global_qkv = co.global_qkv(co.global_norm(g1)).chunk(3, dim=2)
    to_local = co.local_proj(attend(local_qkv[0], global_qkv[1], global_qkv[2]))
    to_global = co.global_proj(attend(global_qkv[0], local_qkv[1], local_qkv[2]))
    local = local + to_local.mT.unflatten(2, x.shape[2:])
    global_ = resize((g1 + to_global).mT.unflatten(2, grid), x.shape[2:])
    x2 = x1 + scaled(block.fuse(torch.cat([local, global_], 1)), factors[0])
    hidden = norm(block.mlp.norm, x2).permute(0, 2, 3, 1)
    branch = block.mlp.fc2(F.gelu(block.mlp.fc1(hidden))).permute(0, 3, 1, 2)
    return x2 + scaled(branch, factors[1])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_training_output_and_gradients_equal_the_plain_formulation(backend):
    block = make_block(backend=backend).train()
    x = image(16, 7, 6, batch=3).requires_grad_()
    inputs = {"x": x, **dict(block.named_parameters())}
    ours, plain = block(x), plain_training_block(block, x, heads=2)
    torch.testing.assert_close(ours, plain, **TOLERANCE)
    direction = image(16, 7, 6, batch=3, seed=9)
    ours_grads = torch.autograd.grad((ours * direction).sum(), inputs.values())
    plain_grads = torch.autograd.grad((plain * direction).sum(), inputs.values())
    for name, got, expected in zip(inputs, ours_grads, plain_grads, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert got.abs().max() > 1e-6, name


def test_training_updates_every_running_statistic_as_batch_norm_does():
    block, x = make_block().train(), image(16, 7, 6, batch=3)
    norms = [m for m in block.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 4
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    inputs = []
    original = F.batch_norm

    def recording(x, *args, **kwargs):
        inputs.append(x.detach())
        return original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "batch_norm", recording)
        plain_training_block(block, x, heads=2)
    with torch.no_grad():
        block(x)
    # Order of use in the block: norm, local_conv.norm, co_attention.local_norm, mlp.norm.
    ordered = [block.norm, block.local_conv.norm, block.co_attention.local_norm, block.mlp.norm]
    for module, seen in zip(ordered, inputs, strict=True):
        mean, var = before[norms.index(module)]
        expected_mean = 0.9 * mean + 0.1 * seen.mean((0, 2, 3))
        expected_var = 0.9 * var + 0.1 * seen.var((0, 2, 3), correction=1)
        torch.testing.assert_close(module.running_mean, expected_mean, **TOLERANCE)
        torch.testing.assert_close(module.running_var, expected_var, **TOLERANCE)
        assert module.num_batches_tracked == 1


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_gradcheck_of_the_whole_block_in_training(backend):
    block = make_block(dim=4, heads=1, mlp_ratio=1.0, backend=backend).train()
    names, parameters = zip(*block.named_parameters(), strict=True)

    def forward(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), x)

    inputs = (image(4, 3, 4).requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


def test_attention_dropout_acts_in_training_only_and_changes_both_streams():
    block, x = make_block(attn_drop=0.5), image(16, 8, 8)
    with torch.no_grad():
        assert torch.equal(block(x), block(x))
        block.train()
        torch.manual_seed(0)
        _, local, global_ = block.forward_streams(x)
        _, other_local, other_global = block.forward_streams(x)
    assert not torch.allclose(local, other_local)
    assert not torch.allclose(global_, other_global)


# Stochastic depth


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_path_factors_are_zero_or_one_over_keep_with_mean_one(p):
    torch.manual_seed(0)
    count = 20000
    factors = DropPath(p).train()(torch.empty(count, 1, dtype=torch.float64))
    assert factors.shape == (count,)
    kept = factors != 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - p)))
    # Five standard deviations of a Bernoulli mean.
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5


def test_drop_path_is_absent_in_evaluation_and_at_zero():
    x = torch.empty(4, 1)
    assert DropPath(0.5).eval()(x) is None
    assert DropPath(0.0).train()(x) is None


FACTORS = [(0.0, 2.0), (2.0, 0.0)]


@pytest.mark.parametrize("factors", list(itertools.product(FACTORS, repeat=2)))
def test_drop_path_scales_each_branch_per_image(factors):
    block, x = make_block(drop_path=0.5).train(), image(16, 7, 6)
    pair = [torch.tensor(f, dtype=torch.float64) for f in factors]
    draws = iter(pair)
    block.drop_path.forward = lambda x: next(draws)
    with torch.no_grad():
        got, expected = block(x), plain_training_block(block, x, 2, pair)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert next(draws, None) is None


def test_drop_path_draws_each_branch_anew():
    block, x = make_block(drop_path=0.5).train(), image(16, 4, 4, batch=64)
    seen = []
    block.drop_path.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.manual_seed(0)
    with torch.no_grad():
        block(x)
    assert len(seen) == 2
    assert not torch.equal(*seen)


# Arguments


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 1.5}, "alpha: expected 0 <= alpha <= 1, got 1.5"),
        ({"alpha": -0.1}, "alpha: expected 0 <= alpha <= 1, got -0.1"),
        ({"alpha": 0.2}, "multiple of 2 heads, got alpha 0.2, 3 global channels"),
        ({"reduction": 0}, "global_reduction: expected at least 1, got 0"),
        ({"heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"mlp_ratio": 0.05}, "mlp_ratio: expected at least one hidden channel at width 16, got"),
        ({"backend": "gpu"}, "backend: expected one or more of auto, "),
        ({"co_attention_dim": 7}, "divisor of co_attention_dim = 7, got 2"),
        ({"drop_path": 1.0}, "drop_path: expected 0 <= drop_path < 1, got 1.0"),
        ({"attn_drop": -0.5}, "attn_drop: expected 0 <= attn_drop < 1, got -0.5"),
    ],
)
def test_block_refuses(kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_block(**kwargs)


def test_stream_widths_follow_alpha():
    assert stream_widths(64, 1, 0.0) == (64, 0)
    assert stream_widths(320, 5, 0.25) == (240, 80)
    assert stream_widths(512, 8, 1.0) == (0, 512)

"""global_attention beyond what every operation is held to: dropout, memory, choice."""

import pytest
import torch
from cases.global_attention import CASE, make
from harness import compare, evaluate, generator, run, sample
from peak_memory import printed_by
from variants import OnDevice, on_variants

import dsnet_kernels
from dsnet_kernels import global_attention, native
from dsnet_kernels.backends import OPERATIONS
from dsnet_kernels.reference.dropout import keep_mask, philox

on_every_variant = on_variants("global_attention")
on_every_kernel = on_variants("global_attention", lambda variant: variant.is_kernel)
on_the_cpu = on_variants("global_attention", lambda variant: variant.backend == "cpu")


@on_the_cpu
@pytest.mark.parametrize("tokens", [49, 130])
def test_keeping_the_projections_changes_nothing_and_the_backward_needs_them(variant, tokens):
    inputs, (grad,) = sample(CASE, (2, tokens, 2, 24))
    x, heads, *parameters = inputs.values()
    options = (1e-5, 0.0, None)
    operator = torch.ops.dsnet_kernels.global_attention
    backward = torch.ops.dsnet_kernels.global_attention_backward
    with variant.active():
        out, lse, nothing = operator(x, heads, *parameters, *options, False)
        again, same, qkv = operator(x, heads, *parameters, *options, True)
        assert nothing.numel() == 0
        assert torch.equal(out, again)
        assert torch.equal(lse, same)
        for kept, reason in (
            (None, "qkv: expected what the forward kept, got none"),
            (qkv[:-1], "qkv: expected shape"),
            (qkv.double(), "qkv: expected Float, got Double"),
        ):
            with pytest.raises(RuntimeError, match=reason):
                backward(grad, x, lse, kept, heads, *parameters, *options)


@on_every_variant
def test_every_head_dimension_up_to_128(variant):
    step = 8 if variant.is_compiled else 40
    for head_dim in range(8, 129, step):
        compare(
            CASE, variant, *(sample(CASE, (1, 17, 2, head_dim), seed=seed) for seed in range(3))
        )


OPERATION = OPERATIONS["global_attention"]
KERNELS = sorted(set(OPERATION.present) - {"sdpa"})


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("width", "heads"), [(12, 1), (20, 5), (272, 2)])
def test_other_head_dimensions_are_refused_with_the_reason(monkeypatch, backend, width, heads):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "_library_refusal", lambda index: None)
    monkeypatch.setattr(dsnet_kernels.triton, "import_refusal", lambda: None)
    reason = OPERATION.can_run[backend](OnDevice(backend, (1, 9, width)), num_heads=heads)
    expected = f"the head dimension is {width // heads}; the kernel takes multiples of 8 up to 128"
    assert reason == expected


# Dropout

KNOWN_ANSWERS = [
    (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("seed", "counter", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(seed, counter, words):
    assert tuple(word.item() for word in philox(torch.tensor(seed), counter)) == words


def test_a_mask_keeps_its_share_and_has_no_two_equal_rows():
    mask = keep_mask((2, 3, 40, 129), 0.3, torch.tensor(7))
    assert mask.double().mean() == pytest.approx(0.7, abs=0.01)
    rows = mask.flatten(0, 2)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert not torch.equal(mask, keep_mask((2, 3, 40, 129), 0.3, torch.tensor(8)))


def weights_of(variant, tokens, heads, seed, p):
    """With one-hot values: the outputs (h, M, M), the sums of weights, the high and low value."""
    head_dim = tokens // 8 * 8 + 8  # At least one channel is no token's.
    width = heads * head_dim
    x = torch.zeros(1, tokens, width)
    for head in range(heads):
        x[0, :, head * head_dim : head * head_dim + tokens] = torch.eye(tokens)
    norm_weight, norm_bias = torch.ones(width), torch.zeros(width)
    weight = torch.zeros(3 * width, width)
    weight[2 * width :] = torch.eye(width)
    inputs = (x, heads, norm_weight, norm_bias, weight, torch.zeros(3 * width))
    arguments = {"dropout_p": p, "seed": torch.tensor(seed)}
    inputs = [t.to(variant.device) if isinstance(t, torch.Tensor) else t for t in inputs]
    arguments["seed"] = arguments["seed"].to(variant.device)
    with variant.active():
        out = global_attention(*inputs, **arguments) - inputs[0]
    normal = torch.nn.functional.layer_norm(x, (width,))
    # Of a one-hot row, normalised: the high value at its own place, the low one elsewhere.
    high, low = normal.max(), normal.min()
    read = out.cpu().view(tokens, heads, head_dim)[..., :tokens].transpose(0, 1)
    totals = out.cpu().view(tokens, heads, head_dim)[..., tokens:].transpose(0, 1)
    return read, totals.mean(-1, keepdim=True) / low, high, low


@on_every_variant
@pytest.mark.parametrize("tokens", [7, 50, 69])
def test_every_backend_draws_the_same_mask(variant, tokens):
    """Uniform weights: each output is a sum over the keys that were kept."""
    if variant.backend == "sdpa":
        x = torch.zeros(1, tokens, 8, device=variant.device)
        with (
            variant.active(),
            pytest.raises(dsnet_kernels.BackendUnavailable, match="a dropout mask"),
        ):
            global_attention(x, 1, *PLAIN, dropout_p=0.5)
        return
    p, seed, heads = 0.4, 2**40 + 3, 2
    read, sums, high, low = weights_of(variant, tokens, heads, seed, p)
    weight = 1 / (tokens * (1 - p))
    # Σ_j w_j·v_j[c] = low·Σ w + (high − low)·w_c.
    kept = ((read - low * sums) / (high - low) / weight).round().bool()
    assert torch.equal(kept, keep_mask((1, heads, tokens, tokens), p, torch.tensor(seed))[0])


PLAIN = (torch.ones(8), torch.zeros(8), torch.zeros(24, 8), torch.zeros(24))


def test_without_a_seed_the_mask_follows_torchs_generator():
    inputs = make((2, 12, 2, 8), torch.float32, generator(0), dropout_p=0.5)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(global_attention(**inputs))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (torch.zeros(1, dtype=torch.int64), ValueError, r"seed: expected shape \(\), got \(1,\)"),
        (torch.tensor(1.0), TypeError, "seed: expected torch.int64, got torch.float32"),
        (
            torch.zeros((), dtype=torch.int64, device="meta"),
            ValueError,
            "seed: expected the device",
        ),
        (3, TypeError, "seed: expected a Tensor, got int"),
    ],
)
def test_seeds_are_checked(seed, error, message):
    with pytest.raises(error, match=message):
        global_attention(torch.zeros(1, 3, 8), 1, *PLAIN, dropout_p=0.5, seed=seed)


# Empty inputs, autocast


@on_every_variant
@pytest.mark.parametrize("shape", [(0, 9), (2, 0), (0, 0)], ids=str)
def test_nothing_in_nothing_out(variant, shape):
    inputs, grads = sample(CASE, (1, 1, 2, 8))
    inputs["x"], grads = torch.zeros(*shape, 16), [torch.zeros(*shape, 16)]
    with variant.active():
        got = run(CASE, variant, inputs, grads)
    assert got["out0"].shape == got["grad x"].shape == (*shape, 16)
    for name, value in got.items():
        assert not value.any(), name


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_autocast_takes_float32_parameters(backend):
    inputs, _ = sample(CASE, (2, 9, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out = global_attention(**inputs, backend=backend)
    assert out.dtype == torch.bfloat16
    expected = evaluate(CASE.reference, inputs)["out0"]
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


# Memory and choice

PEAK = """
tokens = {tokens}
x = torch.randn(1, tokens, 64, requires_grad=True)
parameters = [torch.randn(n) for n in (64, 64)] + [torch.randn(192, 64), torch.randn(192)]
def run(x):
    dsnet_kernels.global_attention(x, 2, *parameters, backend="cpu").sum().backward()
run(x[:, :65])
before = peak()
run(x)
print(peak() - before)
"""


def added(tokens, folder):
    """KiB that forward and backward add to the peak."""
    (kib,) = printed_by(PEAK.format(tokens=tokens), folder)
    return kib


def test_memory_is_linear_in_the_tokens(tmp_path):
    """Eight times the tokens take at most ten times the memory; one score matrix would be 64."""
    few, many = added(2048, tmp_path), added(16384, tmp_path)
    print(f"{few} KiB at 2,048 tokens, {many} KiB at 16,384")
    assert many < 10 * few
    assert many < 16384**2 * 4 / 1024 / 4


def test_auto_takes_the_kernel_on_the_cpu_and_sdpa_where_there_is_none():
    x = torch.zeros(1, 9, 24)
    assert dsnet_kernels.explain("global_attention", x, num_heads=3).chosen == "cpu"
    explanation = dsnet_kernels.explain("global_attention", x, num_heads=2)
    assert explanation.chosen == "sdpa"
    assert explanation.refusals["cpu"].startswith("the head dimension is 12")
    with_dropout = dsnet_kernels.explain("global_attention", x, num_heads=2, dropout_p=0.1)
    assert with_dropout.chosen == "reference"

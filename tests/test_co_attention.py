"""co_attention beyond what every operation is held to: dropout, forms, memory."""

from functools import partial

import pytest
import torch
from cases.co_attention import CASE, make
from harness import (
    assert_same_bits,
    compare,
    evaluate,
    generator,
    inputs_on,
    mapped,
    run,
    sample,
)
from peak_memory import printed_by
from torch.nn import functional as F
from variants import OnDevice, on_variants, variants

import dsnet_kernels
from dsnet_kernels import BackendUnavailable, co_attention, native
from dsnet_kernels.backends import OPERATIONS
from dsnet_kernels.co_attention import absorbs
from dsnet_kernels.reference import co_attention as reference
from dsnet_kernels.reference.dropout import keep_mask

on_every_kernel = on_variants(CASE.name, lambda variant: variant.is_kernel)
on_compiled_kernels = on_variants(CASE.name, lambda variant: variant.is_compiled)
on_sdpa = on_variants(CASE.name, lambda variant: not variant.is_kernel)
FASTEST = {variant.backend: variant for variant in variants(CASE.name) if variant.is_compiled}
on_the_cpu = on_variants(CASE.name, lambda variant: variant == FASTEST.get("cpu"))
on_the_fastest = on_variants(CASE.name, lambda variant: variant in FASTEST.values())
in_both_forms = pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])


# What a forward keeps


@on_variants(CASE.name, lambda variant: variant.backend == "cpu")
@in_both_forms
def test_keeping_the_projections_changes_nothing_and_the_backward_needs_them(variant, absorbed):
    inputs, grads = sample(CASE, (2, 5, 7, 19, 2, 8, 12, 20))
    local, global_, *others = inputs.values()
    local, grad_local = (each.flatten(2).mT for each in (local, grads[0]))
    options = (1e-5, 0.0, None, absorbed)
    operator = torch.ops.dsnet_kernels.co_attention
    backward = torch.ops.dsnet_kernels.co_attention_backward
    with variant.active():
        *plain, no_local, no_global = operator(local, global_, *others, *options, False)
        *same, local_qkv, global_qkv = operator(local, global_, *others, *options, True)
        assert no_local.numel() == no_global.numel() == 0
        assert (local_qkv.numel() == 0) == absorbed
        for a, b in zip(plain, same, strict=True):
            assert torch.equal(a, b)
        for kept, reason in (
            ((None, global_qkv), "local_qkv: expected what the forward kept, got none"),
            ((local_qkv, None), "global_qkv: expected what the forward kept, got none"),
            ((global_qkv, global_qkv), "local_qkv: expected shape"),
            ((local_qkv, global_qkv[1:]), "global_qkv: expected shape"),
            ((local_qkv, global_qkv.double()), "global_qkv: expected Float, got Double"),
        ):
            with pytest.raises(RuntimeError, match=reason):
                backward(grad_local, grads[1], local, global_, *plain[2:], *kept, *others, *options)


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
    inputs = inputs_on(variant.device, make(CASE.small[0], torch.float32, generator(0), **options))

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


@on_sdpa
def test_sdpa_refuses_dropout_with_the_reason(variant):
    inputs = inputs_on(variant.device, make(CASE.small[0], torch.float32, generator(0)))
    with variant.active(), pytest.raises(BackendUnavailable, match="a dropout mask of its own"):
        co_attention(**inputs, dropout_p=0.5)


# Forms


@pytest.mark.parametrize(
    ("grid", "tokens", "width", "heads", "expected"),
    [
        ((56, 56), 49, 32, 1, True),
        ((28, 28), 49, 64, 2, True),
        ((14, 14), 49, 160, 5, False),
        ((7, 7), 49, 256, 8, False),
        ((200, 333), 1025, 32, 1, True),
        ((100, 166), 1025, 64, 2, False),
        ((50, 83), 1025, 160, 5, False),
        ((25, 41), 1025, 256, 8, False),
    ],
)
def test_stages_with_fewer_products_absorbed(grid, tokens, width, heads, expected):
    """Those of the tiny network at 224 px, and of a detector at 800×1333."""
    assert absorbs(grid[0] * grid[1], tokens, width, heads) is expected


@on_every_kernel
@pytest.mark.parametrize(
    ("shape", "expected"),
    list(zip(CASE.small, (False, True), strict=True)),
    ids=["projected", "absorbed"],
)
def test_without_a_choice_the_form_is_that_of_fewer_products(variant, shape, expected):
    _, height, width, tokens, heads, _, local_width, _ = shape
    assert absorbs(height * width, tokens, local_width, heads) is expected
    inputs, grads = sample(CASE, (1, *shape[1:]))
    with variant.active():
        default, absorbed, projected = (
            run(CASE, variant, inputs | {"absorbed": form}, grads) for form in (None, True, False)
        )
    chosen, other = (absorbed, projected) if expected else (projected, absorbed)
    assert_same_bits(default, chosen)
    # Otherwise a form that is ignored would pass.
    assert not all(torch.equal(default[name], value) for name, value in other.items())


@on_compiled_kernels
@in_both_forms
def test_both_forms_are_within_budget_at_a_stage_where_they_cost_alike(variant, absorbed):
    samples = [
        sample(CASE, (1, 28, 28, 49, 2, 32, 64, 64), seed=seed, option={"absorbed": absorbed})
        for seed in range(2)
    ]
    compare(CASE, variant, *samples)


# Choice

OPERATION = OPERATIONS[CASE.name]
on_kernel_backends = pytest.mark.parametrize("backend", sorted(set(OPERATION.present) - {"sdpa"}))


@on_kernel_backends
@pytest.mark.parametrize(
    ("grid", "tokens", "dim", "reason"),
    [
        ((3, 4), 9, 24, "the head dimension is 12; the kernel takes multiples of 8 up to 128"),
        ((3, 4), 9, 272, "the head dimension is 136; the kernel takes multiples of 8 up to 128"),
        ((0, 4), 9, 16, "a stream has no tokens"),
        ((3, 0), 9, 16, "a stream has no tokens"),
        ((3, 4), 0, 16, "a stream has no tokens"),
        ((3, 4), 9, 16, None),
    ],
)
def test_refusals_give_the_reason(monkeypatch, backend, grid, tokens, dim, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(native, "_library_refusal", lambda index: None)
    monkeypatch.setattr(dsnet_kernels.triton, "import_refusal", lambda: None)
    streams = OnDevice(backend, (2, 12, *grid)), OnDevice(backend, (2, tokens, 20))
    weight = OnDevice(backend, (12, dim))
    found = OPERATION.can_run[backend](*streams, num_heads=2, local_proj_weight=weight)
    assert found == reason


@pytest.mark.skipif(native.CPU.refusal is not None, reason="needs the CPU's library")
def test_auto_takes_the_kernel_on_the_cpu_and_sdpa_where_there_is_none():
    def explain(grid=(3, 4), dim=16, **options):
        return dsnet_kernels.explain(
            CASE.name,
            torch.zeros(2, 12, *grid),
            torch.zeros(2, 9, 20),
            num_heads=2,
            local_proj_weight=torch.zeros(12, dim),
            **options,
        )

    assert explain().chosen == "cpu"
    assert explain(dropout_p=0.1).chosen == "cpu"
    assert explain(dim=24).chosen == "sdpa"
    assert explain(dim=24).refusals["cpu"].startswith("the head dimension is 12")
    assert explain(dim=24, dropout_p=0.1).chosen == "reference"
    assert explain(grid=(0, 4)).chosen == "sdpa"
    assert explain(grid=(0, 4)).refusals["cpu"] == "a stream has no tokens"


@pytest.mark.skipif(native.CPU.refusal is not None, reason="needs the CPU's library")
@pytest.mark.parametrize("has_pairs", [True, False])
def test_auto_leaves_gradients_in_bfloat16_to_the_reference_where_it_is_faster(
    monkeypatch, has_pairs
):
    monkeypatch.setattr(native, "cpu_multiplies_pairs", lambda: has_pairs)

    def chosen(grid, heads, dtype=torch.bfloat16, requires_grad=True):
        local = torch.zeros(1, 64, *grid, dtype=dtype, requires_grad=requires_grad)
        global_ = torch.zeros(1, 49, 64, dtype=dtype)
        weight = torch.zeros(64, 64, dtype=dtype)
        options = {"num_heads": heads, "local_proj_weight": weight}
        return dsnet_kernels.explain(CASE.name, local, global_, **options).chosen

    assert chosen((14, 14), 4) == ("reference" if has_pairs else "cpu")
    assert chosen((56, 56), 1) == "cpu"
    assert chosen((14, 14), 4, requires_grad=False) == "cpu"
    assert chosen((14, 14), 4, dtype=torch.float32) == "cpu"
    with torch.no_grad():
        assert chosen((14, 14), 4) == "cpu"


def test_the_reference_compiles_with_dynamic_shapes_and_numbers():
    inputs = make(CASE.small[0], torch.float32, generator(0), dropout_p=0.0)

    @partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(**arguments):
        return co_attention(**arguments, backend="reference")

    for got, expected in zip(compiled(**inputs), CASE.reference(**inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("grid", "tokens"), [((0, 4), 9), ((3, 4), 0), ((0, 4), 0)])
def test_a_stream_without_tokens_leaves_the_other_with_its_bias(backend, grid, tokens):
    inputs, _ = sample(CASE, CASE.small[0])
    local, global_ = torch.ones(2, 12, *grid), torch.ones(2, tokens, 20)
    inputs |= {"local": local, "global_": global_, "backend": backend}
    got = evaluate(co_attention, inputs, [local, global_])
    assert torch.equal(got["out0"], local + inputs["local_proj_bias"].view(-1, 1, 1))
    assert torch.equal(got["out1"], global_ + inputs["global_proj_bias"])
    assert torch.equal(got["grad local"], local)
    assert torch.equal(got["grad global_"], global_)
    for name in ("local_qkv_weight", "global_qkv_weight", "global_norm_weight"):
        assert not got[f"grad {name}"].any(), name


# Size

PEAK = """
def values(*shape):
    return torch.empty(shape).uniform_(-1, 1)
def run(rows, tokens):
    def pixels():
        # In its layout at once: a copy on the way would be part of the peak before.
        return torch.empty(1, 32, rows, 333, memory_format=torch.channels_last).uniform_(-1, 1)
    local, global_ = pixels().requires_grad_(), values(1, tokens, 32).requires_grad_()
    grads = pixels(), values(1, tokens, 32)
    qkv, proj = (values(96, 32), values(96)), (values(32, 32), values(32))
    parameters = values(32), values(32), *qkv, *qkv, *proj, *proj
    before = peak()
    out = dsnet_kernels.co_attention(local, global_, 1, *parameters, backend="{backend}")
    between = peak()
    torch.autograd.grad(out, [local, global_], grads)
    return between - before, peak() - between
run(2, 65)
print(*run({rows}, 1025))
"""


def peaks(backend, rows, folder):
    """KiB that the forward, and then the backward, add to the peak."""
    return printed_by(PEAK.format(backend=backend, rows=rows), folder)


@on_the_cpu
def test_memory_is_linear_in_the_local_tokens_and_holds_no_matrix_of_weights(variant, tmp_path):
    """At the size of a detector's first stage, and at twice as many local tokens."""
    matrix = 200 * 333 * 1025 * 4 // 1024
    forward, backward = peaks(variant.backend, 200, tmp_path)
    twice_forward, twice_backward = peaks(variant.backend, 400, tmp_path)
    print(f"{forward} and {backward} KiB, then {twice_forward} and {twice_backward} KiB")
    stream = 200 * 333 * 32 * 4 // 1024
    assert stream < forward < matrix / 8
    assert stream < backward < matrix / 4
    assert twice_forward < 2.2 * forward
    assert twice_backward < 2.2 * backward


@on_the_fastest
@torch.no_grad()
def test_more_than_2_to_the_31_pairs_of_tokens(variant):
    rows, columns, tokens = 1100, 2000, 1025
    assert rows * columns * tokens > 2**31
    inputs = make((1, rows, columns, tokens, 1, 8, 8, 8), torch.float32, generator(0))
    # Token after token another mean: one that is left out shows.
    inputs["local"] += torch.linspace(0, 1, rows).view(-1, 1)
    with variant.active():
        local, global_ = co_attention(**inputs_on(variant.device, inputs))
    exact = mapped(inputs, torch.Tensor.double)
    ends = [0, -1]
    # A token's result depends on itself and all of the other stream: in float64, of a few.
    close = {"rtol": 1e-4, "atol": 1e-4}
    corners = exact["local"][:, :, ends][..., ends]
    expected, _ = reference(**exact | {"local": corners})
    torch.testing.assert_close(local.cpu()[:, :, ends][..., ends].double(), expected, **close)
    _, expected = reference(**exact | {"global_": exact["global_"][:, ends]})
    torch.testing.assert_close(global_.cpu()[:, ends].double(), expected, **close)

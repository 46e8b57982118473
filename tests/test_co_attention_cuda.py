"""The CUDA kernels of ``co_attention``, run in the emulator."""

import emulated
import emulator_build
import pytest
import torch
from cases.co_attention import make
from harness import assert_within_budget, generator

from dsnet_kernels.co_attention import _parameter_shapes, absorbs
from dsnet_kernels.reference import co_attention as reference
from dsnet_kernels.reference.dropout import keep_mask

forward, backward = emulated.functions("co_attention")
PARAMETERS = (
    "global_norm_weight",
    "global_norm_bias",
    "local_qkv_weight",
    "local_qkv_bias",
    "global_qkv_weight",
    "global_qkv_bias",
    "local_proj_weight",
    "local_proj_bias",
    "global_proj_weight",
    "global_proj_bias",
    "local_scale",
    "local_shift",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = pytest.mark.parametrize("absorbed", [True, False], ids=["absorbed", "projected"])
EPS = 1e-5
# Batch, height, width, global tokens, heads, head dimension, channels of both streams: both sides
# of every tile's limit, channels that are no multiple of 8, every width that is compiled.
SHAPES = [
    (2, 1, 3, 9, 2, 8, 3, 13),
    (1, 8, 8, 64, 1, 32, 32, 16),
    (1, 5, 13, 65, 2, 16, 36, 24),
    (2, 7, 7, 49, 3, 8, 24, 20),
    (1, 9, 15, 33, 1, 40, 72, 40),
    (1, 3, 11, 34, 1, 72, 128, 8),
]
NAMES = ("local", "global_", *PARAMETERS)


@pytest.fixture(scope="module")
def emulator():
    return emulator_build.load("co_attention")


def make_inputs(shape, dtype, seed=0, **options):
    """Arguments by name, parameters in float32, and gradients of the streams (tokens last but one).

    The local stream is (B, N, Cl) as the operators take it.
    """
    random = generator(seed)
    inputs = make(shape, torch.float32, random, **options)
    inputs["local"] = inputs["local"].flatten(2).mT.contiguous()
    for name in ("local", "global_"):
        inputs[name] = inputs[name].to(dtype)
    grads = [
        torch.randn(inputs[name].shape, generator=random).to(dtype) for name in ("local", "global_")
    ]
    return inputs, grads


def evaluate(inputs, grads, dropout_p=0.0, seed=None, convert=torch.Tensor.clone):
    """The reference's streams and gradients by name."""
    leaves = {
        name: convert(value.detach()).requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
    local = leaves["local"].mT.unsqueeze(3)
    others = {name: inputs[name] for name in inputs if name not in leaves} | leaves
    out, out_global = reference(**others | {"local": local}, dropout_p=dropout_p, seed=seed)
    outputs = (out.squeeze(3).mT, out_global)
    found = torch.autograd.grad(
        outputs, list(leaves.values()), [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    )
    named = {f"grad {name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"local": outputs[0].detach(), "global": outputs[1].detach()} | named


def run(inputs, grads, absorbed, dropout_p=0.0, dropout_seed=None, **options):
    """The kernels' streams and gradients by name; the gradients in their inputs' dtypes."""
    streams = [inputs[name] for name in NAMES[:2]]
    tail = (
        inputs["num_heads"],
        *(inputs[name] for name in PARAMETERS),
        EPS,
        dropout_p,
        dropout_seed,
        absorbed,
    )
    *outputs, local_softmax, global_softmax, attended, _, _ = forward(
        *streams, *tail, False, **options
    )
    saved = (local_softmax, global_softmax, attended)
    *grads, flat = backward(*grads, *streams, *saved, None, None, *tail, **options)
    shapes = _parameter_shapes(*(stream.shape[2] for stream in streams), attended.shape[2])
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    grads += [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    named = {
        f"grad {name}": grad
        for name, grad in zip(NAMES, grads, strict=True)
        if inputs[name] is not None
    }
    return dict(zip(("local", "global"), outputs, strict=True)) | named, saved


def assert_correct(samples, absorbed, *dropout, **options):
    """Within the budget of all samples together: by chance one of few values has little error."""
    found, same, exact = (
        {name: torch.stack([each[name] for each in results]) for name in results[0]}
        for results in (
            [run(*sample, absorbed, *dropout, **options)[0] for sample in samples],
            [evaluate(*sample, *dropout) for sample in samples],
            [evaluate(*sample, *dropout, convert=torch.Tensor.double) for sample in samples],
        )
    )
    assert_within_budget(found, same, exact, 3.0)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference_in_float64(shape, dtype, absorbed):
    assert_correct([make_inputs(shape, dtype, seed) for seed in range(2)], absorbed)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 9, 2, 8, 12, 8), (1, 6, 11, 67, 1, 40, 40, 8)], ids=str
)
def test_dropout_forward_and_backward(shape, dtype, absorbed):
    samples = [make_inputs(shape, dtype, seed) for seed in range(2)]
    assert_correct(samples, absorbed, 0.3, torch.tensor(987654321987))


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_of_the_local_tokens_are_combined(dtype, absorbed):
    inputs, grads = make_inputs((1, 5, 39, 10, 2, 16, 16, 8), dtype)
    seed = torch.tensor(3)
    assert_correct([(inputs, grads)], absorbed, 0.2, seed, splits=4, split_rows=64)
    one = run(inputs, grads, absorbed, splits=1, split_rows=256)[1]
    several = run(inputs, grads, absorbed, splits=2, split_rows=128)[1]
    # The maximum is the same; sums and results differ by the order of additions.
    assert torch.equal(one[1][..., 0], several[1][..., 0])
    torch.testing.assert_close(one[1], several[1], rtol=1e-5, atol=1e-5)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(one[2], several[2], rtol=tolerance, atol=tolerance)


@FORMS
@pytest.mark.parametrize("tokens", [9, 65])
def test_saved_softmax_is_maximum_and_sum(tokens, absorbed):
    inputs, grads = make_inputs((2, 3, 5, tokens, 2, 16, 20, 12), torch.float32)
    _, (local_softmax, global_softmax, attended) = run(inputs, grads, absorbed)
    x = {name: value.double() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    local = x["local"] * x["local_scale"] + x["local_shift"]
    norm = (x["global_norm_weight"], x["global_norm_bias"], EPS)
    global_ = torch.nn.functional.layer_norm(x["global_"], (12,), *norm)

    def heads(stream, name):
        qkv = stream @ x[f"{name}_qkv_weight"].mT + x[f"{name}_qkv_bias"]
        return qkv.view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)

    (q_local, k_local, v_local), (q_global, k_global, _) = (
        heads(local, "local"),
        heads(global_, "global"),
    )
    if absorbed:
        # What all keys have in common is a constant of each query's logits, and left out.
        common = heads(x["local_shift"].expand(2, 1, 20), "local")[1]
        k_local = k_local - common
    for saved, q, k in (
        (local_softmax, q_local, k_global),
        (global_softmax, q_global, k_local),
    ):
        logits = q @ k.mT / 4
        maximum = logits.amax(-1)
        expected = torch.stack([maximum, (logits - maximum[..., None]).exp().sum(-1)], -1)
        torch.testing.assert_close(saved.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.softmax(q_global @ k_local.mT / 4, -1)
    expected = (weights @ v_local).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attended.double(), expected, rtol=1e-5, atol=1e-5)


def strongly_negative(shape, dtype, seed):
    """Inputs whose logits are all between −500 and −100: K opposes Q along one direction."""
    inputs, grads = make_inputs(shape, dtype, seed)
    dim = inputs["local_proj_weight"].shape[1]
    # d·(−s²)/√d = −300; the projections vary it by some tens.
    size = (300 / (dim // inputs["num_heads"]) ** 0.5) ** 0.5
    for stream in ("local", "global"):
        inputs[f"{stream}_qkv_weight"] = 0.3 * inputs[f"{stream}_qkv_weight"]
        bias = inputs[f"{stream}_qkv_bias"].clone()
        bias[:dim] += size
        bias[dim : 2 * dim] -= size
        inputs[f"{stream}_qkv_bias"] = bias
    return inputs, grads


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 7, 7, 49, 1, 32, 32, 32), (2, 1, 9, 65, 1, 32, 32, 32)], ids=str
)
def test_strongly_negative_logits(shape, dtype, absorbed):
    """Padded keys with logits of 0 would take all the weight, and exp(0 − maximum) is infinite."""
    samples = [strongly_negative(shape, dtype, seed) for seed in range(2)]
    _, (local_softmax, _, _) = run(*samples[0], absorbed)
    assert -500 < local_softmax[..., 0].min() <= local_softmax[..., 0].max() < -100
    assert_correct(samples, absorbed)


@FORMS
@pytest.mark.parametrize("tokens", [9, 70])
def test_dropout_masks_are_those_of_the_reference(tokens, absorbed):
    """With Q zero every weight is the same before dropout; V shows a few keys at a time."""
    heads, head_dim, dropout_p, seed = 2, 8, 0.4, torch.tensor(2**62 + 12345)
    inputs, grads = make_inputs((1, 5, 7, tokens, heads, head_dim, 16, 16), torch.float32)
    for stream in ("local", "global"):
        inputs[f"{stream}_qkv_weight"][:16] = 0
        inputs[f"{stream}_qkv_bias"][:16] = 0
    found, (_, _, attended) = run(inputs, grads, absorbed, dropout_p, seed)
    keep = keep_mask((1, heads, tokens, 35), dropout_p, seed, heads).double() / (1 - dropout_p)
    local = inputs["local"] * inputs["local_scale"] + inputs["local_shift"]
    values = local @ inputs["local_qkv_weight"][32:].mT + inputs["local_qkv_bias"][32:]
    values = values.double().view(1, 35, heads, head_dim).transpose(1, 2)
    expected = (keep / 35 @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attended.double(), expected, rtol=1e-4, atol=1e-5)
    exact = evaluate(inputs, grads, dropout_p, seed, torch.Tensor.double)
    torch.testing.assert_close(found["local"].double(), exact["local"], rtol=1e-4, atol=1e-5)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_do_not_depend_on_the_order_of_threads(dtype, absorbed):
    inputs, grads = make_inputs((1, 5, 14, 50, 2, 16, 20, 12), dtype)
    dropout = (0.2, torch.tensor(1))
    expected, saved = run(inputs, grads, absorbed, *dropout, seed=100)
    for seed in range(2):
        found, found_saved = run(inputs, grads, absorbed, *dropout, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(saved, found_saved, strict=True))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def offset(tensor, count):
    """The same values `count` elements behind an aligned address, between others that are NaN."""
    flat = torch.full((tensor.numel() + count + 8,), float("nan"), dtype=tensor.dtype)
    flat[count : count + tensor.numel()] = tensor.flatten()
    return flat[count : count + tensor.numel()].view(tensor.shape)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 8])
def test_arguments_at_any_address(count, dtype, absorbed):
    """With and without accesses of 16 bytes; what lies around the arguments is not read."""
    inputs, grads = make_inputs((1, 3, 5, 9, 1, 16, 16, 8), dtype, affine=False)
    expected, _ = run(inputs, grads, absorbed)
    inputs = {
        name: offset(value, count) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    found, _ = run(inputs, [offset(grad, count) for grad in grads], absorbed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_images_have_empty_results_and_zero_parameter_gradients():
    inputs, grads = make_inputs((0, 3, 3, 9, 1, 8, 8, 8), torch.float32)
    found, _ = run(inputs, grads, None)
    assert found["local"].shape == inputs["local"].shape
    assert found["global"].shape == inputs["global_"].shape
    for name in PARAMETERS:
        assert torch.equal(found[f"grad {name}"], torch.zeros_like(inputs[name]))


# Batch, N, M, Cl, Cg, heads, head dimension.
LAUNCHES = [
    (1, 1, 1, 1, 1, 1, 8),
    (256, 3136, 49, 32, 32, 1, 32),
    (256, 784, 49, 64, 64, 2, 32),
    (256, 196, 49, 160, 160, 5, 32),
    (1, 66_600, 1025, 32, 32, 1, 32),
    (1, 1_000_000, 4096, 192, 192, 6, 32),
    (70_000, 49, 49, 384, 384, 12, 32),
]


@pytest.mark.parametrize("sizes", LAUNCHES)
def test_launches_cover_every_row_within_the_limits_of_a_grid(emulator, sizes):
    batch, tokens, global_tokens, width, _, heads, head_dim = sizes
    for launch in emulator.launches(sizes, -1, 0):
        assert launch.absorbed == (absorbs(tokens, global_tokens, width, heads) and width <= 128)
        assert launch.columns == (-(-width // 8) * 8 if launch.absorbed else head_dim)
        assert launch.column_tile >= launch.columns
        assert launch.local_tiles * launch.block_rows >= tokens
        assert launch.global_tiles * launch.block_rows >= global_tokens
        assert launch.splits * launch.split_rows >= tokens
        assert (launch.splits - 1) * launch.split_rows < tokens
        assert launch.split_rows % launch.block_rows == 0
        assert batch * heads * launch.global_tiles * launch.splits < 2**30
        assert f"splits {launch.splits}" in launch.text


@pytest.mark.parametrize(("address", "aligned"), [(0, True), (8, False)])
def test_unaligned_streams_are_copied(emulator, address, aligned):
    for launch in emulator.launches((1, 64, 9, 32, 32, 1, 32), 1, address):
        assert (launch.packed, launch.copies_tokens) == (aligned, not aligned)


def test_the_absorbed_form_is_for_up_to_128_channels(emulator):
    for width, absorbed in ((128, True), (136, False)):
        launch = emulator.launches((1, 64, 9, width, 32, 1, 32), 1, 0)[0]
        assert launch.absorbed == absorbed


def test_the_workspace_grows_with_the_tokens_of_each_stream_not_with_their_product(emulator):
    def size(tokens, global_tokens):
        _, launch = emulator.launches((1, tokens, global_tokens, 32, 32, 1, 32), 1, 0)
        return launch.backward_workspace

    large = size(1_000_000, 100_000)
    assert large < 1.1 * (size(1_000_000, 1) + size(64, 100_000))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 2**31, 9, 8, 8, 1, 8), "fewer than 2147483584 tokens"),
        ((2**31, 49, 49, 8, 8, 1, 8), "at most 1073741823 blocks"),
    ],
)
def test_more_tokens_than_a_grid_holds_are_refused(emulator, sizes, message):
    with pytest.raises(ValueError, match=f"local: expected {message}"):
        emulator.launches(sizes, -1, 0)

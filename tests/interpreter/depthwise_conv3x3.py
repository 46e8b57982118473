"""The Triton kernels of ``depthwise_conv3x3``, run by Triton's interpreter.

Needs ``TRITON_INTERPRET=1`` before Triton is imported; ``test_depthwise_conv3x3_triton.py`` runs
this file so.
"""

import pytest
import torch
from harness import Variant, assert_within_budget, evaluate, mapped, output_gradients
from test_depthwise_conv3x3 import LAYOUTS, generator, make

from dsnet_kernels import BackendUnavailable, depthwise_conv3x3, explain
from dsnet_kernels.reference import depthwise_conv3x3 as reference
from dsnet_kernels.triton import depthwise_conv3x3 as kernels

TRITON = Variant("triton")
OP = torch.ops.dsnet_kernels.depthwise_conv3x3_triton
OP_BACKWARD = torch.ops.dsnet_kernels.depthwise_conv3x3_triton_backward
SHAPES = (
    (3, 64, 7, 7),
    (2, 17, 5, 9),
    (1, 130, 3, 2),
    (2, 3, 2, 3),
    (2, 16, 1, 7),
    (2, 5, 7, 1),
    (1, 8, 1, 1),
    (1, 1, 4, 4),
    (0, 4, 3, 3),
    (1, 4, 17, 5),
)

in_both_dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16], ids=["float32", "float16"]
)


def run(inputs, grads):
    with TRITON.active():
        return evaluate(depthwise_conv3x3, inputs, grads)


def compare(inputs, seed=0):
    """Forward and backward within the error budget."""
    grads = output_gradients(reference, inputs, generator(seed + 1000))
    oracle = evaluate(reference, mapped(inputs, torch.Tensor.double), [g.double() for g in grads])
    got = run(inputs, grads)
    assert_within_budget(got, evaluate(reference, inputs, grads), oracle)
    return got


@in_both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", ["full", "plain"])
def test_within_budget(dtype, shape, options):
    full = options == "full"
    compare(make(shape, dtype, generator(1), affine=full, bias=full, residual=full))


@pytest.mark.parametrize("only", ["scale", "shift"])
def test_half_an_affine(only):
    args, kwargs = make((2, 12, 6, 6), torch.float32, generator(0))
    compare((args, {only: kwargs[only], "residual": True}))


@pytest.mark.parametrize("mean", [10, 1000])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_a_norm_that_takes_a_large_mean_away(mean, residual):
    """scale·x and shift cancel, as a BatchNorm's do where the mean is far above the deviation."""
    (x, *parameters), kwargs = make((2, 33, 12, 9), torch.float32, generator(0))
    scale = kwargs["scale"].abs() + 0.5
    scale[:2] = torch.tensor([0.0, 1e-30])
    shift = 0.1 * kwargs["shift"] - mean * scale
    compare(((x + mean, *parameters), {"scale": scale, "shift": shift, "residual": residual}))


@in_both_dtypes
def test_small_integers_are_exact(dtype):
    for seed, shape in enumerate(((2, 19, 6, 5), (1, 8, 1, 3), (1, 33, 17, 3))):
        inputs = make(shape, dtype, generator(seed), exact=True)
        grads = output_gradients(reference, inputs, generator(seed), exact=True)
        oracle = evaluate(
            reference, mapped(inputs, torch.Tensor.double), [g.double() for g in grads]
        )
        for name, value in run(inputs, grads).items():
            assert torch.equal(value, oracle[name].to(dtype)), name


def test_float32_parameters_beside_float16():
    (x, *parameters), kwargs = make((2, 24, 5, 5), torch.float32, generator(0))
    got = compare(((x.half(), *parameters), kwargs))
    assert got["out0"].dtype == got["grad 0"].dtype == torch.float16
    assert got["grad 1"].dtype == got["grad scale"].dtype == torch.float32


@in_both_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_bits(dtype, layout):
    (x, *parameters), kwargs = make((2, 20, 4, 7), dtype, generator(3))
    grads = output_gradients(reference, ((x, *parameters), kwargs), generator(4))
    plain = run(((x, *parameters), kwargs), grads)
    change = LAYOUTS[layout]
    other = run(((change(x), *parameters), kwargs), [change(grads[0])])
    for name, value in plain.items():
        assert torch.equal(value, other[name]), name
    assert other["out0"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("extent", [(), (1, 1, 1, 5)], ids=["scalar", "row"])
def test_expanded_gradients_and_inputs(extent):
    (x, *parameters), kwargs = make((1, 10, 5, 5), torch.float32, generator(0))
    gradient = torch.randn(extent, generator=generator(1)).expand(3, 10, 5, 5)
    inputs = ((x.expand(3, -1, -1, -1), *parameters), kwargs)
    oracle = evaluate(reference, mapped(inputs, torch.Tensor.double), [gradient.double()])
    for name, value in run(inputs, [gradient]).items():
        torch.testing.assert_close(value.double(), oracle[name], rtol=1e-5, atol=1e-5)


def test_nan_stays_in_its_image():
    (x, *parameters), kwargs = make((3, 20, 5, 7), torch.float32, generator(0))
    spoilt = x.clone()
    spoilt[1] = float("nan")
    grads = output_gradients(reference, ((x, *parameters), kwargs), generator(1))
    clean = run(((x, *parameters), kwargs), grads)
    got = run(((spoilt, *parameters), kwargs), grads)
    assert got["out0"][1].isnan().all()
    for name in ("out0", "grad 0"):
        assert torch.equal(got[name][[0, 2]], clean[name][[0, 2]])
    assert got["grad 1"].isnan().all()


def test_infinities_and_subnormals_survive():
    weight = torch.zeros(6, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    tiny = torch.finfo(torch.float32).smallest_normal / 2
    infinity, largest = float("inf"), torch.finfo(torch.float32).max
    x = torch.tensor([infinity, -infinity, tiny, -tiny, largest, 0]).view(1, 6, 1, 1)
    with TRITON.active(), torch.inference_mode():
        assert torch.equal(depthwise_conv3x3(x, weight), x)


def test_every_output_is_written():
    """Under deterministic algorithms torch fills fresh memory with NaN."""
    inputs = make((2, 37, 11, 3), torch.float32, generator(0))
    grads = output_gradients(reference, inputs, generator(1))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = run(inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in got.values())


def test_offsets_beyond_two_to_the_31_elements():
    """Two images 2³¹ elements apart: the memory between them is never touched."""
    shape, apart = (2, 24, 4, 5), 2**31 + 24
    (x, *parameters), kwargs = make(shape, torch.float16, generator(0))
    grads = output_gradients(reference, ((x, *parameters), kwargs), generator(1))

    def spread(x):
        memory = torch.empty(apart + x[0].numel(), dtype=x.dtype)
        return memory.as_strided(shape, (apart, *x.stride()[1:])).copy_(x)

    expected = run(((x, *parameters), kwargs), grads)
    got = run(((spread(x), *parameters), kwargs), [spread(grads[0])])
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_programs_that_take_several_column_blocks(monkeypatch):
    inputs = make((3, 20, 9, 30), torch.float32, generator(0))
    expected = compare(inputs)
    few = kernels.launch_for(
        torch.Size((3, 20, 9, 30)), per_thread=4, max_programs=2, registers=168
    )
    assert few.column_programs < few.column_blocks
    monkeypatch.setattr(kernels, "backward_launch", lambda shape: few)
    got = compare(inputs)
    assert torch.equal(got["grad 0"], expected["grad 0"])


@in_both_dtypes
def test_opcheck(dtype):
    (x, weight, bias), kwargs = make((2, 5, 4, 3), dtype, generator(0))
    scale, shift = kwargs["scale"], kwargs["shift"]
    for args in (
        (x, weight, bias, scale, shift, True),
        (x.contiguous(), weight, None, None, None, False),
        (x[:0], weight, bias, None, shift, True),
    ):
        torch.library.opcheck(OP, args)
    torch.library.opcheck(OP_BACKWARD, (x, x, weight, scale, shift, True))
    torch.library.opcheck(OP_BACKWARD, (x[:0], x[:0], weight, None, None, False))


def test_compiles_without_a_graph_break():
    (x, weight, bias), _ = make((2, 8, 4, 4), torch.float32, generator(1))
    compiled = torch.compile(depthwise_conv3x3, fullgraph=True, backend="aot_eager")
    grads = [torch.ones(x.shape)]
    expected = run(((x, weight, bias), {"residual": True}), grads)
    with TRITON.active():
        got = evaluate(compiled, ((x, weight, bias), {"residual": True}), grads)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0)], ids=str)
def test_vmap(in_dims):
    many = torch.randn(2, 3, 4, 3, 3, generator=generator(0))
    one = torch.randn(3, 4, 3, 3, generator=generator(1))
    x = {0: many, 1: many.movedim(0, 1), None: one}[in_dims[0]]
    weight = torch.randn(*([2] if in_dims[1] == 0 else []), 4, 1, 3, 3, generator=generator(2))
    with TRITON.active():
        got = torch.func.vmap(depthwise_conv3x3, in_dims)(x, weight)
    torch.testing.assert_close(got, torch.func.vmap(reference, in_dims)(x, weight))


X, WEIGHT = torch.zeros(2, 4, 5, 5), torch.zeros(4, 1, 3, 3)


@pytest.mark.parametrize(
    ("operator", "args", "error", "message"),
    [
        (OP, (X[0], WEIGHT, None, None, None, True), ValueError, "x: expected 4 dimensions"),
        (OP, (X[..., :0], WEIGHT, None, None, None, True), ValueError, "x: expected at least one"),
        (OP, (X, WEIGHT[:3], None, None, None, True), ValueError, "weight: expected shape"),
        (OP, (X, WEIGHT, WEIGHT, None, None, True), ValueError, "bias: expected shape"),
        (OP, (X, WEIGHT.double(), None, None, None, True), TypeError, "weight: expected"),
        (OP, (X.double(), WEIGHT, None, None, None, True), TypeError, "x is torch.float64"),
        (OP_BACKWARD, (X.half(), X, WEIGHT, None, None, True), TypeError, "grad: expected"),
        (OP_BACKWARD, (X[:1], X, WEIGHT, None, None, True), ValueError, "grad: expected shape"),
    ],
)
def test_the_raw_operators_check_too(operator, args, error, message):
    with pytest.raises(error, match=message):
        operator(*args)


def test_bfloat16_is_refused_with_the_reason():
    x, weight = X.bfloat16(), WEIGHT.bfloat16()
    with pytest.raises(BackendUnavailable, match=r"triton: x is .*bfloat16.*interpreter"):
        depthwise_conv3x3(x, weight, backend="triton")
    assert explain("depthwise_conv3x3", x).chosen != "triton"

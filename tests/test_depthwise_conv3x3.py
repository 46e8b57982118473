"""depthwise_conv3x3 on every backend, against its reference."""

import pytest
import torch
from harness import (
    OpCase,
    assert_within_budget,
    evaluate,
    mapped,
    output_gradients,
    random,
    variants,
)
from torch import Tensor

import dsnet_kernels
from dsnet_kernels import depthwise_conv3x3
from dsnet_kernels.reference import depthwise_conv3x3 as reference

SHAPES = (
    (2, 32, 56, 56),
    (3, 64, 7, 7),
    (2, 17, 5, 9),
    (1, 130, 9, 2),
    (2, 3, 2, 3),
    (2, 16, 1, 7),
    (2, 5, 7, 1),
    (1, 8, 1, 1),
    (1, 1, 4, 4),
    (0, 4, 3, 3),
)


def make(shape, dtype, generator, exact=False, affine=True, bias=True, residual=True):
    channels = shape[1]
    arguments = {"residual": residual}
    if affine:
        scale = random((channels,), dtype, generator, exact)
        arguments["scale"] = (2.0**scale).to(dtype) if exact else scale
        arguments["shift"] = random((channels,), dtype, generator, exact)
    args = [
        random(shape, dtype, generator, exact),
        random((channels, 1, 3, 3), dtype, generator, exact),
    ]
    if bias:
        args.append(random((channels,), dtype, generator, exact))
    return tuple(args), arguments


CASE = OpCase("depthwise_conv3x3", depthwise_conv3x3, reference, SHAPES, make)
VARIANTS = variants(CASE.name)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

on_every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compare(variant, inputs, seed, slack=2.0):
    """Forward and backward within the error budget."""
    grads = output_gradients(reference, inputs, generator(seed + 1000))
    oracle_inputs = mapped(inputs, Tensor.double)
    oracle = evaluate(reference, oracle_inputs, [g.double() for g in grads])
    same_dtype = evaluate(reference, inputs, grads)
    with variant.active():
        got = evaluate(depthwise_conv3x3, inputs, grads)
    assert_within_budget(got, same_dtype, oracle, slack)
    return got


def test_the_cpu_kernel_is_under_test():
    assert any(variant.backend == "cpu" for variant in VARIANTS), dsnet_kernels.explain(
        CASE.name, torch.zeros(1, 1, 1, 1), backend="cpu"
    )


@on_every_variant
@in_every_dtype
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_within_budget(variant, dtype, affine, residual):
    for seed, shape in enumerate(SHAPES):
        options = {"affine": affine, "residual": residual, "bias": seed % 2 == 0}
        compare(variant, make(shape, dtype, generator(seed), **options), seed)


@on_every_variant
@in_every_dtype
def test_small_integers_are_exact(variant, dtype):
    for seed, shape in enumerate(((2, 19, 6, 5), (1, 8, 1, 3), (2, 33, 17, 8))):
        inputs = make(shape, dtype, generator(seed), exact=True)
        # The reference rounds scale·x + shift and the sum to bfloat16; float64 rounds nothing.
        grads = output_gradients(reference, inputs, generator(seed), exact=True)
        oracle = evaluate(reference, mapped(inputs, Tensor.double), [g.double() for g in grads])
        with variant.active():
            got = evaluate(depthwise_conv3x3, inputs, grads)
        for name, value in got.items():
            assert torch.equal(value, oracle[name].to(dtype)), name


@on_every_variant
@pytest.mark.parametrize("only", ["scale", "shift"])
def test_half_an_affine(variant, only):
    args, kwargs = make((2, 12, 6, 6), torch.float32, generator(0))
    compare(variant, (args, {only: kwargs[only], "residual": True}), 0)


@on_every_variant
def test_float32_parameters_beside_bfloat16(variant):
    (x, *parameters), kwargs = make((2, 24, 9, 9), torch.float32, generator(0))
    got = compare(variant, ((x.bfloat16(), *parameters), kwargs), 0)
    assert got["out0"].dtype == got["grad 0"].dtype == torch.bfloat16
    assert got["grad 1"].dtype == got["grad scale"].dtype == torch.float32


def embedded(x: Tensor, offset: int, fill: float) -> Tensor:
    """x inside a larger channels_last tensor, everything around it ``fill``."""
    batch, channels, height, width = x.shape
    outer = torch.full((batch, channels + offset + 3, height + 2, width + 2), fill, dtype=x.dtype)
    outer = outer.to(memory_format=torch.channels_last)
    inner = outer[:, offset : offset + channels, 1:-1, 1:-1]
    return inner.copy_(x)


LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "slice_offset_1": lambda x: embedded(x, 1, 0.0),
    "slice_offset_7": lambda x: embedded(x, 7, 0.0),
    "nan_around": lambda x: embedded(x, 4, float("nan")),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_second_column": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


@on_every_variant
@in_every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_bits(variant, dtype, layout):
    inputs = make((2, 21, 6, 11), dtype, generator(3))
    grads = output_gradients(reference, inputs, generator(4))
    with variant.active():
        plain = evaluate(depthwise_conv3x3, inputs, grads)
        (x, *parameters), kwargs = inputs
        other = evaluate(
            depthwise_conv3x3,
            ((LAYOUTS[layout](x), *parameters), kwargs),
            [LAYOUTS[layout](grads[0])],
        )
    for name, value in plain.items():
        assert torch.equal(value, other[name]), name
    assert other["out0"].is_contiguous(memory_format=torch.channels_last)


@on_every_variant
def test_expanded_gradients_and_inputs(variant):
    (x, *parameters), kwargs = make((1, 10, 5, 5), torch.float32, generator(0))
    expanded = ((x.expand(3, -1, -1, -1), *parameters), kwargs)
    for gradient in (torch.ones(()), torch.randn(1, 1, 1, 5)):
        gradient = gradient.expand(3, 10, 5, 5)
        oracle = evaluate(reference, mapped(expanded, Tensor.double), [gradient.double()])
        with variant.active():
            got = evaluate(depthwise_conv3x3, expanded, [gradient])
        for name, value in got.items():
            torch.testing.assert_close(value.double(), oracle[name], rtol=1e-5, atol=1e-5)


@on_every_variant
def test_nan_stays_in_its_image(variant):
    inputs = make((3, 20, 9, 7), torch.float32, generator(0))
    (x, *parameters), kwargs = inputs
    spoilt = x.clone()
    spoilt[1] = float("nan")
    grads = output_gradients(reference, inputs, generator(1))
    with variant.active():
        clean = evaluate(depthwise_conv3x3, inputs, grads)
        got = evaluate(depthwise_conv3x3, ((spoilt, *parameters), kwargs), grads)
    assert got["out0"][1].isnan().all()
    for name in ("out0", "grad 0"):
        assert torch.equal(got[name][[0, 2]], clean[name][[0, 2]])
    assert got["grad 1"].isnan().all()


@on_every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_infinities_and_subnormals_survive(variant, dtype):
    weight = torch.zeros(9, 1, 3, 3, dtype=dtype)
    weight[:, :, 1, 1] = 1
    tiny = torch.finfo(dtype).smallest_normal / 2
    x = torch.tensor(
        [float("inf"), -float("inf"), tiny, -tiny, 1, torch.finfo(dtype).max, 0, -1, 2]
    )
    x = x.to(dtype).view(1, 9, 1, 1)
    with variant.active(), torch.inference_mode():
        assert torch.equal(depthwise_conv3x3(x, weight), x)


@on_every_variant
def test_threads_do_not_change_bits(variant):
    inputs = make((3, 48, 29, 13), torch.float32, generator(0))
    grads = output_gradients(reference, inputs, generator(1))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with variant.active():
                results.append(evaluate(depthwise_conv3x3, inputs, grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


@on_every_variant
def test_thousand_repeats_are_bit_equal(variant):
    inputs = make((2, 12, 9, 5), torch.float32, generator(0))
    grads = output_gradients(reference, inputs, generator(1))
    with variant.active():
        first = evaluate(depthwise_conv3x3, inputs, grads)
        for _ in range(1000):
            again = evaluate(depthwise_conv3x3, inputs, grads)
            assert all(torch.equal(value, again[name]) for name, value in first.items())


@on_every_variant
def test_every_output_is_written(variant):
    """Under deterministic algorithms torch fills fresh memory with NaN."""
    inputs = make((2, 37, 11, 10), torch.float32, generator(0))
    grads = output_gradients(reference, inputs, generator(1))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        with variant.active():
            got = evaluate(depthwise_conv3x3, inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in got.values())


@on_every_variant
@pytest.mark.parametrize("fault", ["zero", "tap", "padding", "residual", "halo", "channels"])
def test_the_budget_catches(variant, fault):
    """The comparison itself: each planted fault must exceed the budget."""
    inputs = make((2, 16, 8, 8), torch.float32, generator(0))
    (x, weight, bias), kwargs = inputs
    oracle = evaluate(reference, mapped(inputs, Tensor.double))
    same_dtype = evaluate(reference, inputs)
    with variant.active():
        if fault == "zero":
            out = torch.zeros_like(x)
        elif fault == "tap":
            broken = weight.clone()
            broken[:, :, 0, 2] = 0
            out = depthwise_conv3x3(x, broken, bias, **kwargs)
        elif fault == "padding":
            z = x * kwargs["scale"].view(-1, 1, 1)
            out = depthwise_conv3x3(z, weight, bias) + x
            out = out + kwargs["shift"].view(-1, 1, 1) * weight.sum((2, 3), keepdim=True)[:, 0]
        elif fault == "residual":
            out = depthwise_conv3x3(x, weight, bias, **{**kwargs, "residual": False})
        elif fault == "halo":
            out = depthwise_conv3x3(x.roll(1, dims=2), weight, bias, **kwargs)
        else:
            out = depthwise_conv3x3(x, weight.flip(0), bias, **kwargs)
    with pytest.raises(AssertionError, match=r"budget|cosine"):
        assert_within_budget({"out0": out}, same_dtype, oracle)


@on_every_variant
def test_the_budget_catches_a_gradient_of_zeros(variant):
    inputs = make((2, 16, 8, 8), torch.float32, generator(0))
    grads = output_gradients(reference, inputs, generator(1))
    oracle = evaluate(reference, mapped(inputs, Tensor.double), [g.double() for g in grads])
    with variant.active():
        got = evaluate(depthwise_conv3x3, inputs, grads)
    got["grad 1"] = torch.zeros_like(got["grad 1"])
    with pytest.raises(AssertionError, match="grad 1"):
        assert_within_budget(got, got, oracle)


@on_every_variant
def test_offsets_beyond_two_to_the_31_elements(variant):
    """Two images 2³¹ elements apart: the memory between them is never touched."""
    shape, apart = (2, 24, 4, 5), 2**31 + 24
    inputs = make(shape, torch.bfloat16, generator(0))
    grads = output_gradients(reference, inputs, generator(1))

    def spread(x: Tensor) -> Tensor:
        memory = torch.empty(apart + x[0].numel(), dtype=x.dtype)
        return memory.as_strided(shape, (apart, *x.stride()[1:])).copy_(x)

    (x, *parameters), kwargs = inputs
    with variant.active():
        expected = evaluate(depthwise_conv3x3, inputs, grads)
        got = evaluate(depthwise_conv3x3, ((spread(x), *parameters), kwargs), [spread(grads[0])])
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name

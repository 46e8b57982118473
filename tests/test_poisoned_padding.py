"""Rows that pad a tile have no input, but a shift or a bias would still give them values.

Here a shift or bias alone is more than float16 holds, and the real tokens cancel it. A padding row
that such a value reaches is infinite, and its product with a gradient of zero is no number.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from cases import CASES, on_every_kernel
from harness import Inputs, OpCase, Shape, exact_results, mapped, run, sample
from torch import Tensor
from variants import Variant

HUGE = 2.0**17
"""Twice what float16 holds; in float32 there is room for what is added."""


@dataclass(frozen=True)
class Poison:
    """``change`` makes a parameter huge, and inputs that cancel it.

    ``shape`` leaves tiles unfilled and ``option`` goes to ``make`` too. The parameters of ``single``
    stay in float32 beside activations of 16 bits.
    """

    change: Callable[[Inputs], Inputs]
    shape: Shape
    single: tuple[str, ...] = ()
    option: Inputs = field(default_factory=dict)


def mlp_with_shift(inputs: Inputs) -> Inputs:
    return inputs | {
        "x": 8 * inputs["x"].round() - 1024,
        "fc1_weight": 2 + inputs["fc1_weight"],
        "scale": torch.ones_like(inputs["scale"]),
        "shift": torch.full_like(inputs["shift"], 1024),
    }


def mlp_with_bias(inputs: Inputs) -> Inputs:
    x, weight = inputs["x"].clone(), inputs["fc1_weight"].clone()
    x[:, 0], weight[:, 0] = HUGE / 4, -4
    return inputs | {
        "x": x,
        "fc1_weight": weight,
        "fc1_bias": inputs["fc1_bias"] + HUGE,
        "scale": None,
        "shift": None,
    }


def convolution_with_shift(inputs: Inputs) -> Inputs:
    return inputs | {
        "x": 64 * inputs["x"].round() - HUGE / 16,
        "weight": 1 + inputs["weight"].round().abs(),
        "scale": torch.ones_like(inputs["scale"]),
        "shift": torch.full_like(inputs["shift"], HUGE / 16),
    }


def attention_with_bias(inputs: Inputs) -> Inputs:
    weight = inputs["qkv_weight"].clone()
    norm_weight, norm_bias = inputs["norm_weight"].clone(), inputs["norm_bias"].clone()
    norm_weight[0], norm_bias[0], weight[:, 0] = 0, -16, HUGE / 16
    return inputs | {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "qkv_weight": weight,
        "qkv_bias": inputs["qkv_bias"] + HUGE,
    }


def co_attention_with_shift(inputs: Inputs) -> Inputs:
    weight = inputs["local_qkv_weight"].clone()
    local, scale, shift = (inputs[name].clone() for name in ("local", "local_scale", "local_shift"))
    local[:, 0], scale[0], shift[0], weight[:, 0] = -1024, 1, 1024, HUGE / 1024
    changed = {"local_qkv_weight": weight, "local_scale": scale, "local_shift": shift}
    return inputs | changed | {"local": local}


def upsampling_with_bias(inputs: Inputs) -> Inputs:
    local, weight = inputs["local"].clone(), inputs["weight"].clone()
    local[:, 0], weight[:, 0] = 1024, -HUGE / 1024
    return inputs | {"local": local, "weight": weight, "bias": inputs["bias"] + HUGE}


NORM = ("norm_weight", "norm_bias", "qkv_weight", "qkv_bias")
POISONS = {
    "depthwise_conv3x3": [Poison(convolution_with_shift, (2, 24, 5, 7))],
    "global_attention": [
        Poison(attention_with_bias, (1, 9, 1, 32), NORM),
        Poison(attention_with_bias, (1, 67, 1, 32), NORM),
    ],
    # Absorbed, the attention averages the tokens before anything cancels, by rounded weights.
    "co_attention": [
        Poison(co_attention_with_shift, (1, 5, 7, 9, 1, 32, 32, 32), option={"absorbed": False}),
    ],
    "pointwise_mlp": [
        Poison(mlp_with_shift, (1, 5, 7, 64, 128)),
        Poison(mlp_with_shift, (1, 5, 7, 136, 64)),
        Poison(mlp_with_bias, (1, 5, 7, 64, 128), ("fc1_weight", "fc1_bias")),
    ],
    "upsample_concat": [Poison(upsampling_with_bias, (1, 5, 7, 3, 4, 24, 16, 24), ("bias",))],
}


def test_every_operation_has_a_poison():
    assert sorted(POISONS) == sorted(case.name for case in CASES)


@on_every_kernel
def test_padding_that_would_overflow_reaches_no_result(case: OpCase, variant: Variant):
    for poison in POISONS[case.name]:
        drawn, grads = sample(case, poison.shape, option=poison.option)
        changed = poison.change(drawn)
        for dtype in (dtype for dtype in variant.dtypes if dtype.itemsize == 2):
            inputs = mapped(changed, partial(Tensor.to, dtype=dtype))
            inputs |= {name: changed[name] for name in poison.single}
            # So small that the sums of gradients, by what is huge, stay within float16.
            above = [(grad / 256).to(dtype) for grad in grads]
            oracle = exact_results(case, inputs, above)
            with variant.active():
                got = run(case, variant, inputs, above)
            for name, exact in oracle.items():
                place = f"{poison.change.__name__} {poison.shape}, {dtype}, {name}"
                assert torch.isfinite(got[name]).all(), f"{place}: not finite"
                error = (got[name].double() - exact).abs().max() / exact.abs().max()
                assert error <= 0.1, f"{place}: error {error:.3g} of the largest value"

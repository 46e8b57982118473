"""Inputs, faults and bad arguments of ``depthwise_conv3x3``."""

import torch
from harness import BadArgument, OpCase, random

from dsnet_kernels import depthwise_conv3x3
from dsnet_kernels.reference import depthwise_conv3x3 as reference

ABSENT = {"bias": None, "scale": None, "shift": None, "residual": False}


def make(shape, dtype, generator, exact=False, only=tuple(ABSENT)):
    """``only`` names the optional arguments that are given."""
    channels = shape[1]
    scale = random((channels,), dtype, generator, exact)
    inputs = {
        "x": random(shape, dtype, generator, exact),
        "weight": random((channels, 1, 3, 3), dtype, generator, exact),
        "bias": random((channels,), dtype, generator, exact),
        "scale": 2.0**scale if exact else scale,
        "shift": random((channels,), dtype, generator, exact),
        "residual": True,
    }
    return inputs | {name: value for name, value in ABSENT.items() if name not in only}


OPTIONS = {
    "full": {},
    "weight": {"only": ()},
    **{name: {"only": (name,)} for name in ABSENT},
    "affine": {"only": ("scale", "shift")},
    "without residual": {"only": ("bias", "scale", "shift")},
    "without affine": {"only": ("bias", "residual")},
}


def missing_tap(function, inputs):
    weight = inputs["weight"].clone()
    weight[:, :, 0, 2] = 0
    return function(**inputs | {"weight": weight})


def padding_before_the_affine(function, inputs):
    x, weight, bias, scale, shift, _ = inputs.values()
    out = function(x * scale.view(-1, 1, 1), weight, bias) + x
    return out + shift.view(-1, 1, 1) * weight.sum((2, 3), keepdim=True)[:, 0]


FAULTS = {
    "missing tap": missing_tap,
    "padding before the affine": padding_before_the_affine,
    "no residual": lambda function, inputs: function(**inputs | {"residual": False}),
    "halo off by one": lambda function, inputs: function(
        **inputs | {"x": inputs["x"].roll(1, dims=2)}
    ),
    "swapped channels": lambda function, inputs: function(
        **inputs | {"weight": inputs["weight"].flip(0)}
    ),
}

X, WEIGHT = torch.zeros(2, 16, 5, 5), torch.zeros(16, 1, 3, 3)


def bad(error, message, **change):
    return BadArgument(change, error, message)


BAD = {
    "rank of x": bad(ValueError, r"x: expected 4 dimensions .* got shape \(16, 5, 5\)", x=X[0]),
    "x no tensor": bad(TypeError, "x: expected a Tensor, got list", x=[1.0]),
    "integers": bad(TypeError, "x: expected one of float32, .* got torch.int32", x=X.int()),
    "complex": bad(TypeError, "x: expected one of float32", x=X.cfloat()),
    "sparse": bad(TypeError, "x: expected layout torch.strided, got torch.sp", x=X.to_sparse()),
    "mkldnn": bad(TypeError, "x: expected layout torch.strided, got torch._mk", x=X.to_mkldnn()),
    "no column": bad(ValueError, r"x: expected at least one .*\(2, 16, 5, 0\)", x=X[..., :0]),
    "no channel": bad(ValueError, r"x: expected at least one .*\(2, 0, 5, 5\)", x=X[:, 16:]),
    "channels of weight": bad(
        ValueError,
        r"weight: expected shape \(16, 1, 3, 3\), got \(3, 1, 3, 3\)",
        x=X,
        weight=WEIGHT[:3],
    ),
    "5x5": bad(
        ValueError, r"weight: expected shape .*\(16, 1, 5, 5\)", weight=torch.zeros(16, 1, 5, 5)
    ),
    "bias": bad(ValueError, r"bias: expected shape \(16,\), got \(3,\)", bias=torch.zeros(3)),
    "scale": bad(ValueError, r"scale: expected shape \(16,\)", scale=torch.zeros(16, 1)),
    "shift": bad(TypeError, "shift: expected a Tensor, got float", shift=1.0),
    "dtype of weight": bad(
        TypeError, "weight: expected torch.float32 .* got torch.float64", weight=WEIGHT.double()
    ),
    "two lower precisions": bad(
        TypeError, "weight: expected torch.bfloat16 or", x=X.bfloat16(), weight=WEIGHT.half()
    ),
    "device of weight": bad(
        ValueError, "weight: expected the device of x, .*, got meta", weight=WEIGHT.to("meta")
    ),
}

CASE = OpCase(
    name="depthwise_conv3x3",
    function=depthwise_conv3x3,
    reference=reference,
    make=make,
    activations=("x",),
    shapes=(
        (0, 4, 3, 3),
        (1, 1, 1, 1),
        (1, 1, 4, 4),
        (1, 4, 17, 5),
        (1, 8, 1, 1),
        (1, 8, 7, 1),
        (1, 17, 4, 3),
        (1, 64, 17, 19),
        (1, 130, 3, 2),
        (1, 136, 3, 2),
        (2, 3, 1, 6),
        (2, 3, 2, 3),
        (2, 5, 7, 1),
        (2, 16, 1, 7),
        (2, 17, 5, 9),
        (2, 33, 2, 2),
        (2, 64, 3, 5),
        (3, 64, 7, 7),
    ),
    native_shapes=((2, 32, 56, 56), (1, 130, 9, 2), (65_537, 8, 1, 2)),
    small=((2, 16, 6, 5), (3, 21, 4, 7)),
    tiny=((2, 3, 4, 3), (1, 9, 1, 2)),
    exact_shapes=((1, 8, 1, 3), (2, 8, 5, 6), (2, 19, 6, 5), (1, 33, 17, 3)),
    options=OPTIONS,
    faults=FAULTS,
    bad=BAD,
    sums_follow_layout=("cuda",),
)

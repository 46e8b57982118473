"""Inputs, faults and bad arguments of ``pointwise_mlp``."""

import torch
from harness import BadArgument, OpCase, random

from dsnet_kernels import pointwise_mlp
from dsnet_kernels.reference import pointwise_mlp as reference

FACTORS = (1.25, 0.0, 2.0, 0.5)


def make(shape, dtype, generator, exact=False, bias=True, affine=True, factors=False):
    """``shape`` is (B, H, W, C, R); ``factors`` gives each image one."""
    batch, height, width, channels, hidden = shape

    def values(*size, divisor=1.0):
        return random(size, dtype, generator) / divisor

    # Scores before GELU spread over both of its ends.
    inputs = {
        "x": values(batch, channels, height, width),
        "fc1_weight": values(hidden, channels, divisor=channels**0.5 / 1.5),
        "fc1_bias": values(hidden) if bias else None,
        "fc2_weight": values(channels, hidden, divisor=hidden**0.5),
        "fc2_bias": values(channels) if bias else None,
    }
    if affine:
        inputs |= {"scale": 1 + 0.25 * values(channels), "shift": values(channels)}
    if factors:
        inputs["branch_scale"] = torch.tensor(FACTORS).repeat(batch)[:batch].to(dtype)
    return inputs


def tanh_gelu(function, inputs):
    """GELU by its approximation with tanh, applied where the second product reads it."""
    x, weight = inputs["x"], inputs["fc1_weight"]
    z = x * inputs["scale"].view(-1, 1, 1) + inputs["shift"].view(-1, 1, 1)
    hidden = torch.einsum("bchw,rc->brhw", z, weight) + inputs["fc1_bias"].view(-1, 1, 1)
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    branch = torch.einsum("brhw,cr->bchw", hidden, inputs["fc2_weight"])
    return x + branch + inputs["fc2_bias"].view(-1, 1, 1)


FAULTS = {
    "tanh": tanh_gelu,
    "no affine": lambda function, inputs: function(**inputs | {"scale": None, "shift": None}),
    "no shift": lambda function, inputs: function(**inputs | {"shift": None}),
    "no first bias": lambda function, inputs: function(**inputs | {"fc1_bias": None}),
    "no second bias": lambda function, inputs: function(**inputs | {"fc2_bias": None}),
    "no residual": lambda function, inputs: function(**inputs) - inputs["x"],
}

X = torch.zeros(2, 8, 7, 10)


def bad(error, message, **change):
    return BadArgument(change, error, message)


BAD = {
    "rank": bad(ValueError, "x: expected 4 dimensions", x=X[0]),
    "list": bad(TypeError, "x: expected a Tensor, got list", x=[1.0]),
    "integers": bad(TypeError, "x: expected one of float32, .* got torch.int32", x=X.int()),
    "rank of fc1_weight": bad(
        ValueError, "fc1_weight: expected 2 dimensions", fc1_weight=torch.zeros(16)
    ),
    "fc1_weight": bad(
        ValueError,
        r"fc1_weight: expected shape \(16, 8\), got \(16, 7\)",
        fc1_weight=torch.zeros(16, 7),
    ),
    "fc1_bias": bad(
        ValueError, r"fc1_bias: expected shape \(16,\), got \(8,\)", fc1_bias=torch.zeros(8)
    ),
    "fc2_weight": bad(
        ValueError,
        r"fc2_weight: expected shape \(8, 16\), got \(16, 8\)",
        fc2_weight=torch.zeros(16, 8),
    ),
    "fc2_bias": bad(
        ValueError, r"fc2_bias: expected shape \(8,\), got \(16,\)", fc2_bias=torch.zeros(16)
    ),
    "scale": bad(ValueError, r"scale: expected shape \(8,\), got \(1,\)", scale=torch.ones(1)),
    "shift": bad(ValueError, r"shift: expected shape \(8,\), got \(1,\)", shift=torch.ones(1)),
    "branch_scale": bad(
        ValueError,
        r"branch_scale: expected shape \(2,\), got \(3,\)",
        branch_scale=torch.ones(3),
    ),
    "dtype": bad(
        TypeError,
        "fc1_weight: expected torch.float32 .* got torch.float64",
        fc1_weight=torch.zeros(16, 8).double(),
    ),
    "device": bad(
        ValueError,
        "fc2_bias: expected the device of x, .*, got meta",
        fc2_bias=torch.zeros(8, device="meta"),
    ),
}

CASE = OpCase(
    name="pointwise_mlp",
    function=pointwise_mlp,
    reference=reference,
    make=make,
    activations=("x",),
    shapes=(
        (0, 4, 4, 8, 32),
        (1, 1, 1, 8, 32),
        (1, 7, 7, 16, 64),
        (2, 3, 17, 40, 24),
        (1, 5, 5, 5, 7),
        (3, 4, 4, 64, 256),
    ),
    native_shapes=(
        (2, 56, 56, 64, 256),
        (1, 7, 7, 512, 2048),
        (3, 14, 14, 320, 1280),
        (65_537, 2, 1, 8, 8),
    ),
    small=((2, 7, 10, 8, 16), (3, 5, 3, 9, 21)),
    tiny=((2, 2, 3, 3, 5),),
    options={
        "branch scale": {"factors": True},
        "no bias": {"bias": False},
        "no affine": {"affine": False},
    },
    faults=FAULTS,
    bad=BAD,
)

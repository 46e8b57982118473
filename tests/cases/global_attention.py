"""Inputs, faults and bad arguments of ``global_attention``."""

from functools import partial

import torch
from cancelling import of_key_biases
from harness import BadArgument, OpCase, random

from dsnet_kernels import global_attention
from dsnet_kernels.reference import global_attention as reference


def make(shape, dtype, generator, exact=False, logits=1.0, **arguments):
    """``shape`` is (B, M, heads, d); ``logits`` multiplies queries, and with them all logits."""
    batch, tokens, heads, head_dim = shape
    width = heads * head_dim
    qkv_weight = random((3 * width, width), dtype, generator) / width**0.5
    qkv_weight[:width] *= logits
    return {
        "x": random((batch, tokens, width), dtype, generator),
        "num_heads": heads,
        "norm_weight": 1 + 0.1 * random((width,), dtype, generator),
        "norm_bias": 0.1 * random((width,), dtype, generator),
        "qkv_weight": qkv_weight,
        "qkv_bias": 0.1 * random((3 * width,), dtype, generator),
        **arguments,
    }


def swapped_heads(function, inputs):
    weight = inputs["qkv_weight"].unflatten(0, (3, inputs["num_heads"], -1))
    return function(**inputs | {"qkv_weight": weight.flip(1).flatten(0, 2)})


def unscaled_logits(function, inputs):
    width = inputs["x"].shape[2]
    factors = inputs["x"].new_ones(3 * width)
    factors[:width] = (width // inputs["num_heads"]) ** 0.5
    weight, bias = inputs["qkv_weight"] * factors[:, None], inputs["qkv_bias"] * factors
    return function(**inputs | {"qkv_weight": weight, "qkv_bias": bias})


def missing_token(function, inputs):
    out = function(**inputs)
    short = function(**inputs | {"x": inputs["x"][:, :-1]})
    return torch.cat([short, out[:, -1:]], dim=1)


FAULTS = {
    "swapped heads": swapped_heads,
    "unscaled logits": unscaled_logits,
    "missing token": missing_token,
    "no residual": lambda function, inputs: function(**inputs) - inputs["x"],
}

X, WEIGHT = torch.zeros(2, 9, 16), torch.zeros(48, 16)


def bad(error, message, **change):
    return BadArgument(change, error, message)


BAD = {
    "rank of x": bad(ValueError, r"x: expected 3 dimensions .* got shape \(9, 16\)", x=X[0]),
    "integers": bad(TypeError, "x: expected one of float32, .* got torch.int32", x=X.int()),
    "heads": bad(ValueError, "num_heads: expected a divisor of .* = 16, got 3", num_heads=3),
    "no heads": bad(ValueError, "num_heads: expected a divisor of .* = 16, got 0", num_heads=0),
    "norm_weight": bad(ValueError, r"norm_weight: expected shape", norm_weight=torch.zeros(3)),
    "qkv_weight": bad(
        ValueError, r"qkv_weight: expected shape \(48, 16\), got \(16, 16\)", qkv_weight=WEIGHT[:16]
    ),
    "dtype": bad(
        TypeError,
        "qkv_weight: expected torch.float32 .* got torch.float64",
        qkv_weight=WEIGHT.double(),
    ),
    "device": bad(
        ValueError,
        "qkv_weight: expected the device of x, .*, got meta",
        qkv_weight=WEIGHT.to("meta"),
    ),
    "probability": bad(ValueError, "dropout_p: expected 0 <= dropout_p < 1, got 1", dropout_p=1.0),
}

CASE = OpCase(
    name="global_attention",
    function=global_attention,
    reference=reference,
    make=make,
    activations=("x",),
    shapes=(
        (0, 9, 1, 8),
        (1, 1, 1, 8),
        (2, 9, 2, 8),
        (1, 49, 1, 32),
        (1, 50, 2, 32),
        (1, 63, 1, 16),
        (1, 64, 1, 32),
        (1, 65, 3, 8),
    ),
    native_shapes=((1, 1025, 8, 32), (4, 49, 5, 32), (16_385, 2, 4, 8)),
    small=((2, 9, 2, 8), (3, 50, 3, 8)),
    tiny=((2, 3, 2, 8),),
    options={
        "logits around 100": {"logits": 30.0},
        "eps": {"eps": 1e-3},
        "dropout": {"dropout_p": 0.25, "seed": torch.tensor(5)},
    },
    refused={"sdpa": ("dropout",)},
    faults=FAULTS,
    bad=BAD,
    redraws=3,
    cancelling=partial(of_key_biases, reference, ("qkv_bias",)),
    # In float32, with logits around 100, torch's kernel has twelve times the reference's error. The
    # gradient of the key bias is zero: there few roundings are compared with few.
    slack={"sdpa": 24.0, "cuda": 3.0},
)

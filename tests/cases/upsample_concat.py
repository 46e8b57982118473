"""Inputs, faults and bad arguments of ``upsample_concat``."""

import torch
from harness import BadArgument, OpCase, random
from torch.nn import functional as F

from dsnet_kernels import upsample_concat
from dsnet_kernels.reference import upsample_concat as reference

FACTORS = (1.25, 0.0, 2.0, 0.5)


def make(shape, dtype, generator, exact=False, bias=True, residual=True, factors=False):
    """``shape`` is (B, H, W, Hg, Wg, Cl, Cg, C); ``factors`` gives each image one."""
    batch, height, width, rows, columns, local, global_, channels = shape

    def values(*size):
        return random(size, dtype, generator, exact)

    weight = values(channels, local + global_)
    inputs = {
        "local": values(batch, local, height, width),
        "global_": values(batch, global_, rows, columns),
        "weight": weight if exact else weight / (local + global_) ** 0.5,
        "bias": values(channels) if bias else None,
        "residual": values(batch, channels, height, width) if residual else None,
    }
    if factors:
        inputs["branch_scale"] = torch.tensor(FACTORS).repeat(batch)[:batch].to(dtype)
    return inputs


def nearest(function, inputs):
    grid = inputs["local"].shape[2:]
    return function(**inputs | {"global_": F.interpolate(inputs["global_"], size=grid)})


def aligned_corners(function, inputs):
    grid = inputs["local"].shape[2:]
    global_ = F.interpolate(inputs["global_"], size=grid, mode="bilinear", align_corners=True)
    return function(**inputs | {"global_": global_})


def global_first(function, inputs):
    width = inputs["local"].shape[1]
    return function(**inputs | {"weight": inputs["weight"].roll(width, dims=1)})


FAULTS = {
    "nearest": nearest,
    "aligned corners": aligned_corners,
    "global channels first": global_first,
    "no bias": lambda function, inputs: function(**inputs | {"bias": None}),
    "no residual": lambda function, inputs: function(**inputs | {"residual": None}),
    "swapped grid": lambda function, inputs: function(
        **inputs | {"global_": inputs["global_"].transpose(2, 3)}
    ),
}

LOCAL, GLOBAL = torch.zeros(2, 8, 7, 10), torch.zeros(2, 8, 3, 4)


def bad(error, message, **change):
    return BadArgument(change, error, message)


BAD = {
    "rank of local": bad(ValueError, "local: expected 4 dimensions", local=LOCAL[0]),
    "rank of global": bad(ValueError, "global_: expected 4 dimensions", global_=GLOBAL[0]),
    "images": bad(
        ValueError,
        r"global_: expected shape \(2, 8, 3, 4\), got \(1, 8, 3, 4\)",
        global_=GLOBAL[:1],
    ),
    "empty grid": bad(
        ValueError, "global_: expected a non-empty grid", global_=torch.zeros(2, 8, 0, 4)
    ),
    "integers": bad(
        TypeError, "local: expected one of float32, .* got torch.int32", local=LOCAL.int()
    ),
    "weight": bad(
        ValueError,
        r"weight: expected shape \(16, 16\), got \(16, 8\)",
        weight=torch.zeros(16, 8),
    ),
    "bias": bad(ValueError, r"bias: expected shape \(16,\), got \(3,\)", bias=torch.zeros(3)),
    "residual": bad(
        ValueError,
        r"residual: expected shape \(2, 16, 7, 10\), got \(2, 8, 7, 10\)",
        residual=LOCAL,
    ),
    "branch_scale": bad(
        ValueError, r"branch_scale: expected shape \(2,\)", branch_scale=torch.ones(3)
    ),
    "dtype of global": bad(
        TypeError, "global_: expected the dtype of local", global_=GLOBAL.double()
    ),
    "dtype": bad(
        TypeError,
        "weight: expected torch.float32 .* got torch.float64",
        weight=torch.zeros(16, 16).double(),
    ),
    "device": bad(
        ValueError,
        "bias: expected the device of local, .*, got meta",
        bias=torch.zeros(16, device="meta"),
    ),
}

CASE = OpCase(
    name="upsample_concat",
    function=upsample_concat,
    reference=reference,
    make=make,
    activations=("local", "global_", "residual"),
    shapes=(
        (0, 4, 4, 2, 2, 8, 8, 16),
        (1, 1, 1, 1, 1, 8, 8, 16),
        (2, 7, 3, 3, 7, 8, 8, 16),
        (1, 5, 9, 1, 1, 12, 4, 24),
        (1, 14, 14, 7, 7, 32, 32, 64),
        (2, 1, 17, 1, 5, 3, 5, 7),
    ),
    native_shapes=(
        (2, 56, 56, 7, 7, 32, 32, 64),
        (1, 50, 84, 25, 41, 64, 64, 128),
        (65_537, 2, 1, 1, 1, 2, 3, 4),
    ),
    small=((2, 7, 10, 3, 4, 8, 8, 16), (3, 5, 3, 2, 3, 5, 3, 9)),
    tiny=((2, 3, 4, 2, 3, 3, 2, 4),),
    exact_shapes=((2, 8, 8, 4, 4, 8, 8, 16), (2, 4, 12, 4, 3, 6, 10, 8)),
    options={
        "branch scale": {"factors": True},
        "no bias": {"bias": False},
        "no residual": {"residual": False},
    },
    faults=FAULTS,
    bad=BAD,
)

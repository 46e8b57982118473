"""A convolution whose kernel is its stride, with a packed weight: inference on the CPU.

out[b, o, i, j] = bias[o] + Σ weight[o, c, u, v]·x[b, c, p·i + u, p·j + v]: a product of patches,
which are gathered some at a time, and the weight, rearranged once for the instruction set in use.
"""

import torch
from torch import Tensor

from . import operators
from .packed import PackedCache


def _fake_pack(weight, bias):
    outputs, depth = weight.shape
    size = operators.padded(outputs) * (depth + 1)
    return weight.new_empty((size,), dtype=operators.accumulator(weight))


def _fake(x, packed, outputs, patch):
    batch, _, height, width = x.shape
    height, width = height // patch, width // patch
    strides = (height * width * outputs, 1, width * outputs, outputs)
    return x.new_empty_strided((batch, outputs, height, width), strides)


operators.define("patch_conv_pack", "(Tensor weight, Tensor? bias) -> Tensor", _fake_pack)
operators.define("patch_conv", "(Tensor x, Tensor packed, int outputs, int patch) -> Tensor", _fake)


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, cache: PackedCache) -> Tensor:
    """out = Conv(x) with kernel = stride = p and no padding, bias included.

    Args:
        x: (B, C, H, W) in float32 or bfloat16 on the CPU, any strides.
        weight: (O, C, p, p) in x's dtype.
        bias: (O,) in x's dtype or float32.
        cache: of the packed weight.

    Returns:
        (B, O, ⌊H/p⌋, ⌊W/p⌋) in channels_last.
    """

    def pack() -> Tensor:
        # A patch's pixels lie row by row, each with its channels.
        matrix = weight.detach().permute(0, 2, 3, 1).flatten(1)
        return torch.ops.dsnet_kernels.patch_conv_pack(matrix, bias.detach())

    packed = cache.get((weight, bias), None, pack)
    return torch.ops.dsnet_kernels.patch_conv(x, packed, weight.shape[0], weight.shape[2])

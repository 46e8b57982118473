"""Every kernel once on small inputs: ``python -m benchmarks.gpu.small_inputs cuda``.

Forward and backward of each operation on each of its kernel backends, in float32 and bfloat16, on
small stages of the network and on one of odd sizes with channels that fill no vector; attention
also on both sides of the number of tokens, and of head dimensions, where its kernels change;
co-attention also in either form, with dropout; the MLP of CUDA also with enough tokens for its
large blocks.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

import dsnet_kernels
from dsnet.bench.cases import CASES, Stage, stages
from dsnet.bench.ops import make_inputs, ours

SIZE = (64, 96)
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
DTYPES = (torch.float32, torch.bfloat16)


def small_stages() -> list[Stage]:
    regular = stages("dsnet_tiny", batch=2, size=SIZE)
    odd = dataclasses.replace(regular[0], channels=34, local_channels=17, grid=(5, 9))
    return [*regular, odd]


# Beside the case's own arguments.
OPTIONS = {
    "co_attention": (
        {"absorbed": True, "dropout_p": 0.1},
        {"absorbed": False, "dropout_p": 0.1},
    )
}

# Batch, tokens, heads, head dimension, dropout.
ATTENTION = ((2, 9, 2, 8, 0.0), (2, 49, 2, 32, 0.1), (1, 70, 2, 40, 0.1), (1, 65, 1, 128, 0.0))

# Batch, height, width, channels, hidden channels.
LARGE_MLP = (72, 8, 8, 512, 2048)


def attention(
    backend: str, shape: Sequence[float], dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Output and gradients of one call."""
    batch, tokens, heads, head_dim, dropout_p = shape
    width, generator = heads * head_dim, torch.Generator().manual_seed(0)
    sizes = ((batch, tokens, width), (width,), (width,), (3 * width, width), (3 * width,))
    values = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    x, *parameters = (value.requires_grad_() for value in values)
    out = dsnet_kernels.global_attention(
        x, heads, *parameters, dropout_p=dropout_p, backend=backend
    )
    return [out, *torch.autograd.grad(out, [x, *parameters], torch.ones_like(out))]


def mlp(backend: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Output and gradients of one call."""
    batch, height, width, channels, hidden = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    x = torch.randn((batch, channels, height, width), generator=generator)
    values = [x, *(torch.randn(size, generator=generator) / 32 for size in sizes)]
    leaves = [value.to(device, dtype).requires_grad_() for value in values]
    out = dsnet_kernels.pointwise_mlp(*leaves, backend=backend)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_inputs")
    parser.add_argument("device", choices=list(BACKENDS))
    device = parser.parse_args().device
    count = 0
    for case in CASES:
        available = case.available_backends()
        variants = product(
            [name for name in BACKENDS[device] if name in available],
            small_stages(),
            DTYPES,
            ({}, *OPTIONS.get(case.operation, ())),
        )
        for backend, stage, dtype, options in variants:
            inputs = make_inputs(case, stage, dtype, backward=True)
            inputs = inputs.map(lambda value: value.to(device))
            inputs = dataclasses.replace(inputs, constants={**inputs.constants, **options})
            values = ours(backend, case, inputs).values()
            if not all(torch.isfinite(value).all() for value in values.values()):
                raise RuntimeError(f"{case.operation} {backend} {stage} {options}: not finite")
            count += 1
    available = dsnet_kernels.available_backends("global_attention")
    for backend in (name for name in BACKENDS[device] if name in available):
        for shape in ATTENTION:
            for dtype in DTYPES:
                values = attention(backend, shape, dtype, device)
                if not all(torch.isfinite(value).all() for value in values):
                    raise RuntimeError(f"global_attention {backend} {shape}: not finite")
                count += 1
    if device == "cuda" and "cuda" in dsnet_kernels.available_backends("pointwise_mlp"):
        values = mlp("cuda", LARGE_MLP, torch.bfloat16, device)
        if not all(torch.isfinite(value).all() for value in values):
            raise RuntimeError(f"pointwise_mlp cuda {LARGE_MLP}: not finite")
        count += 1
    print(f"{count} calls forward and backward on {device}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())

"""Every kernel once on small inputs: ``python -m benchmarks.gpu.small_inputs DEVICE BACKEND``.

The list is short, since a sanitizer slows every launch down: forward and backward of each operation
in bfloat16, at one stage for each form of a kernel, and every option once. The CUDA backend, which
compiles nothing at run time, also runs in float32 and with channels that fill no vector.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import dsnet_kernels
from dsnet.bench.cases import CASES, Case, Stage, stages
from dsnet_kernels.backends import OPERATIONS

SIZE = (64, 96)
BATCH = 2
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
BF16, FLOAT32 = torch.bfloat16, torch.float32

# Besides the case's own arguments: either form with dropout.
OPTIONS = {
    "co_attention": (
        {"absorbed": True, "dropout_p": 0.1},
        {"absorbed": False, "dropout_p": 0.1},
    )
}

# Batch, tokens, heads, head dimension, dropout: few tokens and many, both sides of 64 channels.
ATTENTION = ((2, 49, 2, 32, 0.1), (1, 70, 2, 40, 0.1))
MORE_ATTENTION = ((2, 9, 2, 8, 0.0), (1, 65, 1, 128, 0.0))

# Batch, height, width, channels, hidden channels: enough tokens for CUDA's large blocks.
LARGE_MLP = (72, 8, 8, 512, 2048)

Values = Sequence[Tensor]
Call = Callable[[], Values]


def calls(backend: str, device: str) -> Iterator[tuple[str, Call]]:
    """Titles, and calls that return outputs and gradients."""
    compiles = backend == "triton"
    first, _, third, _ = stages("dsnet_tiny", BATCH, SIZE)
    odd = dataclasses.replace(first, channels=34, local_channels=17, grid=(5, 9))
    single = [case for case in CASES if len(case.operations) == 1]
    for case in (case for case in single if _has(case.operation, backend)):
        # The second use of an operation differs in its arguments alone.
        another = any(other.operation == case.operation for other in single[: single.index(case)])
        places = [(first, BF16)] if another else [(first, BF16), (third, BF16)]
        if not compiles:
            places += [(first, FLOAT32), (odd, BF16)]
        for stage, dtype in places:
            title = f"{case.operation} {case.use}, stage {stage.number}, {dtype}"
            yield title, partial(operation, case, stage, dtype, {}, backend, device)
        for options in OPTIONS.get(case.operation, ()):
            title = f"{case.operation} {options}"
            yield title, partial(operation, case, first, BF16, options, backend, device)
    if _has("global_attention", backend):
        for shape in ATTENTION if compiles else ATTENTION + MORE_ATTENTION:
            title = f"global_attention {shape}"
            yield title, partial(attention, backend, shape, BF16, device)
    if backend == "cuda" and _has("pointwise_mlp", backend):
        yield f"pointwise_mlp {LARGE_MLP}", partial(mlp, backend, LARGE_MLP, BF16, device)


def _has(operation: str, backend: str) -> bool:
    """Whether there is such a backend. One that cannot be used here raises when it is called."""
    return backend == "reference" or backend in OPERATIONS[operation].present


def operation(
    case: Case, stage: Stage, dtype: torch.dtype, options: dict, backend: str, device: str
) -> Values:
    tensors = case.tensors(stage, dtype, seed=0)
    leaves = {name: value.to(device).requires_grad_() for name, value in tensors.items()}
    arguments = {**case.constants(stage), **options, "backend": backend}
    function = case.function(partial(getattr, dsnet_kernels))
    return _backward(function(**leaves, **arguments), list(leaves.values()))


def attention(backend: str, shape: Sequence[float], dtype: torch.dtype, device: str) -> Values:
    batch, tokens, heads, head_dim, dropout_p = shape
    width, generator = heads * head_dim, torch.Generator().manual_seed(0)
    sizes = ((batch, tokens, width), (width,), (width,), (3 * width, width), (3 * width,))
    values = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    x, *parameters = leaves = [value.requires_grad_() for value in values]
    out = dsnet_kernels.global_attention(
        x, heads, *parameters, dropout_p=dropout_p, backend=backend
    )
    return _backward(out, leaves)


def mlp(backend: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> Values:
    batch, height, width, channels, hidden = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    x = torch.randn((batch, channels, height, width), generator=generator)
    values = [x, *(torch.randn(size, generator=generator) / 32 for size in sizes)]
    leaves = [value.to(device, dtype).requires_grad_() for value in values]
    return _backward(dsnet_kernels.pointwise_mlp(*leaves, backend=backend), leaves)


def _backward(outputs: Tensor | tuple[Tensor, ...], leaves: list[Tensor]) -> Values:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    grads = [torch.ones_like(out) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def run(backend: str, device: str) -> int:
    """Makes every call; returns their number.

    Raises:
        RuntimeError: for values that are not finite.
    """
    count = 0
    for title, call in calls(backend, device):
        print(title, flush=True)
        if not all(torch.isfinite(value).all() for value in call()):
            raise RuntimeError(f"{title}: not finite")
        count += 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_inputs")
    parser.add_argument("device", choices=list(BACKENDS))
    parser.add_argument(
        "backend", choices=sorted({b for names in BACKENDS.values() for b in names})
    )
    args = parser.parse_args()
    count = run(args.backend, args.device)
    print(f"{count} calls forward and backward of {args.backend} on {args.device}")
    return 0 if count else 1


if __name__ == "__main__":
    sys.exit(main())

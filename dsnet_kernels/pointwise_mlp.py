"""The block's MLP of two 1×1 convolutions, with its normalisation and residual.

On the CPU both products run over blocks of tokens whose hidden activations stay in the cache, on a
GPU those of narrow layers in 16 bits stay on the chip; other layers there are two products with
GELU at the end of the first. The backward reads what the forward kept before GELU, or recomputes it
where it would be large in memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, native, operators, triton
from .backends import Operation, register, select
from .reference import pointwise_mlp as reference


def _kernel_refusal(x: Tensor, fc1_weight: Tensor) -> str | None:
    """Why the kernels do not take these widths, or None."""
    if fc1_weight.numel() == 0:
        return f"fc1_weight has shape {tuple(fc1_weight.shape)}; the kernel multiplies by it"
    return None


def _cpu_can_run(x: Tensor, fc1_weight: Tensor) -> str | None:
    return native.cpu_can_run(x) or _kernel_refusal(x, fc1_weight)


def _cuda_can_run(x: Tensor, fc1_weight: Tensor) -> str | None:
    return native.cuda_can_run(x) or _kernel_refusal(x, fc1_weight)


def _triton_can_run(x: Tensor, fc1_weight: Tensor) -> str | None:
    return triton.can_run(x) or _kernel_refusal(x, fc1_weight)


FUSED_WIDTH = 128
"""Channels up to which the CUDA kernel keeps the hidden activations on the chip."""


def _triton_loses(x: Tensor, fc1_weight: Tensor) -> str | None:
    return native.tf32_loss(x, "conv")


def _cuda_loses(x: Tensor, fc1_weight: Tensor) -> str | None:
    if x.device.type != "cuda":
        return None
    if x.dtype == torch.float32:
        reason = "its float32 products leave the tensor cores idle"
    elif x.shape[1] > FUSED_WIDTH:
        reason = f"above {FUSED_WIDTH} channels its products are made for GPUs before Hopper"
    else:
        return None
    tf32 = native.tf32_loss(x, "conv")
    return tf32 or f"{reason} (predicted to be slower than cuBLAS, not measured)"


OPERATION = register(
    Operation(
        "pointwise_mlp",
        tensors=("x", "fc1_weight"),
        present={
            "cpu": native.cpu_refusal,
            "triton": lambda: triton.REFUSAL,
            "cuda": native.cuda_refusal,
        },
        can_run={"cpu": _cpu_can_run, "triton": _triton_can_run, "cuda": _cuda_can_run},
        loses={"triton": _triton_loses, "cuda": _cuda_loses},
    )
)

NATIVE, TRITON = "pointwise_mlp", "pointwise_mlp_triton"
"""Names of the raw operators; that of the gradient ends in ``_backward``."""


def keeps_hidden(x: Tensor) -> bool:
    """Whether the forward keeps the hidden activations for the backward.

    Narrow ones are recomputed: their products take no longer than their way through memory.
    """
    return x.shape[1] > (64 if x.device.type == "cpu" else 128)


def hidden_size(x: Tensor, fc1_weight: Tensor) -> int:
    """Elements of what the forward keeps: R per token, tokens in whole sixteens, in any order."""
    tokens = x.shape[0] * x.shape[2] * x.shape[3]
    return (tokens + 15) // 16 * 16 * fc1_weight.shape[0]


def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, branch_scale, keep_hidden):
    kept = hidden_size(x, fc1_weight) if keep_hidden else 0
    return operators.empty_channels_last(x), x.new_empty((kept,))


def _fake_backward(grad, x, hidden, fc1_weight, fc1_bias, fc2_weight, scale, shift, branch_scale):
    channels, width = x.shape[1], fc1_weight.shape[0]
    shapes = ((width, channels), (width,), (channels, width), *((channels,),) * 3)
    dtype = operators.accumulator(x)
    parameters = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return operators.empty_channels_last(x), *parameters


for _name in (NATIVE, TRITON):
    operators.define(
        _name,
        "(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias,"
        " Tensor? scale, Tensor? shift, Tensor? branch_scale, bool keep_hidden)"
        " -> (Tensor, Tensor)",
        _fake,
    )
    operators.define(
        f"{_name}_backward",
        "(Tensor grad, Tensor x, Tensor? hidden, Tensor fc1_weight, Tensor? fc1_bias,"
        " Tensor fc2_weight, Tensor? scale, Tensor? shift, Tensor? branch_scale)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake_backward,
    )


triton.implement("pointwise_mlp")


class _PointwiseMlp(torch.autograd.Function):
    """A raw operator under autograd; saves x, the parameters and perhaps the hidden activations."""

    generate_vmap_rule = True

    @staticmethod
    @checks.with_signature
    def forward(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, branch_scale, keep_hidden, name
    ):
        operator = getattr(torch.ops.dsnet_kernels, name)
        return operator(
            x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, branch_scale, keep_hidden
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, keep_hidden, ctx.name = inputs
        hidden = output[1]
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, hidden if keep_hidden else None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 10
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift, branch_scale, hidden = (
            ctx.saved_tensors
        )
        operator = getattr(torch.ops.dsnet_kernels, f"{ctx.name}_backward")
        grad_x, *grads = operator(
            grad, x, hidden, fc1_weight, fc1_bias, fc2_weight, scale, shift, branch_scale
        )
        parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale, shift)
        grads = [
            None if parameter is None else each.to(parameter.dtype)
            for parameter, each in zip(parameters, grads, strict=True)
        ]
        grad_factors = None
        if ctx.needs_input_grad[7]:
            branch = reference(x, *parameters[:4], scale=scale, shift=shift) - x
            grad_factors = (grad * branch).sum((1, 2, 3)).to(branch_scale.dtype)
        return grad_x, *grads, grad_factors, None, None


def pointwise_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    branch_scale: Tensor | None = None,
    backend: str | Sequence[str] | None = None,
) -> Tensor:
    """x + branch_scale·(W₂·GELU(W₁·(scale·x + shift) + b₁) + b₂) at every pixel.

    GELU is the exact one, u·Φ(u) with Φ through erf.

    Args:
        x: (B, C, H, W); float32, float64, bfloat16 or float16. Layouts without adjacent channels
            are copied first.
        fc1_weight: (R, C), R hidden channels.
        fc1_bias: (R,) or None.
        fc2_weight: (C, R).
        fc2_bias: (C,) or None.
        scale: (C,) or None, a folded BatchNorm.
        shift: (C,) or None.
        branch_scale: (B,) or None, one factor per image (stochastic depth). Where it wants a
            gradient, every backend recomputes the branch with the reference for it.
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`.

    Parameters may be float32 beside a lower-precision x, whose dtype both products then read; sums
    and GELU are in float32 (float64 for float64). Under autocast a float32 x is cast to the
    autocast dtype, the parameters are not.

    Returns:
        (B, C, H, W) in x's dtype, channels_last from a kernel.

    Raises:
        TypeError, ValueError: for a wrong dtype, device or shape.
        BackendUnavailable: if a named backend cannot run.

    Differentiable once in x and the parameters on every backend (``"reference"``: to any order);
    results and gradients do not depend on the number of threads.

    Source: DS-Net (arXiv 2105.14734), the MLP that ends every DS-Block.
    """
    checks.dims("x", x, "BCHW")
    checks.floating("x", x)
    batch, channels = x.shape[:2]
    checks.dims("fc1_weight", fc1_weight, "OI")
    hidden = fc1_weight.shape[0]
    checks.shape("fc1_weight", fc1_weight, (hidden, channels))
    checks.optional_shape("fc1_bias", fc1_bias, (hidden,))
    checks.shape("fc2_weight", fc2_weight, (channels, hidden))
    checks.optional_shape("fc2_bias", fc2_bias, (channels,))
    checks.optional_shape("scale", scale, (channels,))
    checks.optional_shape("shift", shift, (channels,))
    checks.optional_shape("branch_scale", branch_scale, (batch,))
    x = checks.autocast(x)
    checks.parameters(
        "x",
        x,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
        scale=scale,
        shift=shift,
        branch_scale=branch_scale,
    )
    chosen = select(OPERATION, backend, x, fc1_weight)
    parameters = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if chosen == "reference":
        return reference(x, *parameters, scale=scale, shift=shift, branch_scale=branch_scale)
    name = TRITON if chosen == "triton" else NATIVE
    operands = (x, *parameters, scale, shift, branch_scale)
    if not checks.differentiates():
        return getattr(torch.ops.dsnet_kernels, name)(*operands, False)[0]
    keep_hidden = keeps_hidden(x)
    return _PointwiseMlp.apply(*checks.distinct(*operands), keep_hidden, name)[0]

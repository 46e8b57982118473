"""Self-attention among the global tokens, with its LayerNorm and residual.

Where an image's tokens are few, everything from the LayerNorm to the residual is one kernel; where
they are many, attention is tiled with an online softmax and memory stays linear in the tokens. The
backward recomputes from x, the saved logarithm of each softmax's sum and, on the CPU, what the
forward kept of its projections.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import checks, native, operators, triton
from .backends import Operation, register, select
from .reference import common
from .reference import global_attention as reference
from .reference.dropout import new_seed


def _head_dim_refusal(x: Tensor, num_heads: int | None = None, **_) -> str | None:
    return None if num_heads is None else checks.head_dim_refusal(x.shape[2] // num_heads)


def _cpu_can_run(x: Tensor, **options) -> str | None:
    return native.cpu_can_run(x) or _head_dim_refusal(x, **options)


def _cuda_can_run(x: Tensor, **options) -> str | None:
    return native.cuda_can_run(x) or _head_dim_refusal(x, **options)


def _triton_can_run(x: Tensor, **options) -> str | None:
    return triton.can_run(x) or _head_dim_refusal(x, **options)


def _sdpa_can_run(x: Tensor, dropout_p: float = 0.0, **_) -> str | None:
    if dropout_p > 0:
        return "scaled_dot_product_attention draws a dropout mask of its own"
    return None


def _gpu_loses(x: Tensor, **_) -> str | None:
    return native.tf32_loss(x, "matmul")


OPERATION = register(
    Operation(
        "global_attention",
        tensors=("x",),
        present={
            "cpu": native.cpu_refusal,
            "triton": lambda: triton.REFUSAL,
            "cuda": native.cuda_refusal,
            "sdpa": lambda: None,
        },
        can_run={
            "cpu": _cpu_can_run,
            "triton": _triton_can_run,
            "cuda": _cuda_can_run,
            "sdpa": _sdpa_can_run,
        },
        loses={"triton": _gpu_loses, "cuda": _gpu_loses},
    )
)

NATIVE, TRITON = "global_attention", "global_attention_triton"
"""Names of the raw operators; that of the gradient ends in ``_backward``."""


def keeps_qkv(x: Tensor) -> bool:
    """Whether the forward keeps the projections for the backward, which takes them or has its own.

    On the CPU a product costs many times the way of its result through memory.
    """
    return x.device.type == "cpu"


def qkv_size(batch: int, tokens: int, num_heads: int, head_dim: int) -> int:
    """Elements of one stream's kept projections, each head's in whole registers."""
    return batch * num_heads * tokens * operators.padded(3 * head_dim)


def _fake(x, num_heads, *others):
    keep_qkv = others[-1]
    (batch, tokens, width), dtype = x.shape, operators.accumulator(x)
    kept = qkv_size(batch, tokens, num_heads, width // num_heads) if keep_qkv else 0
    lse = x.new_empty((batch, num_heads, tokens), dtype=dtype)
    return x.new_empty(x.shape), lse, x.new_empty((kept,), dtype=dtype)


def _fake_backward(grad, x, *others):
    width, dtype = x.shape[2], operators.accumulator(x)
    shapes = ((width,), (width,), (3 * width, width), (3 * width,))
    return x.new_empty(x.shape), *(x.new_empty(shape, dtype=dtype) for shape in shapes)


_PARAMETERS = (
    "int num_heads, Tensor norm_weight, Tensor norm_bias, Tensor qkv_weight, Tensor qkv_bias,"
    " float eps, float dropout_p, Tensor? seed"
)

for _name in (NATIVE, TRITON):
    operators.define(
        _name, f"(Tensor x, {_PARAMETERS}, bool keep_qkv) -> (Tensor, Tensor, Tensor)", _fake
    )
    operators.define(
        f"{_name}_backward",
        f"(Tensor grad, Tensor x, Tensor lse, Tensor? qkv, {_PARAMETERS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake_backward,
    )


triton.implement("global_attention")


class _GlobalAttention(torch.autograd.Function):
    """A raw operator under autograd.

    Saves x, the parameters, the seed, (B, h, M) of sums and perhaps the projections.
    """

    generate_vmap_rule = True

    @staticmethod
    @checks.with_signature
    def forward(
        x,
        num_heads,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        eps,
        dropout_p,
        seed,
        keep_qkv,
        name,
    ):
        operator = getattr(torch.ops.dsnet_kernels, name)
        parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias)
        return operator(x, num_heads, *parameters, eps, dropout_p, seed, keep_qkv)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.num_heads, *parameters, ctx.eps, ctx.dropout_p, seed, keep_qkv, ctx.name = inputs
        _, lse, qkv = output
        ctx.mark_non_differentiable(lse, qkv)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, lse, qkv if keep_qkv else None, seed, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, lse, qkv, seed, *parameters = ctx.saved_tensors
        operator = getattr(torch.ops.dsnet_kernels, f"{ctx.name}_backward")
        grad_x, *grads = operator(
            grad, x, lse, qkv, ctx.num_heads, *parameters, ctx.eps, ctx.dropout_p, seed
        )
        grads = (g.to(p.dtype) for g, p in zip(grads, parameters, strict=True))
        return grad_x, None, *grads, None, None, None, None, None


def _sdpa(x, num_heads, norm_weight, norm_bias, qkv_weight, qkv_bias, eps):
    """The same through ``F.scaled_dot_product_attention``."""
    qkv = common.linear(common.layer_norm(x, norm_weight, norm_bias, eps), qkv_weight, qkv_bias)
    q, k, v = common.split_heads(qkv, 3, num_heads)
    return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def global_attention(
    x: Tensor,
    num_heads: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    *,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | Sequence[str] | None = None,
) -> Tensor:
    """x + concat_h dropout(softmax(Q_h·K_hᵀ/√d))·V_h with [Q, K, V] = LN(x)·W_qkvᵀ + b_qkv.

    Args:
        x: (B, M, Cg) tokens, B and M may be 0; float32, float64, bfloat16 or float16. Strides other
            than contiguous ones are copied first.
        num_heads: h, a divisor of Cg; d = Cg / h. The kernels take multiples of 8 up to 128.
        norm_weight: (Cg,), of LayerNorm over channels.
        norm_bias: (Cg,).
        qkv_weight: (3·Cg, Cg), output rows ordered (Q, K, V), then head, then channel.
        qkv_bias: (3·Cg,).
        eps: of the LayerNorm.
        dropout_p: dropout on the softmax output, applied wherever it is above 0.
        seed: () int64 on x's device; the dropout mask is a function of it and of batch, head, query
            and key, the same on every backend. None draws one from torch's generator.
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`. ``"sdpa"`` is
            ``F.scaled_dot_product_attention`` between torch's LayerNorm and linear map.

    Parameters may be float32 beside a lower-precision x. Sums, softmax and the LayerNorm's
    statistics are in float32 (float64 for float64). Under autocast a float32 x is cast to the
    autocast dtype, the parameters are not.

    Returns:
        (B, M, Cg) in x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
        BackendUnavailable: if a named backend cannot run.

    Differentiable once in x and the parameters on every backend (``"reference"``: to any order);
    results and gradients do not depend on the number of threads.

    Source: DS-Net (arXiv 2105.14734), section 3.1, the global stream of intra-scale propagation.
    """
    checks.dims("x", x, "BMC")
    checks.floating("x", x)
    width = x.shape[2]
    checks.heads("channels of x", width, num_heads)
    checks.shape("norm_weight", norm_weight, (width,))
    checks.shape("norm_bias", norm_bias, (width,))
    checks.shape("qkv_weight", qkv_weight, (3 * width, width))
    checks.shape("qkv_bias", qkv_bias, (3 * width,))
    checks.probability("dropout_p", dropout_p)
    checks.seed("seed", seed, "x", x)
    x = checks.autocast(x)
    checks.parameters(
        "x",
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
    )
    chosen = select(OPERATION, backend, x, num_heads=num_heads, dropout_p=dropout_p)
    parameters = (norm_weight, norm_bias, qkv_weight, qkv_bias)
    if chosen == "sdpa":
        return _sdpa(x, num_heads, *parameters, eps)
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = new_seed(x.device)
    if chosen == "reference":
        return reference(x, num_heads, *parameters, eps=eps, dropout_p=dropout_p, seed=seed)
    name = TRITON if chosen == "triton" else NATIVE
    if not checks.differentiates():
        operator = getattr(torch.ops.dsnet_kernels, name)
        return operator(x, num_heads, *parameters, eps, dropout_p, seed, False)[0]
    x, *parameters = checks.distinct(x, *parameters)
    keep_qkv = name == NATIVE and keeps_qkv(x)
    arguments = (x, num_heads, *parameters, eps, dropout_p, seed, keep_qkv, name)
    return _GlobalAttention.apply(*arguments)[0]

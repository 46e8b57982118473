"""Bidirectional co-attention between the local and the global stream.

The N×M weights never exist; the backward recomputes them from what is linear in the tokens, on the
CPU from the projections that the forward kept. There one pass over the local tokens serves both
directions, forward and backward; the GPU kernels read them once or more per direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import checks, native, operators, triton
from .backends import Operation, register, select
from .global_attention import keeps_qkv, qkv_size
from .reference import co_attention as reference
from .reference.co_attention import co_attend
from .reference.dropout import new_seed


def absorbs(local_tokens: int, global_tokens: int, local_width: int, num_heads: int) -> bool:
    """Whether folding the local projections into the global side takes fewer products.

    Absorbed: scores t·A_h with A_h = W_q,hᵀ·K_g,hᵀ/√d, and so on, h·M columns for Cl channels in
    place of projections and heads: it pays iff M·(h − 1)/Cl + M/N < 1.
    """
    return global_tokens * ((num_heads - 1) * local_tokens + local_width) < (
        local_width * local_tokens
    )


def _kernel_refusal(
    local: Tensor,
    global_: Tensor,
    num_heads: int | None = None,
    local_proj_weight: Tensor | None = None,
    **_,
) -> str | None:
    """Why the kernels do not take these streams and heads, or None."""
    if local.shape[2] * local.shape[3] == 0 or global_.shape[1] == 0:
        return "a stream has no tokens"
    if num_heads is None or local_proj_weight is None:
        return None
    return checks.head_dim_refusal(local_proj_weight.shape[1] // num_heads)


def _cpu_can_run(local: Tensor, global_: Tensor, **options) -> str | None:
    return native.cpu_can_run(local, "local") or _kernel_refusal(local, global_, **options)


def _cuda_can_run(local: Tensor, global_: Tensor, **options) -> str | None:
    return native.cuda_can_run(local, "local") or _kernel_refusal(local, global_, **options)


def _triton_can_run(local: Tensor, global_: Tensor, **options) -> str | None:
    return triton.can_run(local, "local") or _kernel_refusal(local, global_, **options)


def _sdpa_can_run(local: Tensor, global_: Tensor, dropout_p: float = 0.0, **_) -> str | None:
    if dropout_p > 0:
        return "scaled_dot_product_attention draws a dropout mask of its own"
    return None


def _reference_multiplies_pairs(local: Tensor, global_: Tensor) -> bool:
    """Whether gradients are wanted whose products torch forms from pairs of bfloat16."""
    if local.dtype != torch.bfloat16 or local.device.type != "cpu":
        return False
    wants_gradient = torch.is_grad_enabled() and (local.requires_grad or global_.requires_grad)
    return wants_gradient and native.cpu_multiplies_pairs()


def _cpu_loses(local: Tensor, global_: Tensor, num_heads: int | None = None, **_) -> str | None:
    if num_heads is None or not _reference_multiplies_pairs(local, global_):
        return None
    _, width, *grid = local.shape
    if absorbs(grid[0] * grid[1], global_.shape[1], width, num_heads):
        return None
    return "projected, its gradients in float32 are slower than the reference's in bfloat16"


def _sdpa_loses(local: Tensor, global_: Tensor, **_) -> str | None:
    if _reference_multiplies_pairs(local, global_):
        return "its gradients are slower than the reference's in bfloat16"
    return None


def _gpu_loses(local: Tensor, global_: Tensor, **_) -> str | None:
    return native.tf32_loss(local, "matmul")


OPERATION = register(
    Operation(
        "co_attention",
        tensors=("local", "global_"),
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
        loses={
            "cpu": _cpu_loses,
            "triton": _gpu_loses,
            "cuda": _gpu_loses,
            "sdpa": _sdpa_loses,
        },
    )
)

NATIVE, TRITON = "co_attention", "co_attention_triton"
"""Names of the raw operators; that of the gradient ends in ``_backward``."""


def _parameter_shapes(local_width: int, global_width: int, dim: int) -> tuple[tuple[int, ...], ...]:
    """Of the parameters in the operators' order, scale and shift with them."""
    of_global, of_local = (global_width,), (local_width,)
    qkv = tuple(s for width in (local_width, global_width) for s in ((3 * dim, width), (3 * dim,)))
    proj = ((local_width, dim), of_local, (global_width, dim), of_global)
    return (of_global, of_global, *qkv, *proj, of_local, of_local)


def _kept_sizes(
    local_shape: tuple[int, int, int],
    global_tokens: int,
    num_heads: int,
    dim: int,
    absorbed: bool | None,
) -> tuple[int, int]:
    """Elements of the local and of the global projections that a forward keeps."""
    batch, tokens, width = local_shape
    if absorbed is None:
        absorbed = absorbs(tokens, global_tokens, width, num_heads)
    local = 0 if absorbed else qkv_size(batch, tokens, num_heads, dim // num_heads)
    return local, batch * global_tokens * 3 * dim + operators.padded(1)


def _fake(local, global_, num_heads, norm_weight, norm_bias, local_qkv_weight, *others):
    (batch, local_tokens, _), global_tokens = local.shape, global_.shape[1]
    dim, dtype = local_qkv_weight.shape[0] // 3, operators.accumulator(local)
    absorbed, keep_qkv = others[-2:]
    kept = (0, 0)
    if keep_qkv:
        kept = _kept_sizes(local.shape, global_tokens, num_heads, dim, absorbed)
    return (
        local.new_empty(local.shape),
        global_.new_empty(global_.shape),
        local.new_empty((batch, num_heads, local_tokens, 2), dtype=dtype),
        local.new_empty((batch, num_heads, global_tokens, 2), dtype=dtype),
        local.new_empty((batch, global_tokens, dim), dtype=dtype),
        *(local.new_empty((size,), dtype=dtype) for size in kept),
    )


def _fake_backward(
    grad_local,
    grad_global,
    local,
    global_,
    local_softmax,
    global_softmax,
    attended,
    *others,
):
    shapes = _parameter_shapes(local.shape[2], global_.shape[2], attended.shape[2])
    count = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes)
    return (
        local.new_empty(local.shape),
        global_.new_empty(global_.shape),
        local.new_empty((count,), dtype=operators.accumulator(local)),
    )


_PARAMETERS = (
    "int num_heads, Tensor global_norm_weight, Tensor global_norm_bias, Tensor local_qkv_weight,"
    " Tensor local_qkv_bias, Tensor global_qkv_weight, Tensor global_qkv_bias,"
    " Tensor local_proj_weight, Tensor local_proj_bias, Tensor global_proj_weight,"
    " Tensor global_proj_bias, Tensor? local_scale, Tensor? local_shift, float eps,"
    " float dropout_p, Tensor? seed, bool? absorbed"
)

for _name in (NATIVE, TRITON):
    operators.define(
        _name,
        f"(Tensor local, Tensor global_, {_PARAMETERS}, bool keep_qkv)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake,
    )
    operators.define(
        f"{_name}_backward",
        "(Tensor grad_local, Tensor grad_global, Tensor local, Tensor global_,"
        " Tensor local_softmax, Tensor global_softmax, Tensor attended, Tensor? local_qkv,"
        f" Tensor? global_qkv, {_PARAMETERS})"
        " -> (Tensor, Tensor, Tensor)",
        _fake_backward,
    )


triton.implement("co_attention")


class _CoAttention(torch.autograd.Function):
    """A raw operator under autograd; saves its inputs and what is linear in the tokens.

    Beside the streams and the parameters that is of each softmax the maximum of its logits and the
    sum of exp(logit − maximum), what the global queries have attended to, and perhaps projections.
    """

    generate_vmap_rule = True

    @staticmethod
    @checks.with_signature
    def forward(
        local,
        global_,
        num_heads,
        global_norm_weight,
        global_norm_bias,
        local_qkv_weight,
        local_qkv_bias,
        global_qkv_weight,
        global_qkv_bias,
        local_proj_weight,
        local_proj_bias,
        global_proj_weight,
        global_proj_bias,
        local_scale,
        local_shift,
        eps,
        dropout_p,
        seed,
        absorbed,
        keep_qkv,
        name,
    ):
        # Spelled out: torch.compile counts them to tell whether the first is ctx.
        return getattr(torch.ops.dsnet_kernels, name)(
            local,
            global_,
            num_heads,
            global_norm_weight,
            global_norm_bias,
            local_qkv_weight,
            local_qkv_bias,
            global_qkv_weight,
            global_qkv_bias,
            local_proj_weight,
            local_proj_bias,
            global_proj_weight,
            global_proj_bias,
            local_scale,
            local_shift,
            eps,
            dropout_p,
            seed,
            absorbed,
            keep_qkv,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        local, global_, ctx.num_heads, *parameters, ctx.eps, ctx.dropout_p, seed = inputs[:-3]
        ctx.absorbed, keep_qkv, ctx.name = inputs[-3:]
        results = output[2:]
        ctx.mark_non_differentiable(*results)
        ctx.set_materialize_grads(False)
        if not keep_qkv:
            results = (*results[:3], None, None)
        ctx.save_for_backward(local, global_, *results, seed, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_local, grad_global, *_):
        if grad_local is None and grad_global is None:
            return (None,) * len(ctx.needs_input_grad)
        # Read once, as checkpointing demands.
        saved = ctx.saved_tensors
        local, global_, *results, seed = saved[:8]
        parameters, attended = saved[8:], results[2]
        grad_local, grad_global, flat = getattr(torch.ops.dsnet_kernels, f"{ctx.name}_backward")(
            torch.zeros_like(local) if grad_local is None else grad_local,
            torch.zeros_like(global_) if grad_global is None else grad_global,
            local,
            global_,
            *results,
            ctx.num_heads,
            *parameters,
            ctx.eps,
            ctx.dropout_p,
            seed,
            ctx.absorbed,
        )
        shapes = _parameter_shapes(local.shape[2], global_.shape[2], attended.shape[2])
        parts = flat.split([shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes])
        grads = [
            None if parameter is None else part.view(shape).to(parameter.dtype)
            for part, shape, parameter in zip(parts, shapes, parameters, strict=True)
        ]
        return grad_local, grad_global, None, *grads, *(None,) * 6


def _scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, first_head: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def co_attention(
    local: Tensor,
    global_: Tensor,
    num_heads: int,
    global_norm_weight: Tensor,
    global_norm_bias: Tensor,
    local_qkv_weight: Tensor,
    local_qkv_bias: Tensor,
    global_qkv_weight: Tensor,
    global_qkv_bias: Tensor,
    local_proj_weight: Tensor,
    local_proj_bias: Tensor,
    global_proj_weight: Tensor,
    global_proj_bias: Tensor,
    *,
    local_scale: Tensor | None = None,
    local_shift: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    absorbed: bool | None = None,
    backend: str | Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """(local + Linear(softmax(Q_l·K_gᵀ/√d)·V_g), global_ + Linear(softmax(Q_g·K_lᵀ/√d)·V_l)).

    [Q_l, K_l, V_l] = (local_scale·local + local_shift)·W_lᵀ + b_l over the N = H·W local tokens and
    [Q_g, K_g, V_g] = LN(global_)·W_gᵀ + b_g over the M global tokens; both directions read the
    streams as they come in.

    Args:
        local: (B, Cl, H, W); float32, float64, bfloat16 or float16. Layouts other than
            channels_last are copied first.
        global_: (B, M, Cg), local's dtype.
        num_heads: h, a divisor of the common width dim; d = dim / h. The kernels take
            multiples of 8 up to 128.
        global_norm_weight: (Cg,), of LayerNorm over channels.
        global_norm_bias: (Cg,).
        local_qkv_weight: (3·dim, Cl), output rows ordered (Q, K, V), then head, then channel.
        local_qkv_bias: (3·dim,).
        global_qkv_weight: (3·dim, Cg), ordered alike.
        global_qkv_bias: (3·dim,).
        local_proj_weight: (Cl, dim).
        local_proj_bias: (Cl,).
        global_proj_weight: (Cg, dim).
        global_proj_bias: (Cg,).
        local_scale: (Cl,) or None, a folded BatchNorm of the local stream.
        local_shift: (Cl,) or None.
        eps: of the LayerNorm.
        dropout_p: dropout on both softmax outputs, applied wherever it is above 0.
        seed: () int64 on local's device; the dropout masks are a function of it and of batch, head,
            query and key, the global queries' heads counted behind the local ones', the same on
            every backend. None draws one from torch's generator.
        absorbed: True folds the local projections into matrices of the global tokens, so that no
            local Q, K or V is ever formed, False projects; None takes what has fewer products
            (:func:`absorbs`). The result is the same but for rounding; only kernels look at it.
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`. ``"sdpa"`` is
            ``F.scaled_dot_product_attention`` between torch's norms and linear maps.

    Parameters may be float32 beside lower-precision streams. Sums, softmax, the LayerNorm's
    statistics and the folded matrices are in float32 (float64 for float64). Under autocast float32
    streams are cast to the autocast dtype, the parameters are not.

    Returns:
        The new local stream (B, Cl, H, W) and the new global stream (B, M, Cg).

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
        BackendUnavailable: if a named backend cannot run.

    Differentiable once in the streams and all parameters on every backend (``"reference"``: to any
    order); results and gradients do not depend on the number of threads.

    Source: DS-Net (arXiv 2105.14734), section 3.2, inter-scale alignment, equations 5 and 6.
    """
    checks.dims("local", local, "BCHW")
    checks.dims("global_", global_, "BMC")
    checks.floating("local", local)
    batch, local_width = local.shape[:2]
    tokens, global_width = global_.shape[1:]
    checks.shape("global_", global_, (batch, tokens, global_width))
    checks.dims("local_proj_weight", local_proj_weight, "OI")
    dim = local_proj_weight.shape[1]
    checks.heads("common width", dim, num_heads)
    checks.shape("global_norm_weight", global_norm_weight, (global_width,))
    checks.shape("global_norm_bias", global_norm_bias, (global_width,))
    checks.shape("local_qkv_weight", local_qkv_weight, (3 * dim, local_width))
    checks.shape("local_qkv_bias", local_qkv_bias, (3 * dim,))
    checks.shape("global_qkv_weight", global_qkv_weight, (3 * dim, global_width))
    checks.shape("global_qkv_bias", global_qkv_bias, (3 * dim,))
    checks.shape("local_proj_weight", local_proj_weight, (local_width, dim))
    checks.shape("local_proj_bias", local_proj_bias, (local_width,))
    checks.shape("global_proj_weight", global_proj_weight, (global_width, dim))
    checks.shape("global_proj_bias", global_proj_bias, (global_width,))
    checks.optional_shape("local_scale", local_scale, (local_width,))
    checks.optional_shape("local_shift", local_shift, (local_width,))
    checks.probability("dropout_p", dropout_p)
    checks.seed("seed", seed, "local", local)
    local, global_ = checks.autocast(local), checks.autocast(global_)
    checks.same_dtype("local", local, "global_", global_)
    checks.parameters(
        "local",
        local,
        global_norm_weight=global_norm_weight,
        global_norm_bias=global_norm_bias,
        local_qkv_weight=local_qkv_weight,
        local_qkv_bias=local_qkv_bias,
        global_qkv_weight=global_qkv_weight,
        global_qkv_bias=global_qkv_bias,
        local_proj_weight=local_proj_weight,
        local_proj_bias=local_proj_bias,
        global_proj_weight=global_proj_weight,
        global_proj_bias=global_proj_bias,
        local_scale=local_scale,
        local_shift=local_shift,
    )
    chosen = select(
        OPERATION,
        backend,
        local,
        global_,
        num_heads=num_heads,
        local_proj_weight=local_proj_weight,
        dropout_p=dropout_p,
    )
    parameters = (
        global_norm_weight,
        global_norm_bias,
        local_qkv_weight,
        local_qkv_bias,
        global_qkv_weight,
        global_qkv_bias,
        local_proj_weight,
        local_proj_bias,
        global_proj_weight,
        global_proj_bias,
    )
    if chosen == "sdpa":
        return co_attend(
            _scaled_dot_product_attention,
            local,
            global_,
            num_heads,
            *parameters,
            local_scale,
            local_shift,
            eps,
        )
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = new_seed(local.device)
    if chosen == "reference":
        return reference(
            local,
            global_,
            num_heads,
            *parameters,
            local_scale=local_scale,
            local_shift=local_shift,
            eps=eps,
            dropout_p=dropout_p,
            seed=seed,
        )
    name = TRITON if chosen == "triton" else NATIVE
    tokens = local.flatten(2).transpose(1, 2)
    options = (eps, dropout_p, seed, absorbed)
    if not checks.differentiates():
        operator = getattr(torch.ops.dsnet_kernels, name)
        results = operator(
            tokens, global_, num_heads, *parameters, local_scale, local_shift, *options, False
        )
    else:
        tokens, global_, *parameters = checks.distinct(
            tokens, global_, *parameters, local_scale, local_shift
        )
        keep_qkv = name == NATIVE and keeps_qkv(local)
        results = _CoAttention.apply(
            tokens, global_, num_heads, *parameters, *options, keep_qkv, name
        )
    return results[0].transpose(1, 2).unflatten(2, local.shape[2:]), results[1]

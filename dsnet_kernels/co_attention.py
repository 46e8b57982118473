"""Bidirectional co-attention between the local and the global stream."""

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .backends import Operation, register, select
from .reference import co_attention as reference

OPERATION = register(Operation("co_attention", tensors=("local", "global_")))


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
    backend: str | Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """(local + Linear(softmax(Q_l·K_gᵀ/√d)·V_g), global_ + Linear(softmax(Q_g·K_lᵀ/√d)·V_l)).

    [Q_l, K_l, V_l] = (local_scale·local + local_shift)·W_lᵀ + b_l over the N = H·W local tokens and
    [Q_g, K_g, V_g] = LN(global_)·W_gᵀ + b_g over the M global tokens; both directions read the
    streams as they come in.

    Args:
        local: (B, Cl, H, W); float32, float64, bfloat16 or float16.
        global_: (B, M, Cg), local's dtype.
        num_heads: h, a divisor of the common width dim; d = dim / h.
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
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`.

    Parameters may be float32 beside lower-precision streams.

    Returns:
        The new local stream (B, Cl, H, W) and the new global stream (B, M, Cg).

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
        BackendUnavailable: if a named backend cannot run.

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
    select(OPERATION, backend, local, global_)
    return reference(
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
        local_scale=local_scale,
        local_shift=local_shift,
        eps=eps,
        dropout_p=dropout_p,
    )

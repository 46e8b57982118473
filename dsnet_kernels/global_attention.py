"""Self-attention among the global tokens, with its LayerNorm and residual."""

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .backends import Operation, register, select
from .reference import global_attention as reference

OPERATION = register(Operation("global_attention", tensors=("x",)))


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
    backend: str | Sequence[str] | None = None,
) -> Tensor:
    """x + concat_h softmax(Q_h·K_hᵀ/√d)·V_h with [Q, K, V] = LN(x)·W_qkvᵀ + b_qkv.

    Args:
        x: (B, M, Cg) tokens; float32, float64, bfloat16 or float16.
        num_heads: h, a divisor of Cg; d = Cg / h.
        norm_weight: (Cg,), of LayerNorm over channels.
        norm_bias: (Cg,).
        qkv_weight: (3·Cg, Cg), output rows ordered (Q, K, V), then head, then channel.
        qkv_bias: (3·Cg,).
        eps: of the LayerNorm.
        dropout_p: dropout on the softmax output, applied wherever it is above 0.
        backend: name or list of names; None follows :class:`dsnet_kernels.backend`.

    Parameters may be float32 beside a lower-precision x.

    Returns:
        (B, M, Cg) in x's dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, device, shape or probability.
        BackendUnavailable: if a named backend cannot run.

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
    x = checks.autocast(x)
    checks.parameters(
        "x",
        x,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
    )
    select(OPERATION, backend, x)
    return reference(
        x,
        num_heads,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        eps=eps,
        dropout_p=dropout_p,
    )

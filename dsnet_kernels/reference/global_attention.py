"""Reference of ``global_attention``."""

from torch import Tensor

from .common import attend, layer_norm, linear, split_heads
from .dropout import new_seed


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
) -> Tensor:
    """x + MHSA(LN(x)) on tokens (B, M, Cg)."""
    if dropout_p > 0 and seed is None:
        seed = new_seed(x.device)
    qkv = linear(layer_norm(x, norm_weight, norm_bias, eps), qkv_weight, qkv_bias)
    return x + attend(*split_heads(qkv, 3, num_heads), dropout_p, seed)

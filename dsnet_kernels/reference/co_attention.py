"""Reference of ``co_attention``."""

from collections.abc import Callable

from torch import Tensor

from .common import affine, attend, layer_norm, linear, split_heads


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
) -> tuple[Tensor, Tensor]:
    """Both directions of the inter-scale alignment; see :func:`dsnet_kernels.co_attention`.

    ``absorbed`` is for kernels; here the projections are always formed.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, first_head: int) -> Tensor:
        return attend(q, k, v, dropout_p, seed, first_head)

    return co_attend(
        attention,
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
    )


def co_attend(
    attention: Callable[[Tensor, Tensor, Tensor, int], Tensor],
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
    local_scale: Tensor | None,
    local_shift: Tensor | None,
    eps: float,
    normed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Co-attention with ``attention(q, k, v, first_head)``: (B, h, T, d) → (B, T, h·d).

    ``normed`` replaces local_scale·local + local_shift.
    """
    grid = local.shape[2:]
    if normed is None:
        normed = affine(local, local_scale, local_shift)
    local_tokens = normed.flatten(2).transpose(1, 2)
    local_qkv = linear(local_tokens, local_qkv_weight, local_qkv_bias)
    global_tokens = layer_norm(global_, global_norm_weight, global_norm_bias, eps)
    global_qkv = linear(global_tokens, global_qkv_weight, global_qkv_bias)
    q_local, k_local, v_local = split_heads(local_qkv, 3, num_heads)
    q_global, k_global, v_global = split_heads(global_qkv, 3, num_heads)

    to_local = attention(q_local, k_global, v_global, 0)
    to_global = attention(q_global, k_local, v_local, num_heads)
    to_local = linear(to_local, local_proj_weight, local_proj_bias)
    to_global = linear(to_global, global_proj_weight, global_proj_bias)
    return local + to_local.transpose(1, 2).unflatten(2, grid), global_ + to_global

"""The backward kernels of ``global_attention`` in Triton.

Attention's gradients with respect to Q, K and V go to memory in x's dtype, recomputed from lse:
P = exp(s − lse), dS = P∘(dP − delta) with delta_i = Σ_j P_ij·dP_ij. The rounding of lse, which
grows with the logits, would shift sums over keys that are 1 for P and 0 for dS, so that each row is
divided by the sum it comes out with. From the three come the gradient of x through the LayerNorm,
and those of the parameters as partial sums over a fixed cut of the rows.
"""

import triton
import triton.language as tl

from .common_kernels import exp_logits, keep_mask, load_rows, store_rows
from .global_attention_kernels import project_head

_NUMBERS = ["tokens", "threshold"]


@triton.jit(do_not_specialize=_NUMBERS)
def global_attention_few_grad(
    grad,  # (B, M, C)
    x,  # (B, M, C)
    lse,  # (B, h, M)
    norm_weight,  # (C)
    norm_bias,  # (C)
    qkv_weight,  # (3·C, C)
    qkv_bias,  # (3·C)
    seed,  # () or None
    grad_qkv,  # (B, M, 3·C)
    tokens,
    threshold,
    eps,
    scale,
    keep_scale,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,  # ≥ M
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dQ, dK and dV of one head of one image; Q, K and V as the forward computes them."""
    i_group = tl.program_id(0).to(tl.int64)
    i_image = i_group // (WIDTH // HEAD_DIM)
    i_head = (i_group % (WIDTH // HEAD_DIM)).to(tl.int32)
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_q, b_k, b_v = project_head(
        x + i_image * tokens * WIDTH + o_t * WIDTH,
        m_t,
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        i_head,
        eps,
        WIDTH,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_C,
    )
    p_grad = grad + i_image * tokens * WIDTH + i_head * HEAD_DIM
    b_grad = load_rows(p_grad, 0, tokens, WIDTH, HEAD_DIM, BLOCK_T, BLOCK_D)
    b_lse = tl.load(lse + i_group * tokens + o_t, mask=m_t, other=0)

    # Masked before exp2: 0 − lse of a row or column that does not exist may overflow.
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_s = tl.where(m_t[:, None] & m_t[None, :], b_s, float("-inf"))
    b_p = exp_logits(b_s, b_lse[:, None], scale, b_v.dtype)
    b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision="ieee")
    if seed is not None:
        b_keep = keep_mask(seed, i_image, i_head, 0, 0, threshold, BLOCK_T, BLOCK_T)
        b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
    b_sum = tl.where(m_t, tl.sum(b_p, 1), 1.0)
    b_dp -= tl.div_rn(tl.sum(b_p * b_dp, 1), b_sum)[:, None]
    if b_v.dtype.primitive_bitwidth == 32:
        # What the rounding of delta left of the row's sum.
        b_dp -= tl.div_rn(tl.sum(b_p * b_dp, 1), b_sum)[:, None]
    b_p *= (1 / b_sum)[:, None]
    b_kept = b_p
    if seed is not None:
        b_kept = tl.where(b_keep, b_p * keep_scale, 0.0)
    b_dv = tl.dot(tl.trans(b_kept.to(b_v.dtype)), b_grad, input_precision="ieee")
    b_ds = (b_p * b_dp).to(b_v.dtype)
    b_dq = tl.dot(b_ds, b_k, input_precision="ieee") * scale
    b_dk = tl.dot(tl.trans(b_ds), b_q, input_precision="ieee") * scale

    p_qkv = grad_qkv + i_image * tokens * (3 * WIDTH) + i_head * HEAD_DIM
    store_rows(p_qkv, b_dq, 0, tokens, 3 * WIDTH, HEAD_DIM)
    store_rows(p_qkv + WIDTH, b_dk, 0, tokens, 3 * WIDTH, HEAD_DIM)
    store_rows(p_qkv + 2 * WIDTH, b_dv, 0, tokens, 3 * WIDTH, HEAD_DIM)


@triton.jit(do_not_specialize=_NUMBERS)
def global_attention_many_grad_q(
    grad,  # (B, M, C)
    qkv,  # (B, M, 3·C)
    lse,  # (B, h, M)
    seed,  # () or None
    statistics,  # (B, h, 2, M): delta and 1/Σ_j P_ij
    grad_qkv,  # (B, M, 3·C), of which dQ is written
    tokens,
    threshold,
    scale,
    keep_scale,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """delta and dQ of a block of queries, in two passes over the keys."""
    query_blocks = tl.cdiv(tokens, BLOCK_Q)
    i_query = tl.program_id(0) % query_blocks * BLOCK_Q
    i_group = (tl.program_id(0) // query_blocks).to(tl.int64)
    i_image = i_group // (WIDTH // HEAD_DIM)
    i_head = (i_group % (WIDTH // HEAD_DIM)).to(tl.int32)
    o_head = i_image * tokens * (3 * WIDTH) + i_head * HEAD_DIM
    p_k = qkv + o_head + WIDTH
    b_q = load_rows(qkv + o_head, i_query, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_Q, BLOCK_D)
    p_grad = grad + i_image * tokens * WIDTH + i_head * HEAD_DIM
    b_grad = load_rows(p_grad, i_query, tokens, WIDTH, HEAD_DIM, BLOCK_Q, BLOCK_D)
    o_t = i_query + tl.arange(0, BLOCK_Q)
    p_lse = lse + i_group * tokens + o_t
    b_lse = tl.load(p_lse, mask=o_t < tokens, other=float("inf"))

    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    b_delta = tl.zeros([BLOCK_Q], tl.float32)
    b_dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    whole = tokens // BLOCK_K * BLOCK_K
    for PASS in tl.static_range(2):
        for MASKED in tl.static_range(2):
            end = tokens if MASKED else whole
            for i_key in tl.range(
                whole if MASKED else 0, end, BLOCK_K, num_stages=1 if MASKED else STAGES
            ):
                b_k = load_rows(p_k, i_key, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_K, BLOCK_D, MASKED)
                b_v = load_rows(
                    p_k + WIDTH, i_key, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_K, BLOCK_D, MASKED
                )
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
                if MASKED:
                    m_k = i_key + tl.arange(0, BLOCK_K) < tokens
                    b_s = tl.where(m_k[None, :], b_s, float("-inf"))
                b_p = exp_logits(b_s, b_lse[:, None], scale, b_k.dtype)
                b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision="ieee")
                if seed is not None:
                    b_keep = keep_mask(
                        seed, i_image, i_head, i_query, i_key, threshold, BLOCK_Q, BLOCK_K
                    )
                    b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
                if PASS == 0:
                    b_sum += tl.sum(b_p, 1)
                    b_delta += tl.sum(b_p * b_dp, 1)
                else:
                    b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
                    b_dq = tl.dot(b_ds, b_k, b_dq, input_precision="ieee")
        if PASS == 0:
            b_sum = tl.where(o_t < tokens, b_sum, 1.0)
            b_delta = tl.div_rn(b_delta, b_sum)
            b_inverse = 1 / b_sum

    p_delta = statistics + i_group * 2 * tokens + o_t
    tl.store(p_delta, b_delta, mask=o_t < tokens)
    tl.store(p_delta + tokens, b_inverse, mask=o_t < tokens)
    b_dq *= (b_inverse * scale)[:, None]
    store_rows(grad_qkv + o_head, b_dq, i_query, tokens, 3 * WIDTH, HEAD_DIM)


@triton.jit(do_not_specialize=_NUMBERS)
def global_attention_many_grad_kv(
    grad,  # (B, M, C)
    qkv,  # (B, M, 3·C)
    lse,  # (B, h, M)
    seed,  # () or None
    statistics,  # (B, h, 2, M): delta and 1/Σ_j P_ij
    grad_qkv,  # (B, M, 3·C), of which dK and dV are written
    tokens,
    threshold,
    scale,
    keep_scale,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dK and dV of a block of keys; tiles are (keys, queries), so that they feed products as is.

    A query that does not exist has lse ∞, so P = 0. The row of a key that does not exist mixes with
    no other and is not stored.
    """
    key_blocks = tl.cdiv(tokens, BLOCK_K)
    i_key = tl.program_id(0) % key_blocks * BLOCK_K
    i_group = (tl.program_id(0) // key_blocks).to(tl.int64)
    i_image = i_group // (WIDTH // HEAD_DIM)
    i_head = (i_group % (WIDTH // HEAD_DIM)).to(tl.int32)
    o_head = i_image * tokens * (3 * WIDTH) + i_head * HEAD_DIM
    p_q = qkv + o_head
    b_k = load_rows(p_q + WIDTH, i_key, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_K, BLOCK_D)
    b_v = load_rows(p_q + 2 * WIDTH, i_key, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_K, BLOCK_D)
    p_grad = grad + i_image * tokens * WIDTH + i_head * HEAD_DIM

    b_dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for i_query in tl.range(0, tokens, BLOCK_Q, num_stages=STAGES):
        b_q = load_rows(p_q, i_query, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_Q, BLOCK_D)
        b_grad = load_rows(p_grad, i_query, tokens, WIDTH, HEAD_DIM, BLOCK_Q, BLOCK_D)
        o_t = i_query + tl.arange(0, BLOCK_Q)
        m_t = o_t < tokens
        b_lse = tl.load(lse + i_group * tokens + o_t, mask=m_t, other=float("inf"))
        p_delta = statistics + i_group * 2 * tokens + o_t
        b_delta = tl.load(p_delta, mask=m_t, other=0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        b_p = exp_logits(b_s, b_lse[None, :], scale, b_k.dtype)
        if b_k.dtype.primitive_bitwidth == 32:
            # In 16 bits P is rounded by more than the sum is off.
            b_p *= tl.load(p_delta + tokens, mask=m_t, other=0)[None, :]
        b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision="ieee")
        b_kept = b_p
        if seed is not None:
            b_keep = keep_mask(seed, i_image, i_head, i_query, i_key, threshold, BLOCK_Q, BLOCK_K)
            b_keep = tl.trans(b_keep)
            b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
            b_kept = tl.where(b_keep, b_p * keep_scale, 0.0)
        b_dv = tl.dot(b_kept.to(b_grad.dtype), b_grad, b_dv, input_precision="ieee")
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")

    p_dk = grad_qkv + o_head + WIDTH
    store_rows(p_dk, b_dk * scale, i_key, tokens, 3 * WIDTH, HEAD_DIM)
    store_rows(p_dk + WIDTH, b_dv, i_key, tokens, 3 * WIDTH, HEAD_DIM)

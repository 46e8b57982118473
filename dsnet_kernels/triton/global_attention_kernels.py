"""The forward kernels of ``global_attention`` in Triton, and what the backward's share with them.

Few tokens: a program owns a head of an image, from the LayerNorm to the residual. Many tokens: one
kernel leaves [Q, K, V] in memory, another owns a block of a head's queries and goes over its keys.
"""

import triton
import triton.language as tl

from .common_kernels import exp_logits, keep_mask, load_rows, store_rows
from .norm_linear_kernels import moments, normalised, with_bias


@triton.jit
def project_head(
    p_x,  # the rows of x
    m_t,
    norm_weight,
    norm_bias,
    qkv_weight,
    qkv_bias,
    i_head,
    eps,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Q, K and V of one head in x's dtype, zero outside."""
    b_mean, b_rstd = moments(p_x, m_t, eps, WIDTH, BLOCK_C)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    o_row = i_head * HEAD_DIM + o_d
    b_q = tl.zeros([p_x.shape[0], BLOCK_D], tl.float32)
    b_k = tl.zeros([p_x.shape[0], BLOCK_D], tl.float32)
    b_v = tl.zeros([p_x.shape[0], BLOCK_D], tl.float32)
    for i_c in range(0, WIDTH, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_x = normalised(p_x, o_c, m_t, b_mean, b_rstd, norm_weight, norm_bias, WIDTH)
        # A weight is a tile (channels, BLOCK_D), transposed as it is read.
        p_w = qkv_weight + o_row[None, :] * WIDTH + o_c[:, None]
        m_w = (o_c < WIDTH)[:, None] & m_d[None, :]
        b_w = tl.load(p_w, mask=m_w, other=0).to(b_x.dtype)
        b_q = tl.dot(b_x, b_w, b_q, input_precision="ieee")
        b_w = tl.load(p_w + WIDTH * WIDTH, mask=m_w, other=0).to(b_x.dtype)
        b_k = tl.dot(b_x, b_w, b_k, input_precision="ieee")
        b_w = tl.load(p_w + 2 * WIDTH * WIDTH, mask=m_w, other=0).to(b_x.dtype)
        b_v = tl.dot(b_x, b_w, b_v, input_precision="ieee")
    dtype = p_x.dtype.element_ty
    p_bias = qkv_bias + o_row
    return (
        with_bias(b_q, p_bias, m_t, m_d).to(dtype),
        with_bias(b_k, p_bias + WIDTH, m_t, m_d).to(dtype),
        with_bias(b_v, p_bias + 2 * WIDTH, m_t, m_d).to(dtype),
    )


_NUMBERS = ["tokens", "threshold"]


@triton.jit(do_not_specialize=_NUMBERS)
def global_attention_few(
    x,  # (B, M, C)
    norm_weight,  # (C)
    norm_bias,  # (C)
    qkv_weight,  # (3·C, C)
    qkv_bias,  # (3·C)
    seed,  # () or None
    out,  # (B, M, C)
    lse,  # (B, h, M)
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
    """Everything from the LayerNorm to the residual for one head of one image."""
    i_group = tl.program_id(0).to(tl.int64)
    i_image = i_group // (WIDTH // HEAD_DIM)
    i_head = (i_group % (WIDTH // HEAD_DIM)).to(tl.int32)
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    p_x = x + i_image * tokens * WIDTH
    b_q, b_k, b_v = project_head(
        p_x + o_t * WIDTH,
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

    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_s = tl.where(m_t[None, :], b_s, float("-inf"))
    b_max = tl.max(b_s, 1) * scale
    b_p = exp_logits(b_s, b_max[:, None], scale, b_v.dtype)
    b_sum = tl.sum(b_p, 1)
    if seed is not None:
        b_keep = keep_mask(seed, i_image, i_head, 0, 0, threshold, BLOCK_T, BLOCK_T)
        b_p = tl.where(b_keep, b_p, 0.0)
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    b_out *= (keep_scale / b_sum)[:, None]

    o_head = i_head * HEAD_DIM
    b_out += load_rows(p_x + o_head, 0, tokens, WIDTH, HEAD_DIM, BLOCK_T, BLOCK_D).to(tl.float32)
    p_out = out + i_image * tokens * WIDTH + o_head
    store_rows(p_out, b_out, 0, tokens, WIDTH, HEAD_DIM)
    tl.store(lse + i_group * tokens + o_t, b_max + tl.log(b_sum), mask=m_t)


@triton.jit(do_not_specialize=_NUMBERS)
def global_attention_many(
    x,  # (B, M, C)
    qkv,  # (B, M, 3·C)
    seed,  # () or None
    out,  # (B, M, C)
    lse,  # (B, h, M)
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
    """Attention and residual of a block of queries of one head, with an online softmax."""
    query_blocks = tl.cdiv(tokens, BLOCK_Q)
    i_query = tl.program_id(0) % query_blocks * BLOCK_Q
    i_group = (tl.program_id(0) // query_blocks).to(tl.int64)
    i_image = i_group // (WIDTH // HEAD_DIM)
    i_head = (i_group % (WIDTH // HEAD_DIM)).to(tl.int32)
    o_head = i_image * tokens * WIDTH + i_head * HEAD_DIM
    p_q = qkv + i_image * tokens * (3 * WIDTH) + i_head * HEAD_DIM
    p_k = p_q + WIDTH
    b_q = load_rows(p_q, i_query, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_Q, BLOCK_D)

    b_out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_Q], tl.float32)
    # Blocks of keys that all exist, then the rest under a mask.
    whole = tokens // BLOCK_K * BLOCK_K
    for MASKED in tl.static_range(2):
        end = tokens if MASKED else whole
        for i_key in tl.range(
            whole if MASKED else 0, end, BLOCK_K, num_stages=1 if MASKED else STAGES
        ):
            b_k = load_rows(p_k, i_key, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_K, BLOCK_D, MASKED)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            if MASKED:
                m_k = i_key + tl.arange(0, BLOCK_K) < tokens
                b_s = tl.where(m_k[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_p = exp_logits(b_s, b_new[:, None], scale, b_q.dtype)
            b_decay = tl.exp(b_max - b_new)
            b_sum = b_sum * b_decay + tl.sum(b_p, 1)
            b_max = b_new
            if seed is not None:
                b_keep = keep_mask(
                    seed, i_image, i_head, i_query, i_key, threshold, BLOCK_Q, BLOCK_K
                )
                b_p = tl.where(b_keep, b_p, 0.0)
            p_v = p_k + WIDTH
            b_v = load_rows(p_v, i_key, tokens, 3 * WIDTH, HEAD_DIM, BLOCK_K, BLOCK_D, MASKED)
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")

    b_out *= (keep_scale / b_sum)[:, None]
    b_x = load_rows(x + o_head, i_query, tokens, WIDTH, HEAD_DIM, BLOCK_Q, BLOCK_D)
    store_rows(out + o_head, b_out + b_x.to(tl.float32), i_query, tokens, WIDTH, HEAD_DIM)
    o_t = i_query + tl.arange(0, BLOCK_Q)
    tl.store(lse + i_group * tokens + o_t, b_max + tl.log(b_sum), mask=o_t < tokens)

"""The backward kernels of ``co_attention`` in Triton for the global rows.

A program owns a block of a head's global tokens and goes over a split of the local ones; each split
has as many blocks, but the last.
"""

import triton
import triton.language as tl

from .co_attention_backward_kernels import recompute
from .co_attention_kernels import load_block

_NUMBERS = ["images", "tokens", "global_tokens", "splits", "threshold"]


@triton.jit(do_not_specialize=_NUMBERS)
def co_attention_global_sums(
    local_keys,  # (B, N, …)
    local_values,  # (B, N, …)
    local_scale,  # (Cl) or None
    local_shift,  # (Cl) or None
    global_queries,  # (B, M, …)
    grad_global,  # (B, M, …), of the global result
    global_softmax,  # (B, h, M, 2): maximum, sum
    constant,  # (B, M, h), added to the global queries' dP, or None
    seed,  # () or None
    partial,  # (splits, 2, B, M, h)
    images,  # B
    tokens,  # N
    global_tokens,  # M
    splits,
    threshold,
    scale,
    keep_scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL_STRIDE: tl.constexpr,
    LOCAL_STEP: tl.constexpr,
    GLOBAL_STRIDE: tl.constexpr,
    GLOBAL_STEP: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,  # of grad_global
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ P∘dP and Σ P of the global queries, both times the sum of the weights."""
    i_m = tl.program_id(0) % tl.cdiv(global_tokens, BLOCK_M) * BLOCK_M
    i_rest = tl.program_id(0) // tl.cdiv(global_tokens, BLOCK_M)
    i_split = (i_rest % splits).to(tl.int64)
    i_head = i_rest // splits % HEADS
    i_image = (i_rest // splits // HEADS).to(tl.int64)
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = o_m < global_tokens
    o_local = i_image * tokens * LOCAL_STRIDE + i_head * LOCAL_STEP
    o_global = i_image * global_tokens * GLOBAL_STRIDE + i_head * GLOBAL_STEP
    o_row = i_image * HEADS + i_head
    o_scalar = i_image * global_tokens * HEADS + i_head
    p_grad_global = grad_global + i_image * global_tokens * GRAD_STRIDE + i_head * WIDTH
    p_constant = None
    if constant is not None:
        p_constant = constant + o_scalar
    p_global_softmax = global_softmax + (o_row * global_tokens + o_m) * 2
    b_global_max = tl.load(p_global_softmax, mask=m_m, other=float("inf"))

    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_delta = tl.zeros([BLOCK_M], tl.float32)
    extent = tl.cdiv(tl.cdiv(tokens, BLOCK_N), splits) * BLOCK_N
    i_begin = (i_split * extent).to(tl.int32)
    for i_n in range(i_begin, tl.minimum(i_begin + extent, tokens), BLOCK_N):
        b_p, _, b_dp = recompute(
            local_keys + o_local,
            global_queries + o_global,
            local_values + o_local,
            p_grad_global,
            None,
            p_constant,
            b_global_max,
            i_n,
            i_m,
            tokens,
            global_tokens,
            seed,
            i_image,
            i_head,
            local_scale,
            local_shift,
            threshold,
            scale,
            keep_scale,
            HEADS,
            WIDTH,
            LOCAL_STRIDE,
            GLOBAL_STRIDE,
            LOCAL_STRIDE,
            GRAD_STRIDE,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
            LOCAL_QUERIES=False,
            LOCAL_FIRST=False,
        )
        b_sum += tl.sum(b_p, 1)
        b_delta += tl.sum(b_p * b_dp, 1)

    rows = images.to(tl.int64) * global_tokens * HEADS
    p_partial = partial + i_split * 2 * rows + o_scalar + o_m * HEADS
    tl.store(p_partial, b_delta, mask=m_m)
    tl.store(p_partial + rows, b_sum, mask=m_m)


@triton.jit(do_not_specialize=_NUMBERS)
def co_attention_grad_global(
    grad_heads,  # (B, N, …), of the local result
    queries,  # (B, N, …)
    local_keys,  # (B, N, …)
    local_values,  # (B, N, …)
    local_scale,  # (Cl) or None
    local_shift,  # (Cl) or None
    keys,  # (B, M, …)
    key_bias,  # (B, M, h) or None
    values,  # (B, M, …)
    global_queries,  # (B, M, …)
    grad_global,  # (B, M, …), of the global result
    local_softmax,  # (B, h, N, 2): maximum, sum
    global_softmax,  # (B, h, M, 2)
    global_sums,  # (2, B, M, h): delta and 1/Σ exp(S − maximum)
    constant,  # (B, M, h), added to the global queries' dP, or None
    seed,  # () or None
    local_sums,  # (B, h, N, 2): delta and 1/Σ exp(S − maximum)
    partial,  # (splits, UNITS, B, M, h, WIDTH): dG, dA, dU and, absorbed, R
    partial_sums,  # (splits, 2, B, M, h): da, and the kept weights' sum; or None
    images,  # B
    tokens,  # N
    global_tokens,  # M
    splits,
    threshold,
    scale,
    keep_scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL_STRIDE: tl.constexpr,
    LOCAL_STEP: tl.constexpr,
    GLOBAL_STRIDE: tl.constexpr,
    GLOBAL_STEP: tl.constexpr,
    OUT_STRIDE: tl.constexpr,  # of the local result and its gradient
    OUT_STEP: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,  # of grad_global
    UNITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dG, dA, dU and what belongs to them."""
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    dtype: tl.constexpr = queries.dtype.element_ty
    i_c = tl.program_id(0) % CHUNKS * BLOCK_D
    i_rest = tl.program_id(0) // CHUNKS
    i_m = i_rest % tl.cdiv(global_tokens, BLOCK_M) * BLOCK_M
    i_rest //= tl.cdiv(global_tokens, BLOCK_M)
    i_split = (i_rest % splits).to(tl.int64)
    i_head = i_rest // splits % HEADS
    i_image = (i_rest // splits // HEADS).to(tl.int64)
    o_m = i_m + tl.arange(0, BLOCK_M)
    o_local = i_image * tokens * LOCAL_STRIDE + i_head * LOCAL_STEP
    o_global = i_image * global_tokens * GLOBAL_STRIDE + i_head * GLOBAL_STEP
    p_grad = grad_heads + i_image * tokens * OUT_STRIDE + i_head * OUT_STEP
    p_grad_global = grad_global + i_image * global_tokens * GRAD_STRIDE + i_head * WIDTH
    o_row = i_image * HEADS + i_head
    rows = images.to(tl.int64) * global_tokens * HEADS
    o_scalar = i_image * global_tokens * HEADS + i_head
    p_key_bias = None
    if key_bias is not None:
        p_key_bias = key_bias + o_scalar
    p_constant = None
    if constant is not None:
        p_constant = constant + o_scalar

    m_m = o_m < global_tokens
    p_global_sums = global_sums + o_scalar + o_m * HEADS
    b_global_delta = tl.load(p_global_sums, mask=m_m, other=0)
    b_global_inverse = tl.load(p_global_sums + rows, mask=m_m, other=0)
    p_global_softmax = global_softmax + (o_row * global_tokens + o_m) * 2
    b_global_max = tl.load(p_global_softmax, mask=m_m, other=float("inf"))

    b_queries = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_keys = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_values = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_rows = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_key_bias = tl.zeros([BLOCK_M], tl.float32)
    b_kept_sum = tl.zeros([BLOCK_M], tl.float32)
    extent = tl.cdiv(tl.cdiv(tokens, BLOCK_N), splits) * BLOCK_N
    i_begin = (i_split * extent).to(tl.int32)
    i_end = tl.minimum(i_begin + extent, tokens)
    # Registers do not hold the global rows beside the sums: each turn loads them again.
    for i_n in tl.range(i_begin, i_end, BLOCK_N, disable_licm=True):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        o_query = (o_row * tokens + o_n) * 2
        b_max = tl.load(local_softmax + o_query, mask=m_n, other=float("inf"))
        b_delta = tl.load(local_sums + o_query, mask=m_n, other=0)
        b_inverse = tl.load(local_sums + o_query + 1, mask=m_n, other=0)
        b_p, b_kept, b_dp = recompute(
            queries + o_local,
            keys + o_global,
            p_grad,
            values + o_global,
            p_key_bias,
            None,
            b_max,
            i_n,
            i_m,
            tokens,
            global_tokens,
            seed,
            i_image,
            i_head,
            local_scale,
            local_shift,
            threshold,
            scale,
            keep_scale,
            HEADS,
            WIDTH,
            LOCAL_STRIDE,
            GLOBAL_STRIDE,
            OUT_STRIDE,
            GLOBAL_STRIDE,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
            LOCAL_QUERIES=True,
            LOCAL_FIRST=False,
        )
        b_ds = b_p * (b_dp - b_delta[None, :]) * (b_inverse * scale)[None, :]
        b_kept = b_kept * b_inverse[None, :]
        b_key_bias += tl.sum(b_ds, 1)
        b_q = load_block(
            queries + o_local,
            i_n,
            tokens,
            i_c,
            local_scale,
            local_shift,
            LOCAL_STRIDE,
            WIDTH,
            BLOCK_N,
            BLOCK_D,
        )
        b_keys = tl.dot(b_ds.to(dtype), b_q, b_keys, input_precision="ieee")
        b_g = load_block(p_grad, i_n, tokens, i_c, None, None, OUT_STRIDE, WIDTH, BLOCK_N, BLOCK_D)
        b_values = tl.dot(b_kept.to(dtype), b_g, b_values, input_precision="ieee")
        b_p, b_kept, b_dp = recompute(
            local_keys + o_local,
            global_queries + o_global,
            local_values + o_local,
            p_grad_global,
            None,
            p_constant,
            b_global_max,
            i_n,
            i_m,
            tokens,
            global_tokens,
            seed,
            i_image,
            i_head,
            local_scale,
            local_shift,
            threshold,
            scale,
            keep_scale,
            HEADS,
            WIDTH,
            LOCAL_STRIDE,
            GLOBAL_STRIDE,
            LOCAL_STRIDE,
            GRAD_STRIDE,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
            LOCAL_QUERIES=False,
            LOCAL_FIRST=False,
        )
        b_p *= b_global_inverse[:, None]
        b_kept *= b_global_inverse[:, None]
        b_ds = b_p * (b_dp - b_global_delta[:, None]) * scale
        b_k = load_block(
            local_keys + o_local,
            i_n,
            tokens,
            i_c,
            local_scale,
            local_shift,
            LOCAL_STRIDE,
            WIDTH,
            BLOCK_N,
            BLOCK_D,
        )
        b_queries = tl.dot(b_ds.to(dtype), b_k, b_queries, input_precision="ieee")
        if UNITS == 4:
            # Absorbed, the local values are the same rows as the keys.
            b_rows = tl.dot(b_kept.to(dtype), b_k, b_rows, input_precision="ieee")
            b_kept_sum += tl.sum(b_kept, 1)

    o_c = i_c + tl.arange(0, BLOCK_D)
    m = m_m[:, None] & (o_c < WIDTH)[None, :]
    o_row = (i_image * global_tokens + o_m) * HEADS + i_head
    p_partial = partial + (i_split * UNITS * rows + o_row)[:, None] * WIDTH + o_c[None, :]
    tl.store(p_partial, b_queries, mask=m)
    tl.store(p_partial + rows * WIDTH, b_keys, mask=m)
    tl.store(p_partial + 2 * rows * WIDTH, b_values, mask=m)
    if UNITS == 4:
        tl.store(p_partial + 3 * rows * WIDTH, b_rows, mask=m)
        p_sums = partial_sums + i_split * 2 * rows + o_row
        tl.store(p_sums, b_key_bias, mask=m_m & (i_c == 0))
        tl.store(p_sums + rows, b_kept_sum, mask=m_m & (i_c == 0))

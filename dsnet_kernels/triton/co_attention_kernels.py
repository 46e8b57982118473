"""The forward kernels of ``co_attention`` in Triton, and what the backward's share with them.

Both forms have the same products per head, of rows of WIDTH columns: projected, these are Q, K and
V of both streams; absorbed, the local rows t = scale·local + shift stand for all three of theirs,
met by the global rows A = K_g·W_q, U = V_g·W_projᵀ and G = Q_g·W_k, and a = K_g·b_q is added to a
column of the logits. Where WIDTH exceeds a block, programs share the columns of a result and each
computes the logits.
"""

import triton
import triton.language as tl

from .common_kernels import exp_logits, keep_mask, parameter


@triton.jit
def load_block(
    p,
    i_row,
    rows,
    i_column,
    scale,
    shift,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scale·x + shift, either of which may be None, in x's dtype; zero outside rows and WIDTH."""
    o_r = tl.arange(0, BLOCK_R)
    o_c = i_column + tl.arange(0, BLOCK_D)
    m_c = o_c < WIDTH
    m = (o_r < rows - i_row)[:, None] & m_c[None, :]
    p_rows = p + tl.cast(i_row, tl.int64) * STRIDE
    b = tl.load(p_rows + (o_r[:, None] * STRIDE + o_c[None, :]), mask=m, other=0)
    if scale is not None or shift is not None:
        b_scale, b_shift = parameter(scale, o_c, m_c, 1.0), parameter(shift, o_c, m_c, 0.0)
        b = tl.where(m, tl.fma(b.to(tl.float32), b_scale, b_shift), 0.0).to(p.dtype.element_ty)
    return b


@triton.jit
def inner_products(
    p_local,
    i_local,
    local_rows,
    scale,
    shift,
    p_global,
    i_global,
    global_rows,
    LOCAL_STRIDE: tl.constexpr,
    GLOBAL_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOCAL_FIRST: tl.constexpr,
):
    """Of a block of local with a block of global rows: (BLOCK_N, BLOCK_M), or else transposed."""
    b = tl.zeros([BLOCK_N, BLOCK_M] if LOCAL_FIRST else [BLOCK_M, BLOCK_N], tl.float32)
    for i_c in range(0, WIDTH, BLOCK_D):
        b_local = load_block(
            p_local, i_local, local_rows, i_c, scale, shift, LOCAL_STRIDE, WIDTH, BLOCK_N, BLOCK_D
        )
        b_global = load_block(
            p_global, i_global, global_rows, i_c, None, None, GLOBAL_STRIDE, WIDTH, BLOCK_M, BLOCK_D
        )
        if LOCAL_FIRST:
            b = tl.dot(b_local, tl.trans(b_global), b, input_precision="ieee")
        else:
            b = tl.dot(b_global, tl.trans(b_local), b, input_precision="ieee")
    return b


# Tensors of heads are given by a stride of rows and a STEP from one head to the next. ``scale`` is
# 1/√d, ``threshold`` what a weight's random word is compared with, ``keep_scale`` 1/(1 − p).
_NUMBERS = ["tokens", "global_tokens", "threshold"]


@triton.jit(do_not_specialize=_NUMBERS)
def co_attention_to_local(
    queries,  # (B, N, …)
    local_scale,  # (Cl) or None
    local_shift,  # (Cl) or None
    keys,  # (B, M, …)
    key_bias,  # (B, M, h) or None
    values,  # (B, M, …)
    seed,  # () or None
    residual,  # (B, N, Cl) or None
    bias,  # (Cl) or None
    out,  # (B, N, …)
    statistics,  # (B, h, N, 2): the logits' maximum, Σ exp(logit − maximum)
    tokens,  # N
    global_tokens,  # M
    threshold,
    scale,
    keep_scale,
    HEADS: tl.constexpr,
    SUMMED_HEADS: tl.constexpr,  # that a program adds up
    WIDTH: tl.constexpr,
    LOCAL_STRIDE: tl.constexpr,
    LOCAL_STEP: tl.constexpr,
    GLOBAL_STRIDE: tl.constexpr,
    GLOBAL_STEP: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    OUT_STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ_h dropout(softmax(Q·Kᵀ/√d))·V of a block of local tokens, with an online softmax."""
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    GROUPS: tl.constexpr = HEADS // SUMMED_HEADS
    i_c = tl.program_id(0) % CHUNKS * BLOCK_D
    i_n = tl.program_id(0) // CHUNKS % tl.cdiv(tokens, BLOCK_N) * BLOCK_N
    i_rest = tl.program_id(0) // CHUNKS // tl.cdiv(tokens, BLOCK_N)
    i_image = (i_rest // GROUPS).to(tl.int64)
    i_group = i_rest % GROUPS
    o_n = i_n + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = queries.dtype.element_ty

    b_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(SUMMED_HEADS):
        i_head = i_group * SUMMED_HEADS + i
        p_q = queries + i_image * tokens * LOCAL_STRIDE + i_head * LOCAL_STEP
        o_global = i_image * global_tokens * GLOBAL_STRIDE + i_head * GLOBAL_STEP
        b_out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        b_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        for i_m in range(0, global_tokens, BLOCK_M):
            o_m = i_m + tl.arange(0, BLOCK_M)
            m_m = o_m < global_tokens
            b_s = inner_products(
                p_q,
                i_n,
                tokens,
                local_scale,
                local_shift,
                keys + o_global,
                i_m,
                global_tokens,
                LOCAL_STRIDE,
                GLOBAL_STRIDE,
                WIDTH,
                BLOCK_N,
                BLOCK_M,
                BLOCK_D,
                LOCAL_FIRST=True,
            )
            if key_bias is not None:
                p_bias = key_bias + (i_image * global_tokens + o_m) * HEADS + i_head
                b_s += tl.load(p_bias, mask=m_m, other=0)[None, :]
            b_s = tl.where(m_m[None, :], b_s, float("-inf"))
            b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
            b_p = exp_logits(b_s, b_new[:, None], scale, dtype)
            b_decay = tl.exp(b_max - b_new)
            b_sum = b_sum * b_decay + tl.sum(b_p, 1)
            b_max = b_new
            if seed is not None:
                b_keep = keep_mask(seed, i_image, i_head, i_n, i_m, threshold, BLOCK_N, BLOCK_M)
                b_p = tl.where(b_keep, b_p, 0.0)
            b_v = load_block(
                values + o_global,
                i_m,
                global_tokens,
                i_c,
                None,
                None,
                GLOBAL_STRIDE,
                WIDTH,
                BLOCK_M,
                BLOCK_D,
            )
            b_out = tl.dot(b_p.to(dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")
        b_total += b_out * (keep_scale / b_sum)[:, None]
        p_statistics = statistics + ((i_image * HEADS + i_head) * tokens + o_n) * 2
        tl.store(p_statistics, b_max, mask=(o_n < tokens) & (i_c == 0))
        tl.store(p_statistics + 1, b_sum, mask=(o_n < tokens) & (i_c == 0))

    o_c = i_c + tl.arange(0, BLOCK_D)
    m = (o_n < tokens)[:, None] & (o_c < WIDTH)[None, :]
    o_out = (i_image * tokens + o_n)[:, None] * OUT_STRIDE + (i_group * OUT_STEP + o_c)[None, :]
    if residual is not None:
        b_total += tl.load(residual + o_out, mask=m, other=0).to(tl.float32)
        b_total += parameter(bias, o_c, o_c < WIDTH, 0.0)
    tl.store(out + o_out, b_total.to(dtype), mask=m)


@triton.jit(do_not_specialize=[*_NUMBERS, "splits", "images"])
def co_attention_to_global(
    queries,  # (B, M, …)
    keys,  # (B, N, …)
    values,  # (B, N, …)
    local_scale,  # (Cl) or None
    local_shift,  # (Cl) or None
    seed,  # () or None
    partial,  # (splits, B, M, h, WIDTH), not yet divided by the sum
    statistics,  # (splits, 3, B, M, h): maximum, sum, sum of the kept weights
    images,  # B
    tokens,  # N
    global_tokens,  # M
    splits,
    threshold,
    scale,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL_STRIDE: tl.constexpr,
    LOCAL_STEP: tl.constexpr,
    GLOBAL_STRIDE: tl.constexpr,
    GLOBAL_STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dropout(softmax(Q·Kᵀ/√d))·V of a block of a head's global tokens over a split of the local.

    Each split has as many blocks of local tokens, but the last.
    """
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    i_c = tl.program_id(0) % CHUNKS * BLOCK_D
    i_rest = tl.program_id(0) // CHUNKS
    i_m = i_rest % tl.cdiv(global_tokens, BLOCK_M) * BLOCK_M
    i_rest //= tl.cdiv(global_tokens, BLOCK_M)
    i_split = (i_rest % splits).to(tl.int64)
    i_head = i_rest // splits % HEADS
    i_image = (i_rest // splits // HEADS).to(tl.int64)
    o_m = i_m + tl.arange(0, BLOCK_M)
    p_q = queries + i_image * global_tokens * GLOBAL_STRIDE + i_head * GLOBAL_STEP
    o_local = i_image * tokens * LOCAL_STRIDE + i_head * LOCAL_STEP
    dtype: tl.constexpr = keys.dtype.element_ty

    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_kept = tl.zeros([BLOCK_M], tl.float32)
    extent = tl.cdiv(tl.cdiv(tokens, BLOCK_N), splits) * BLOCK_N
    i_begin = (i_split * extent).to(tl.int32)
    for i_n in range(i_begin, tl.minimum(i_begin + extent, tokens), BLOCK_N):
        b_s = inner_products(
            keys + o_local,
            i_n,
            tokens,
            local_scale,
            local_shift,
            p_q,
            i_m,
            global_tokens,
            LOCAL_STRIDE,
            GLOBAL_STRIDE,
            WIDTH,
            BLOCK_N,
            BLOCK_M,
            BLOCK_D,
            LOCAL_FIRST=False,
        )
        m_n = i_n + tl.arange(0, BLOCK_N) < tokens
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = exp_logits(b_s, b_new[:, None], scale, dtype)
        b_decay = tl.exp(b_max - b_new)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new
        if seed is not None:
            b_keep = keep_mask(seed, i_image, HEADS + i_head, i_m, i_n, threshold, BLOCK_M, BLOCK_N)
            b_p = tl.where(b_keep, b_p, 0.0)
            b_kept = b_kept * b_decay + tl.sum(b_p, 1)
        b_v = load_block(
            values + o_local,
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
        b_out = tl.dot(b_p.to(dtype), b_v, b_out * b_decay[:, None], input_precision="ieee")

    if seed is None:
        b_kept = b_sum
    o_row = ((i_split * images + i_image) * global_tokens + o_m) * HEADS + i_head
    o_c = i_c + tl.arange(0, BLOCK_D)
    m_m = o_m < global_tokens
    m = m_m[:, None] & (o_c < WIDTH)[None, :]
    tl.store(partial + o_row[:, None] * WIDTH + o_c[None, :], b_out, mask=m)
    rows = images.to(tl.int64) * global_tokens * HEADS
    p_statistics = statistics + o_row + 2 * i_split * rows
    tl.store(p_statistics, b_max, mask=m_m & (i_c == 0))
    tl.store(p_statistics + rows, b_sum, mask=m_m & (i_c == 0))
    tl.store(p_statistics + 2 * rows, b_kept, mask=m_m & (i_c == 0))


@triton.jit(do_not_specialize=["heads", "width", "rows", "splits", "global_tokens"])
def co_attention_combine(
    partial,  # (splits, T, width)
    statistics,  # (splits, 3, T)
    out,  # (T, width)
    kept,  # (T): the sum of a row's weights after dropout
    softmax,  # (B, h, M, 2): maximum, sum
    rows,  # T = B·M·h
    splits,
    global_tokens,  # M
    keep_scale,
    heads,
    width,  # in units of PACK elements
    PACK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the splits have left, in their order."""
    width *= PACK
    chunks = tl.cdiv(width, BLOCK_D)
    i_c = tl.program_id(0) % chunks * BLOCK_D
    o_t = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = i_c + tl.arange(0, BLOCK_D)
    m_t = o_t < rows
    m = m_t[:, None] & (o_c < width)[None, :]
    rows = rows.to(tl.int64)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for i in range(splits):
        b_max = tl.maximum(b_max, tl.load(statistics + i * 3 * rows + o_t, mask=m_t, other=0))
    b_out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    b_kept = tl.zeros([BLOCK_T], tl.float32)
    for i in range(splits):
        p_statistics = statistics + i * 3 * rows + o_t
        b_decay = tl.exp(tl.load(p_statistics, mask=m_t, other=0) - b_max)
        b_sum += tl.load(p_statistics + rows, mask=m_t, other=1) * b_decay
        b_kept += tl.load(p_statistics + 2 * rows, mask=m_t, other=0) * b_decay
        p_partial = partial + (i * rows + o_t)[:, None] * width + o_c[None, :]
        b_out += tl.load(p_partial, mask=m, other=0) * b_decay[:, None]
    b_factor = keep_scale / b_sum
    tl.store(out + o_t[:, None] * width + o_c[None, :], b_out * b_factor[:, None], mask=m)
    m_t = m_t & (i_c == 0)
    tl.store(kept + o_t, b_kept * b_factor, mask=m_t)
    o_row = o_t // heads // global_tokens * heads + o_t % heads
    p_softmax = softmax + (o_row * global_tokens + o_t // heads % global_tokens) * 2
    tl.store(p_softmax, b_max, mask=m_t)
    tl.store(p_softmax + 1, b_sum, mask=m_t)

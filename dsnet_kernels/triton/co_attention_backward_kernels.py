"""What the backward kernels of ``co_attention`` in Triton share, and that of the local rows.

P = exp(S − maximum)/Σ is recomputed from the saved maximum, and dS = P∘(dP − delta) with delta the
sum of P∘dP over a row. Both sums are those of the weights as recomputed, so that dS adds up to zero
as it should: the saved ones are rounded differently, by what grows with the logits. Hence three
kernels: the sums of the global queries over the local tokens; the gradients of the local rows, over
the global tokens, with the sums of the local queries on the way; those of the global rows.

Forms and names are those of the forward. Beside the operands of its two products there is what dP
comes from: the gradient of the local result with the values U, and that of the global result, R,
with the local values.
"""

import triton
import triton.language as tl

from .co_attention_kernels import inner_products, load_block
from .common_kernels import exp_logits, keep_mask, parameter

_NUMBERS = ["tokens", "global_tokens", "threshold"]


@triton.jit
def recompute(
    p_local,  # rows whose products are S
    p_global,
    p_local_grad,  # rows whose products are dP
    p_global_grad,
    p_bias,  # of each global token, added to S, or None
    p_constant,  # of each global token, added to dP, or None
    b_max,  # of the queries
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
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL_STRIDE: tl.constexpr,
    GLOBAL_STRIDE: tl.constexpr,
    LOCAL_GRAD_STRIDE: tl.constexpr,
    GLOBAL_GRAD_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOCAL_QUERIES: tl.constexpr,
    LOCAL_FIRST: tl.constexpr,
):
    """exp(S − maximum), the same after dropout, and dP: (BLOCK_N, BLOCK_M), or else transposed.

    A query that does not exist has the maximum ∞, so that its weights are 0.
    """
    dtype: tl.constexpr = p_local.dtype.element_ty
    grad_scale, grad_shift = None, None
    if not LOCAL_QUERIES:
        grad_scale, grad_shift = local_scale, local_shift
    b_s = inner_products(
        p_local,
        i_n,
        tokens,
        local_scale,
        local_shift,
        p_global,
        i_m,
        global_tokens,
        LOCAL_STRIDE,
        GLOBAL_STRIDE,
        WIDTH,
        BLOCK_N,
        BLOCK_M,
        BLOCK_D,
        LOCAL_FIRST,
    )
    b_dp = inner_products(
        p_local_grad,
        i_n,
        tokens,
        grad_scale,
        grad_shift,
        p_global_grad,
        i_m,
        global_tokens,
        LOCAL_GRAD_STRIDE,
        GLOBAL_GRAD_STRIDE,
        WIDTH,
        BLOCK_N,
        BLOCK_M,
        BLOCK_D,
        LOCAL_FIRST,
    )
    LOCAL_AXIS: tl.constexpr = 0 if LOCAL_FIRST else 1
    o_m = i_m + tl.arange(0, BLOCK_M)
    m_m = o_m < global_tokens
    m_n = i_n + tl.arange(0, BLOCK_N) < tokens
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_m * HEADS, mask=m_m, other=0)
        b_s += tl.expand_dims(b_bias, LOCAL_AXIS)
    if p_constant is not None:
        b_constant = tl.load(p_constant + o_m * HEADS, mask=m_m, other=0)
        b_dp += tl.expand_dims(b_constant, LOCAL_AXIS)
    if LOCAL_QUERIES:
        m_key = tl.expand_dims(m_m, LOCAL_AXIS)
        b_max = tl.expand_dims(b_max, 1 - LOCAL_AXIS)
    else:
        m_key = tl.expand_dims(m_n, 1 - LOCAL_AXIS)
        b_max = tl.expand_dims(b_max, LOCAL_AXIS)
    # Masked before exp2: 0 − maximum of a key that does not exist may overflow.
    b_p = exp_logits(tl.where(m_key, b_s, float("-inf")), b_max, scale, dtype)
    b_kept = b_p
    if seed is not None:
        if LOCAL_QUERIES:
            b_keep = keep_mask(seed, i_image, i_head, i_n, i_m, threshold, BLOCK_N, BLOCK_M)
        else:
            i_mask = HEADS + i_head
            b_keep = keep_mask(seed, i_image, i_mask, i_m, i_n, threshold, BLOCK_M, BLOCK_N)
        b_keep = b_keep if LOCAL_QUERIES == LOCAL_FIRST else tl.trans(b_keep)
        b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
        b_kept = tl.where(b_keep, b_p * keep_scale, 0.0)
    return b_p, b_kept, b_dp


@triton.jit(do_not_specialize=[*_NUMBERS, "images"])
def co_attention_grad_local(
    grad,  # (B, N, Cl), of the new stream, or None where heads are separate
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
    attended,  # (B, N, dim), what the local queries attended to, or None
    out,  # grad_local (B, N, Cl), or (B, N, 3·dim)
    partial,  # (B·blocks of N, 3, Cl): Σ x∘dT, Σ dT, Σ grad; or None
    images,  # B
    tokens,  # N
    global_tokens,  # M
    threshold,
    scale,
    keep_scale,
    HEADS: tl.constexpr,
    SUMMED_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL_STRIDE: tl.constexpr,
    LOCAL_STEP: tl.constexpr,
    GLOBAL_STRIDE: tl.constexpr,
    GLOBAL_STEP: tl.constexpr,
    OUT_STRIDE: tl.constexpr,  # of the local result and its gradient
    OUT_STEP: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,  # of grad_global
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a block of local rows, summed over heads and uses, or dQ, dK, dV of a head."""
    CHUNKS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    GROUPS: tl.constexpr = HEADS // SUMMED_HEADS
    dtype: tl.constexpr = queries.dtype.element_ty
    blocks = tl.cdiv(tokens, BLOCK_N)
    i_c = tl.program_id(0) % CHUNKS * BLOCK_D
    i_n = tl.program_id(0) // CHUNKS % blocks * BLOCK_N
    i_image = (tl.program_id(0) // CHUNKS // blocks // GROUPS).to(tl.int64)
    i_group = tl.program_id(0) // CHUNKS // blocks % GROUPS
    o_n = i_n + tl.arange(0, BLOCK_N)
    m_n = o_n < tokens
    o_c = i_c + tl.arange(0, BLOCK_D)
    m = m_n[:, None] & (o_c < WIDTH)[None, :]

    rows = images.to(tl.int64) * global_tokens * HEADS

    # Absorbed, all three gradients are of the same rows and gather in the first.
    b_dq = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(SUMMED_HEADS):
        i_head = i_group * SUMMED_HEADS + i
        o_local = i_image * tokens * LOCAL_STRIDE + i_head * LOCAL_STEP
        o_global = i_image * global_tokens * GLOBAL_STRIDE + i_head * GLOBAL_STEP
        p_grad = grad_heads + i_image * tokens * OUT_STRIDE + i_head * OUT_STEP
        p_grad_global = grad_global + i_image * global_tokens * GRAD_STRIDE + i_head * WIDTH
        o_row = i_image * HEADS + i_head
        o_scalar = i_image * global_tokens * HEADS + i_head
        p_key_bias = None
        if key_bias is not None:
            p_key_bias = key_bias + o_scalar
        p_constant = None
        if constant is not None:
            p_constant = constant + o_scalar
        p_softmax = local_softmax + (o_row * tokens + o_n) * 2
        # A query that does not exist has the maximum ∞, so P = 0.
        b_max = tl.load(p_softmax, mask=m_n, other=float("inf"))
        b_sum = tl.zeros([BLOCK_N], tl.float32)
        b_delta = tl.zeros([BLOCK_N], tl.float32)
        b_out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        b_inverse = tl.zeros([BLOCK_N], tl.float32)
        for PASS in tl.static_range(2):
            # Registers do not hold the local rows beside the sums: each turn loads them again.
            for i_m in tl.range(0, global_tokens, BLOCK_M, disable_licm=True):
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
                    LOCAL_FIRST=True,
                )
                if PASS == 0:
                    b_sum += tl.sum(b_p, 1)
                    b_delta += tl.sum(b_p * b_dp, 1)
                    if attended is not None:
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
                        b_out = tl.dot(b_kept.to(dtype), b_v, b_out, input_precision="ieee")
                else:
                    b_ds = b_p * (b_dp - b_delta[:, None]) * (b_inverse * scale)[:, None]
                    b_k = load_block(
                        keys + o_global,
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
                    b_dq = tl.dot(b_ds.to(dtype), b_k, b_dq, input_precision="ieee")
                    o_m = i_m + tl.arange(0, BLOCK_M)
                    m_m = o_m < global_tokens
                    p_global_sums = global_sums + o_scalar + o_m * HEADS
                    b_global_delta = tl.load(p_global_sums, mask=m_m, other=0)
                    b_global_inverse = tl.load(p_global_sums + rows, mask=m_m, other=0)
                    p_global_softmax = global_softmax + (o_row * global_tokens + o_m) * 2
                    b_global_max = tl.load(p_global_softmax, mask=m_m, other=float("inf"))
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
                        LOCAL_FIRST=True,
                    )
                    b_p *= b_global_inverse[None, :]
                    b_kept *= b_global_inverse[None, :]
                    b_ds = (b_p * (b_dp - b_global_delta[None, :]) * scale).to(dtype)
                    b_q = load_block(
                        global_queries + o_global,
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
                    b_g = load_block(
                        p_grad_global,
                        i_m,
                        global_tokens,
                        i_c,
                        None,
                        None,
                        GRAD_STRIDE,
                        WIDTH,
                        BLOCK_M,
                        BLOCK_D,
                    )
                    if grad is not None:
                        b_dq = tl.dot(b_ds, b_q, b_dq, input_precision="ieee")
                        b_dq = tl.dot(b_kept.to(dtype), b_g, b_dq, input_precision="ieee")
                    else:
                        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision="ieee")
                        b_dv = tl.dot(b_kept.to(dtype), b_g, b_dv, input_precision="ieee")
            if PASS == 0:
                b_sum = tl.where(m_n, b_sum, 1.0)
                b_delta = tl.div_rn(b_delta, b_sum)
                b_inverse = 1 / b_sum
        p_sums = local_sums + (o_row * tokens + o_n) * 2
        tl.store(p_sums, b_delta, mask=m_n & (i_c == 0))
        tl.store(p_sums + 1, b_inverse, mask=m_n & (i_c == 0))
        if attended is not None:
            o_out = (i_image * tokens + o_n)[:, None] * OUT_STRIDE + i_head * OUT_STEP
            tl.store(
                attended + o_out + o_c[None, :], (b_out * b_inverse[:, None]).to(dtype), mask=m
            )

    if grad is not None:
        o_x = (i_image * tokens + o_n)[:, None] * WIDTH + o_c[None, :]
        b_x = tl.load(queries + o_x, mask=m, other=0).to(tl.float32)
        b_grad = tl.load(grad + o_x, mask=m, other=0).to(tl.float32)
        b_result = b_grad + b_dq * parameter(local_scale, o_c, o_c < WIDTH, 1.0)
        tl.store(out + o_x, b_result.to(dtype), mask=m)
        p_partial = partial + (i_image * blocks + i_n // BLOCK_N) * 3 * WIDTH + o_c
        tl.store(p_partial, tl.sum(b_x * b_dq, 0), mask=o_c < WIDTH)
        tl.store(p_partial + WIDTH, tl.sum(b_dq, 0), mask=o_c < WIDTH)
        tl.store(p_partial + 2 * WIDTH, tl.sum(b_grad, 0), mask=o_c < WIDTH)
    else:
        p_out = out + (i_image * tokens + o_n)[:, None] * LOCAL_STRIDE
        p_out += i_group * LOCAL_STEP + o_c[None, :]
        tl.store(p_out, b_dq.to(dtype), mask=m)
        tl.store(p_out + HEADS * WIDTH, b_dk.to(dtype), mask=m)
        tl.store(p_out + 2 * HEADS * WIDTH, b_dv.to(dtype), mask=m)

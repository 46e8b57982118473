"""The kernels of ``pointwise_mlp`` in Triton whose hidden activations stay on the chip.

A program has whole rows of few channels and passes over the hidden channels in chunks; the gradient
computes them again instead of reading them.
"""

import triton
import triton.language as tl

from .norm_linear_kernels import normalised
from .pointwise_mlp_kernels import add_residual, gelu, gelu_and_derivative, store_hidden


@triton.jit(do_not_specialize=["rows", "pixels"])
def pointwise_mlp_forward(
    x,  # (T, C)
    fc1_weight,  # (R, C)
    fc1_bias,  # (R) or None
    fc2_weight,  # (C, R)
    fc2_bias,  # (C) or None
    scale,  # (C) or None
    shift,  # (C) or None
    branch_scale,  # (B) or None
    hidden,  # (T in whole sixteens, R) or None
    out,  # (T, C)
    rows,  # T
    pixels,  # of an image
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = x + branch_scale·(GELU(z·W₁ᵀ + b₁)·W₂ᵀ + b₂) with z = scale·x + shift."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_C)
    m_t = o_t < rows
    m_c = o_c < WIDTH
    b_z = normalised(x + o_t * WIDTH, o_c, m_t, None, None, scale, shift, WIDTH)
    b = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for i_r in range(0, HIDDEN, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < HIDDEN
        p_first = fc1_weight + o_r[None, :] * WIDTH + o_c[:, None]
        b_first = tl.load(p_first, mask=m_c[:, None] & m_r[None, :], other=0)
        b_hidden = tl.dot(b_z, b_first, input_precision="ieee")
        if fc1_bias is not None:
            b_hidden += tl.load(fc1_bias + o_r, mask=m_r, other=0).to(tl.float32)[None, :]
        if hidden is not None:
            store_hidden(hidden, b_hidden, o_t, o_r, rows, HIDDEN)
        p_second = fc2_weight + o_c[None, :] * HIDDEN + o_r[:, None]
        b_second = tl.load(p_second, mask=m_r[:, None] & m_c[None, :], other=0)
        b = tl.dot(gelu(b_hidden).to(b_z.dtype), b_second, b, input_precision="ieee")
    o_x = o_t[:, None] * WIDTH + o_c[None, :]
    add_residual(b, fc2_bias, None, branch_scale, x, out, o_x, o_t, o_c, m_t, m_c, pixels)


@triton.jit(do_not_specialize=["rows"])
def pointwise_mlp_grad_x(
    grad,  # (T, C)
    grad_branch,  # (T, C): branch_scale·grad
    x,  # (T, C)
    fc1_weight,  # (R, C)
    fc1_bias,  # (R) or None
    fc2_weight,  # (C, R)
    scale,  # (C) or None
    shift,  # (C) or None
    grad_x,  # (T, C)
    partial_sums,  # (programs, 3, C)
    rows,  # T
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """grad + scale∘dz with dz = (grad_branch·W₂ ∘ GELU'(h))·W₁ and h = z·W₁ᵀ + b₁.

    The sums over the block's rows are those of grad_branch, dz∘x and dz.
    """
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_C)
    m_t = o_t < rows
    m_c = o_c < WIDTH
    m = m_t[:, None] & m_c[None, :]
    o_x = o_t[:, None] * WIDTH + o_c[None, :]
    p_sums = partial_sums + tl.program_id(0).to(tl.int64) * (3 * WIDTH) + o_c
    b_z = normalised(x + o_t * WIDTH, o_c, m_t, None, None, scale, shift, WIDTH)
    b_grad = tl.load(grad_branch + o_x, mask=m, other=0)
    tl.store(p_sums, tl.sum(b_grad.to(tl.float32), 0), mask=m_c)
    b = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for i_r in range(0, HIDDEN, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < HIDDEN
        m_w = m_r[:, None] & m_c[None, :]
        b_first = tl.load(fc1_weight + o_r[:, None] * WIDTH + o_c[None, :], mask=m_w, other=0)
        b_hidden = tl.dot(b_z, tl.trans(b_first), input_precision="ieee")
        if fc1_bias is not None:
            b_hidden += tl.load(fc1_bias + o_r, mask=m_r, other=0).to(tl.float32)[None, :]
        p_second = fc2_weight + o_c[:, None] * HIDDEN + o_r[None, :]
        b_second = tl.load(p_second, mask=m_c[:, None] & m_r[None, :], other=0)
        b_product = tl.dot(b_grad, b_second, input_precision="ieee")
        _, b_derivative = gelu_and_derivative(b_hidden)
        b_product = (b_product * b_derivative).to(b_z.dtype)
        b = tl.dot(b_product, b_first, b, input_precision="ieee")
    b_x = tl.load(x + o_x, mask=m, other=0).to(tl.float32)
    tl.store(p_sums + WIDTH, tl.sum(b * b_x, 0), mask=m_c)
    tl.store(p_sums + 2 * WIDTH, tl.sum(b, 0), mask=m_c)
    add_residual(b, None, scale, None, grad, grad_x, o_x, o_t, o_c, m_t, m_c, None)


@triton.jit(do_not_specialize=["rows", "slots"])
def pointwise_mlp_grad_weights(
    grad_branch,  # (T, C): branch_scale·grad
    x,  # (T, C)
    fc1_weight,  # (R, C)
    fc1_bias,  # (R) or None
    fc2_weight,  # (C, R)
    scale,  # (C) or None
    shift,  # (C) or None
    partial_fc1,  # (slots, R, C): Σ dhᵀ·z
    partial_fc1_bias,  # (slots, R): Σ dh
    partial_fc2,  # (slots, C, R): Σ grad_branchᵀ·GELU(h)
    rows,  # T
    slots,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums over the row blocks of a slot, for a chunk of hidden channels.

    These are rows here, so that the last two products have their first operand in registers.
    """
    CHUNKS: tl.constexpr = (HIDDEN + BLOCK_R - 1) // BLOCK_R
    o_r = tl.program_id(0) % CHUNKS * BLOCK_R + tl.arange(0, BLOCK_R)
    i_slot = (tl.program_id(0) // CHUNKS).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_r = o_r < HIDDEN
    m_c = o_c < WIDTH
    m_w = m_r[:, None] & m_c[None, :]
    o_fc1 = o_r[:, None] * WIDTH + o_c[None, :]
    o_fc2 = o_c[None, :] * HIDDEN + o_r[:, None]
    b_first = tl.load(fc1_weight + o_fc1, mask=m_w, other=0)
    b_second = tl.load(fc2_weight + o_fc2, mask=m_w, other=0)
    b_fc1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_fc1_bias = tl.zeros([BLOCK_R], tl.float32)
    b_fc2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for i_t in range(i_slot * BLOCK_T, rows, slots * BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = o_t < rows
        b_z = normalised(x + o_t * WIDTH, o_c, m_t, None, None, scale, shift, WIDTH)
        p_grad = grad_branch + o_t[:, None] * WIDTH + o_c[None, :]
        b_grad = tl.load(p_grad, mask=m_t[:, None] & m_c[None, :], other=0)
        b_hidden = tl.dot(b_first, tl.trans(b_z), input_precision="ieee")
        if fc1_bias is not None:
            b_hidden += tl.load(fc1_bias + o_r, mask=m_r, other=0).to(tl.float32)[:, None]
        b_activated, b_derivative = gelu_and_derivative(b_hidden)
        b_fc2 = tl.dot(b_activated.to(b_z.dtype), b_grad, b_fc2, input_precision="ieee")
        b_product = tl.dot(b_second, tl.trans(b_grad), input_precision="ieee")
        b_product = (b_product * b_derivative).to(b_z.dtype)
        b_fc1 = tl.dot(b_product, b_z, b_fc1, input_precision="ieee")
        b_fc1_bias += tl.sum(b_product.to(tl.float32), 1)

    tl.store(partial_fc1 + i_slot * (HIDDEN * WIDTH) + o_fc1, b_fc1, mask=m_w)
    tl.store(partial_fc1_bias + i_slot * HIDDEN + o_r, b_fc1_bias, mask=m_r)
    tl.store(partial_fc2 + i_slot * (HIDDEN * WIDTH) + o_fc2, b_fc2, mask=m_w)

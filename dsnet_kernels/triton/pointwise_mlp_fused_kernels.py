"""The kernels of ``pointwise_mlp`` in Triton whose hidden activations stay on the chip.

A program has whole rows of few channels and passes over the hidden channels in chunks; the gradient
computes them again instead of reading them.
"""

import triton
import triton.language as tl

from .norm_linear_kernels import affine, normal, normalised
from .pointwise_mlp_kernels import (
    add_residual,
    gelu,
    gelu_and_derivative,
    image_factors,
    store_hidden,
)


@triton.jit
def _scaled(b_grad, branch_scale, o_t, m_t, pixels):
    """The gradient of the branch's result, in the dtype of grad."""
    if branch_scale is None:
        b_scaled = b_grad
    else:
        b_factors = image_factors(branch_scale, o_t, m_t, pixels)
        b_scaled = (b_grad.to(tl.float32) * b_factors).to(b_grad.dtype)
    return b_scaled


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


@triton.jit(do_not_specialize=["rows", "pixels"])
def pointwise_mlp_grad_x(
    grad,  # (T, C)
    x,  # (T, C)
    fc1_weight,  # (R, C)
    fc1_bias,  # (R) or None
    fc2_weight,  # (C, R)
    scale,  # (C) or None
    shift,  # (C) or None
    branch_scale,  # (B) or None
    grad_x,  # (T, C)
    rows,  # T
    pixels,  # of an image
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """grad + scale∘(dh·W₁) with dh = (branch_scale·grad·W₂)∘GELU'(z·W₁ᵀ + b₁)."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_c = tl.arange(0, BLOCK_C)
    m_t = o_t < rows
    m_c = o_c < WIDTH
    o_x = o_t[:, None] * WIDTH + o_c[None, :]
    b_z = normalised(x + o_t * WIDTH, o_c, m_t, None, None, scale, shift, WIDTH)
    b_grad = tl.load(grad + o_x, mask=m_t[:, None] & m_c[None, :], other=0)
    b_grad = _scaled(b_grad, branch_scale, o_t, m_t, pixels)
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
    add_residual(b, None, scale, None, grad, grad_x, o_x, o_t, o_c, m_t, m_c, pixels)


@triton.jit(do_not_specialize=["rows", "pixels", "slots"])
def pointwise_mlp_grad_weights(
    grad,  # (T, C)
    x,  # (T, C)
    fc1_weight,  # (R, C)
    fc1_bias,  # (R) or None
    fc2_weight,  # (C, R)
    scale,  # (C) or None
    shift,  # (C) or None
    branch_scale,  # (B) or None
    partial_fc1,  # (slots, R, C): Σ dhᵀ·x
    partial_fc1_bias,  # (slots, R): Σ dh
    partial_fc2,  # (slots, C, R): Σ dyᵀ·GELU(h)
    partial_fc2_bias,  # (slots, C): Σ dy
    rows,  # T
    pixels,  # of an image
    slots,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Sums over the row blocks of a slot for a chunk of hidden channels; dy is branch_scale·grad.

    The hidden channels are rows here: what the last two products read is then in registers.
    """
    CHUNKS: tl.constexpr = (HIDDEN + BLOCK_R - 1) // BLOCK_R
    i_chunk = tl.program_id(0) % CHUNKS
    i_slot = (tl.program_id(0) // CHUNKS).to(tl.int64)
    o_r = i_chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_C)
    m_r = o_r < HIDDEN
    m_c = o_c < WIDTH
    m_w = m_r[:, None] & m_c[None, :]
    o_fc1 = o_r[:, None] * WIDTH + o_c[None, :]
    o_fc2 = o_c[None, :] * HIDDEN + o_r[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    b_first = tl.load(fc1_weight + o_fc1, mask=m_w, other=0)
    b_second = tl.load(fc2_weight + o_fc2, mask=m_w, other=0)
    b_fc1 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_fc1_bias = tl.zeros([BLOCK_R], tl.float32)
    b_fc2 = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_fc2_bias = tl.zeros([BLOCK_C], tl.float32)
    for i_t in range(i_slot * BLOCK_T, rows, slots * BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = o_t < rows
        m = m_t[:, None] & m_c[None, :]
        b_x = normal(x + o_t * WIDTH, o_c, m_t, None, None, WIDTH)
        b_z = affine(b_x, scale, shift, o_c, m, WIDTH).to(dtype)
        b_grad = tl.load(grad + o_t[:, None] * WIDTH + o_c[None, :], mask=m, other=0)
        b_grad = _scaled(b_grad, branch_scale, o_t, m_t, pixels)
        b_hidden = tl.dot(b_first, tl.trans(b_z), input_precision="ieee")
        if fc1_bias is not None:
            b_hidden += tl.load(fc1_bias + o_r, mask=m_r, other=0).to(tl.float32)[:, None]
        b_product = tl.dot(b_second, tl.trans(b_grad), input_precision="ieee")
        b_activated, b_derivative = gelu_and_derivative(b_hidden)
        b_product = (b_product * b_derivative).to(dtype)
        b_fc1 = tl.dot(b_product, b_x.to(dtype), b_fc1, input_precision="ieee")
        b_fc2 = tl.dot(b_activated.to(dtype), b_grad, b_fc2, input_precision="ieee")
        b_fc1_bias += tl.sum(b_product.to(tl.float32), 1)
        b_fc2_bias += tl.sum(b_grad.to(tl.float32), 0)

    tl.store(partial_fc1 + i_slot * (HIDDEN * WIDTH) + o_fc1, b_fc1, mask=m_w)
    tl.store(partial_fc1_bias + i_slot * HIDDEN + o_r, b_fc1_bias, mask=m_r)
    tl.store(partial_fc2 + i_slot * (HIDDEN * WIDTH) + o_fc2, b_fc2, mask=m_w)
    tl.store(partial_fc2_bias + i_slot * WIDTH + o_c, b_fc2_bias, mask=m_c & (i_chunk == 0))

"""The kernels of ``pointwise_mlp`` in Triton whose hidden activations pass through memory.

Each is a product of a block of rows with a matrix; GELU, its derivative and the residual are at its
end, so that each value meets them once.
"""

import triton
import triton.language as tl

from .common_kernels import LOG2_E, program_block
from .norm_linear_kernels import normalised, with_bias

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_ZERO = tl.constexpr(0.3989422804014327)


@triton.jit
def _cdf(b):
    """Φ(u)."""
    return tl.fma(tl.math.erf(b * SQRT_HALF), 0.5, 0.5)


@triton.jit
def gelu(b):
    """u·Φ(u) in float32."""
    return b * _cdf(b)


@triton.jit
def gelu_and_derivative(b):
    """u·Φ(u) and Φ(u) + u·φ(u) in float32."""
    b_cdf = _cdf(b)
    b_density = tl.exp2(b * b * (-0.5 * LOG2_E)) * DENSITY_AT_ZERO
    return b * b_cdf, tl.fma(b, b_density, b_cdf)


@triton.jit
def store_hidden(hidden, b, o_t, o_r, rows, HIDDEN: tl.constexpr):
    """Columns ``o_r`` of what the backward reads, with the padding: no element stays unwritten.

    A block has a multiple of 16 rows, so that the padding lies in the last one.
    """
    m = (o_t // 16 * 16 < rows)[:, None] & (o_r < HIDDEN)[None, :]
    p_hidden = hidden + o_t[:, None] * HIDDEN + o_r[None, :]
    tl.store(p_hidden, b.to(hidden.dtype.element_ty), mask=m)


@triton.jit
def add_residual(
    b, bias, column_scale, branch_scale, residual, out, o_out, o_t, o_n, m_t, m_n, pixels
):
    """Stores residual + branch_scale·column_scale∘(b + bias)."""
    if bias is not None:
        b += tl.load(bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    if column_scale is not None:
        b *= tl.load(column_scale + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    if branch_scale is not None:
        b *= tl.load(branch_scale + o_t // pixels, mask=m_t, other=0).to(tl.float32)[:, None]
    m = m_t[:, None] & m_n[None, :]
    b += tl.load(residual + o_out, mask=m, other=0).to(tl.float32)
    tl.store(out + o_out, b.to(out.dtype.element_ty), mask=m)


@triton.jit
def _product(
    p_x,
    p_matrix,  # the rows of the matrix
    scale,
    shift,
    m_t,
    m_n,
    WIDTH: tl.constexpr,
    M_WIDTH: tl.constexpr,  # stride of the matrix's columns
    BLOCK_C: tl.constexpr,
):
    """(scale·x + shift)·matrixᵀ in float32, of the rows that the pointers are at."""
    b = tl.zeros([p_x.shape[0], p_matrix.shape[0]], tl.float32)
    for i_c in range(0, WIDTH, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_x = normalised(p_x, o_c, m_t, None, None, scale, shift, WIDTH)
        p_block = p_matrix[None, :] + o_c[:, None] * M_WIDTH
        b_matrix = tl.load(p_block, mask=(o_c < WIDTH)[:, None] & m_n[None, :], other=0)
        b = tl.dot(b_x, b_matrix, b, input_precision="ieee")
    return b


@triton.jit(do_not_specialize=["rows"])
def pointwise_mlp_hidden(
    x,  # (T, C)
    scale,  # (C) or None
    shift,  # (C) or None
    fc1_weight,  # (R, C)
    fc1_bias,  # (R) or None
    hidden,  # (T in whole sixteens, R) or None
    activated,  # (T, R) or None
    rows,  # T
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """hidden = z·W₁ᵀ + b₁ with z = scale·x + shift, and activated = GELU(hidden) unrounded."""
    o_t, o_r, m_t, m_r = program_block(rows, HIDDEN, BLOCK_T, BLOCK_N)
    p_weight = fc1_weight + o_r * WIDTH
    b = _product(x + o_t * WIDTH, p_weight, scale, shift, m_t, m_r, WIDTH, 1, BLOCK_C)
    if fc1_bias is not None:
        b = with_bias(b, fc1_bias + o_r, m_t, m_r)
    if hidden is not None:
        store_hidden(hidden, b, o_t, o_r, rows, HIDDEN)
    if activated is not None:
        p_activated = activated + o_t[:, None] * HIDDEN + o_r[None, :]
        b_activated = gelu(b).to(activated.dtype.element_ty)
        tl.store(p_activated, b_activated, mask=m_t[:, None] & m_r[None, :])


@triton.jit(do_not_specialize=["rows", "pixels"])
def pointwise_mlp_residual(
    x,  # (T, K)
    matrix,  # (N, K) with its strides
    bias,  # (N) or None
    column_scale,  # (N) or None
    branch_scale,  # (B) or None
    residual,  # (T, N)
    out,  # (T, N)
    rows,  # T
    pixels,  # of an image
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    M_OUTPUT: tl.constexpr,  # strides of the matrix
    M_WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = residual + branch_scale·column_scale∘(x·matrixᵀ + bias)."""
    o_t, o_n, m_t, m_n = program_block(rows, OUTPUTS, BLOCK_T, BLOCK_N)
    p_matrix = matrix + o_n * M_OUTPUT
    b = _product(x + o_t * WIDTH, p_matrix, None, None, m_t, m_n, WIDTH, M_WIDTH, BLOCK_C)
    o_out = o_t[:, None] * OUTPUTS + o_n[None, :]
    add_residual(
        b, bias, column_scale, branch_scale, residual, out, o_out, o_t, o_n, m_t, m_n, pixels
    )


@triton.jit(do_not_specialize=["rows"])
def pointwise_mlp_grad_hidden(
    grad,  # (T, C)
    fc2_weight,  # (C, R)
    hidden,  # (T, R)
    activated,  # (T, R)
    grad_hidden,  # (T, R)
    rows,  # T
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_hidden = (grad·W₂)∘GELU'(hidden), and activated = GELU(hidden)."""
    o_t, o_r, m_t, m_r = program_block(rows, HIDDEN, BLOCK_T, BLOCK_N)
    p_weight = fc2_weight + o_r
    b = _product(grad + o_t * WIDTH, p_weight, None, None, m_t, m_r, WIDTH, HIDDEN, BLOCK_C)
    m = m_t[:, None] & m_r[None, :]
    o = o_t[:, None] * HIDDEN + o_r[None, :]
    b_hidden = tl.load(hidden + o, mask=m, other=0).to(tl.float32)
    b_activated, b_derivative = gelu_and_derivative(b_hidden)
    tl.store(activated + o, b_activated.to(activated.dtype.element_ty), mask=m)
    tl.store(grad_hidden + o, (b * b_derivative).to(grad_hidden.dtype.element_ty), mask=m)

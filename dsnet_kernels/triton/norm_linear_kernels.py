"""A linear map of normalised tokens and its gradients, in Triton.

y = (n∘norm_weight + norm_bias)·Wᵀ + b. With LAYER_NORM n = (x − mean)·rstd over channels, else
n = x and the affine, which may be absent, is that of a folded BatchNorm. The gradients of the
parameters are partial sums over a fixed cut of the rows.
"""

import triton
import triton.language as tl

from .common_kernels import parameter, program_block


@triton.jit
def moments(p_x, m_t, eps, width, BLOCK_C: tl.constexpr):
    """Mean and 1/√(variance + eps) of the rows of width channels that ``p_x`` points at."""
    b_mean = tl.zeros(p_x.shape, tl.float32)
    b_squares = tl.zeros(p_x.shape, tl.float32)
    for i_c in range(0, width, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = (o_c < width)[None, :]
        b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_t[:, None] & m_c, other=0).to(tl.float32)
        # Deviations from the block's own mean, and the step between means (Chan et al., 1979):
        # one pass, and no cancellation where the mean is large.
        count = tl.minimum(width - i_c, BLOCK_C)
        part = count / (i_c + count)
        b_block = tl.sum(b_x, 1) / count
        b_deviation = tl.where(m_c, b_x - b_block[:, None], 0.0)
        b_step = b_block - b_mean
        b_squares += tl.sum(b_deviation * b_deviation, 1) + b_step * b_step * (i_c * part)
        b_mean += b_step * part
    return b_mean, tl.div_rn(1.0, tl.sqrt_rn(b_squares / width + eps))


@triton.jit
def normal(p_x, o_c, m_t, b_mean, b_rstd, width):
    """Columns ``o_c`` of n in float32, zero outside; without ``b_mean`` n = x."""
    m = m_t[:, None] & (o_c < width)[None, :]
    b = tl.load(p_x[:, None] + o_c[None, :], mask=m, other=0).to(tl.float32)
    if b_mean is not None:
        b = tl.where(m, (b - b_mean[:, None]) * b_rstd[:, None], 0.0)
    return b


@triton.jit
def normalised(p_x, o_c, m_t, b_mean, b_rstd, norm_weight, norm_bias, width):
    """Columns ``o_c`` of n∘norm_weight + norm_bias in x's dtype, zero outside."""
    b = normal(p_x, o_c, m_t, b_mean, b_rstd, width)
    if norm_weight is not None or norm_bias is not None:
        m_c = o_c < width
        b_weight = parameter(norm_weight, o_c, m_c, 1.0)
        b = tl.fma(b, b_weight, parameter(norm_bias, o_c, m_c, 0.0))
        b = tl.where(m_t[:, None] & m_c[None, :], b, 0.0)
    return b.to(p_x.dtype.element_ty)


@triton.jit
def with_bias(b, p_bias, m_t, m_d):
    """b plus a row, zero outside."""
    b_bias = tl.load(p_bias, mask=m_d, other=0).to(tl.float32)
    return tl.where(m_t[:, None], b + b_bias[None, :], 0.0)


@triton.jit(do_not_specialize=["rows"])
def norm_linear(
    x,  # (T, C)
    norm_weight,  # (C), or None without LAYER_NORM
    norm_bias,  # (C), likewise
    linear_weight,  # (O, C)
    linear_bias,  # (O)
    y,  # (T, O)
    rows,  # T
    eps,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = n·Wᵀ + b: a block of rows and of columns."""
    o_t, o_n, m_t, m_n = program_block(rows, OUTPUTS, BLOCK_T, BLOCK_N)
    p_x = x + o_t * WIDTH
    b_mean, b_rstd = None, None
    if LAYER_NORM:
        b_mean, b_rstd = moments(p_x, m_t, eps, WIDTH, BLOCK_C)
    b_y = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i_c in range(0, WIDTH, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_x = normalised(p_x, o_c, m_t, b_mean, b_rstd, norm_weight, norm_bias, WIDTH)
        m_w = (o_c < WIDTH)[:, None] & m_n[None, :]
        p_w = linear_weight + o_n[None, :] * WIDTH + o_c[:, None]
        b_w = tl.load(p_w, mask=m_w, other=0).to(b_x.dtype)
        b_y = tl.dot(b_x, b_w, b_y, input_precision="ieee")
    b_y = with_bias(b_y, linear_bias + o_n, m_t, m_n)
    p_y = y + o_t[:, None] * OUTPUTS + o_n[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit
def _grad_normal(
    p_grad,  # the rows of grad_y
    linear_weight,
    norm_weight,
    o_c,
    m_t,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Columns ``o_c`` of (dy·W)∘norm_weight, the gradient of n."""
    m_c = o_c < WIDTH
    b = tl.zeros([p_grad.shape[0], o_c.shape[0]], tl.float32)
    for i_n in range(0, OUTPUTS, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < OUTPUTS
        m_g = m_t[:, None] & m_n[None, :]
        b_g = tl.load(p_grad[:, None] + o_n[None, :], mask=m_g, other=0)
        p_w = linear_weight + o_n[:, None] * WIDTH + o_c[None, :]
        b_w = tl.load(p_w, mask=m_n[:, None] & m_c[None, :], other=0).to(dtype)
        b = tl.dot(b_g, b_w, b, input_precision="ieee")
    return b * parameter(norm_weight, o_c, m_c, 1.0)


@triton.jit(do_not_specialize=["rows"])
def norm_linear_grad_x(
    grad,  # (T, C)
    x,  # (T, C)
    grad_y,  # (T, O)
    norm_weight,  # (C), or None without LAYER_NORM
    linear_weight,  # (O, C)
    grad_x,  # (T, C)
    statistics,  # (2, T): mean and rstd, or None without LAYER_NORM
    rows,  # T
    eps,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """grad + rstd·(g − mean(g) − n·mean(g∘n)), without LAYER_NORM grad + g; g is n's gradient.

    Where a block has fewer than C columns, g is computed twice: for the means, then for the result.
    """
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < rows
    p_x = x + o_t * WIDTH
    p_grad = grad_y + o_t * OUTPUTS
    dtype: tl.constexpr = x.dtype.element_ty
    if LAYER_NORM:
        b_mean, b_rstd = moments(p_x, m_t, eps, WIDTH, BLOCK_C)
        tl.store(statistics + o_t, b_mean, mask=m_t)
        tl.store(statistics + rows + o_t, b_rstd, mask=m_t)

    b_sum = tl.zeros([BLOCK_T], tl.float32)
    b_product = tl.zeros([BLOCK_T], tl.float32)
    FIRST: tl.constexpr = 0 if LAYER_NORM else 1
    for PASS in tl.static_range(FIRST, 2):
        for i_c in tl.static_range(0, WIDTH, BLOCK_C):
            o_c = i_c + tl.arange(0, BLOCK_C)
            if PASS == FIRST or BLOCK_C < WIDTH:
                b_g = _grad_normal(
                    p_grad, linear_weight, norm_weight, o_c, m_t, dtype, WIDTH, OUTPUTS, BLOCK_N
                )
                if LAYER_NORM:
                    b_normal = normal(p_x, o_c, m_t, b_mean, b_rstd, WIDTH)
            if PASS == 0:
                b_sum += tl.sum(b_g, 1)
                b_product += tl.sum(b_g * b_normal, 1)
            else:
                if LAYER_NORM:
                    b_g -= (b_sum / WIDTH)[:, None] + b_normal * (b_product / WIDTH)[:, None]
                    b_g *= b_rstd[:, None]
                m = m_t[:, None] & (o_c < WIDTH)[None, :]
                o_x = o_t[:, None] * WIDTH + o_c[None, :]
                b_grad = tl.load(grad + o_x, mask=m, other=0).to(tl.float32)
                tl.store(grad_x + o_x, (b_grad + b_g).to(dtype), mask=m)


# In units of PACK elements.
_SIZES = ["width", "outputs"]


@triton.jit(do_not_specialize=["rows", "slots", *_SIZES])
def norm_linear_grad_weight(
    x,  # (T, C)
    grad_y,  # (T, O)
    statistics,  # (2, T), or None
    partial_weight,  # (slots, O, C)
    partial_bias,  # (slots, O)
    rows,  # T
    slots,
    width,
    outputs,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Σ dyᵀ·n and Σ dy over the row blocks of a slot."""
    width *= PACK
    outputs *= PACK
    column_blocks = (width + BLOCK_C - 1) // BLOCK_C
    row_blocks = (outputs + BLOCK_N - 1) // BLOCK_N
    i_c = tl.program_id(0) % column_blocks
    i_n = tl.program_id(0) // column_blocks % row_blocks
    i_slot = (tl.program_id(0) // (column_blocks * row_blocks)).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < outputs
    b_weight = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_bias = tl.zeros([BLOCK_N], tl.float32)
    for i_t in range(i_slot * BLOCK_T, rows, slots * BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = o_t < rows
        p_g = grad_y + o_t[None, :] * outputs + o_n[:, None]
        b_g = tl.load(p_g, mask=m_n[:, None] & m_t[None, :], other=0)
        b_mean, b_rstd = None, None
        if statistics is not None:
            b_mean = tl.load(statistics + o_t, mask=m_t, other=0)
            b_rstd = tl.load(statistics + rows + o_t, mask=m_t, other=0)
        b_normal = normal(x + o_t * width, o_c, m_t, b_mean, b_rstd, width).to(b_g.dtype)
        b_weight = tl.dot(b_g, b_normal, b_weight, input_precision="ieee")
        b_bias += tl.sum(b_g.to(tl.float32), 1)

    o_row = i_slot * outputs + o_n
    m = m_n[:, None] & (o_c < width)[None, :]
    tl.store(partial_weight + o_row[:, None] * width + o_c[None, :], b_weight, mask=m)
    tl.store(partial_bias + o_row, b_bias, mask=m_n & (i_c == 0))


@triton.jit(do_not_specialize=["slots", *_SIZES])
def norm_linear_sum_slots(
    partial_weight,  # (slots, O, C)
    partial_bias,  # (slots, O)
    norm_weight,  # (C), or None without LAYER_NORM
    norm_bias,  # (C), likewise
    linear_weight,  # (O, C)
    grad_y,  # (T, O), only for the dtype of the products
    grad_weight,  # (O, C)
    grad_bias,  # (O)
    partial_norm,  # (blocks of O, 2, C)
    slots,
    width,
    outputs,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """With G = Σ dyᵀ·n and s = Σ dy: dW = G∘norm_weight + s·norm_biasᵀ, db = s.

    The gradients of norm_weight and norm_bias are Σ over the rows of W∘G and of W∘s, here over
    those of the block.
    """
    width *= PACK
    outputs *= PACK
    column_blocks = (width + BLOCK_C - 1) // BLOCK_C
    i_c = tl.program_id(0) % column_blocks
    i_n = tl.program_id(0) // column_blocks
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_s = tl.arange(0, BLOCK_SLOTS)
    m_c = o_c < width
    m_n = o_n < outputs
    m_s = o_s < slots
    m = m_n[:, None] & m_c[None, :]
    o_w = o_n[:, None] * width + o_c[None, :]
    p_sum = partial_weight + (o_s.to(tl.int64) * (outputs * width))[:, None, None] + o_w[None]
    b_sum = tl.sum(tl.load(p_sum, mask=m_s[:, None, None] & m[None], other=0), 0)
    p_bias = partial_bias + o_s[:, None] * outputs + o_n[None, :]
    b_bias = tl.sum(tl.load(p_bias, mask=m_s[:, None] & m_n[None, :], other=0), 0)
    b_norm_weight = parameter(norm_weight, o_c, m_c, 1.0)
    b_norm_bias = parameter(norm_bias, o_c, m_c, 0.0)
    b_grad = b_sum * b_norm_weight + b_bias[:, None] * b_norm_bias
    tl.store(grad_weight + o_w, b_grad, mask=m)
    tl.store(grad_bias + o_n, b_bias, mask=m_n & (i_c == 0))

    # As the products take it.
    b_w = tl.load(linear_weight + o_w, mask=m, other=0).to(grad_y.dtype.element_ty).to(tl.float32)
    p_norm = partial_norm + i_n * (2 * width) + o_c
    tl.store(p_norm, tl.sum(b_w * b_sum, 0), mask=m_c)
    tl.store(p_norm + width, tl.sum(b_w * b_bias[:, None], 0), mask=m_c)

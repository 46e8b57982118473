"""Products of rows with small matrices, and of the transposes of two sets of rows, in Triton.

Rows are those of a contiguous tensor, of which a group (a head) takes some columns.
"""

import triton
import triton.language as tl

# In units of PACK elements, but for the number of groups.
_SIZES = ["width", "outputs", "groups", "x_stride", "x_group", "out_stride", "out_group"]


@triton.jit(do_not_specialize=["rows", "factor", "m_stride", "m_group", *_SIZES])
def multiply_rows(
    x,  # (T, …)
    matrix,
    bias,  # None, or one value per group and column
    weights,  # (T, groups): what the bias is multiplied with in each row, or None
    residual,  # as out, or None
    out,  # (T, …)
    rows,  # T
    factor,
    width,
    outputs,
    groups,
    x_stride,  # of rows and of groups
    x_group,
    m_stride,  # of the matrix's rows with BY_ROW, else of its columns
    m_group,
    out_stride,
    out_group,
    BY_ROW: tl.constexpr,
    DTYPE: tl.constexpr,  # of the product's operands
    PACK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = factor·(x·matrixᵀ + weights·bias) + residual for a block of rows and of columns."""
    width *= PACK
    outputs *= PACK
    column_blocks = tl.cdiv(outputs, BLOCK_N)
    i_group = tl.program_id(0) // column_blocks % groups
    o_t = (tl.program_id(0) // (column_blocks * groups)).to(tl.int64) * BLOCK_T
    o_t += tl.arange(0, BLOCK_T)
    o_n = tl.program_id(0) % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t = o_t < rows
    m_n = o_n < outputs
    p_x = x + i_group * (x_group * PACK) + o_t * (x_stride * PACK)
    m_stride *= PACK
    p_matrix = matrix + i_group * (m_group * PACK) + (o_n * m_stride if BY_ROW else o_n)
    b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i_c in range(0, width, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < width
        b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_t[:, None] & m_c[None, :], other=0)
        p_block = p_matrix[None, :] + (o_c if BY_ROW else o_c * m_stride)[:, None]
        b_matrix = tl.load(p_block, mask=m_c[:, None] & m_n[None, :], other=0)
        b = tl.dot(b_x.to(DTYPE), b_matrix.to(DTYPE), b, input_precision="ieee")
    if bias is not None:
        b_bias = tl.load(bias + i_group * outputs + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
        if weights is not None:
            b_bias = b_bias * tl.load(weights + o_t * groups + i_group, mask=m_t, other=0)[:, None]
        b += b_bias
    b *= factor
    m = m_t[:, None] & m_n[None, :]
    o_out = i_group * (out_group * PACK) + o_t[:, None] * (out_stride * PACK) + o_n[None, :]
    if residual is not None:
        b += tl.load(residual + o_out, mask=m, other=0).to(tl.float32)
    tl.store(out + o_out, b.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows", "slots", "factor", "y_stride", "y_group", *_SIZES])
def multiply_transposed(
    x,  # (T, …)
    y,  # (T, …)
    out,  # (slots, …)
    sums,  # (slots, groups·outputs): Σ x, or None
    rows,  # T
    slots,
    factor,
    outputs,
    width,
    groups,
    x_stride,  # of rows and of groups
    x_group,
    y_stride,
    y_group,
    out_stride,
    out_group,
    DTYPE: tl.constexpr,  # of the product's operands
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """factor·xᵀ·y and Σ x, without the factor, over the row blocks of a slot."""
    width *= PACK
    outputs *= PACK
    column_blocks = tl.cdiv(width, BLOCK_C)
    output_blocks = tl.cdiv(outputs, BLOCK_N)
    i_c = tl.program_id(0) % column_blocks
    i_n = tl.program_id(0) // column_blocks % output_blocks
    i_rest = tl.program_id(0) // (column_blocks * output_blocks)
    i_group = i_rest % groups
    i_slot = (i_rest // groups).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = o_c < width
    m_n = o_n < outputs
    x_stride *= PACK
    y_stride *= PACK
    p_group_x = x + i_group * (x_group * PACK)
    p_group_y = y + i_group * (y_group * PACK)
    b = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for i_t in range(i_slot * BLOCK_T, rows, slots * BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = o_t < rows
        p_x = p_group_x + o_t[None, :] * x_stride + o_n[:, None]
        p_y = p_group_y + o_t[:, None] * y_stride + o_c[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_t[None, :], other=0)
        b_y = tl.load(p_y, mask=m_t[:, None] & m_c[None, :], other=0)
        b = tl.dot(b_x.to(DTYPE), b_y.to(DTYPE), b, input_precision="ieee")
        b_sum += tl.sum(b_x.to(tl.float32), 1)

    p_out = out + (i_slot * groups * outputs) * width + i_group * (out_group * PACK)
    p_out = p_out + o_n[:, None] * (out_stride * PACK) + o_c[None, :]
    tl.store(p_out, b * factor, mask=m_n[:, None] & m_c[None, :])
    if sums is not None:
        p_sum = sums + (i_slot * groups + i_group) * outputs + o_n
        tl.store(p_sum, b_sum, mask=m_n & (i_c == 0))

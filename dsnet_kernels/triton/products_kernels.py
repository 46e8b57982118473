"""Products of rows with small matrices, and of the transposes of two sets of rows, in Triton.

Rows are those of a contiguous tensor, of which a group (a head) takes some columns.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "factor"])
def multiply_rows(
    x,  # (T, …)
    matrix,
    bias,  # None, or one value per group and column
    weights,  # (T, groups): what the bias is multiplied with in each row, or None
    residual,  # as out, or None
    out,  # (T, …)
    rows,  # T
    factor,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    X_STRIDE: tl.constexpr,  # of rows and of groups
    X_GROUP: tl.constexpr,
    M_OUTPUT: tl.constexpr,  # strides of the matrix
    M_WIDTH: tl.constexpr,
    M_GROUP: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    DTYPE: tl.constexpr,  # of the product's operands
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = factor·(x·matrixᵀ + weights·bias) + residual for a block of rows and of columns."""
    COLUMN_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    i_group = tl.program_id(0) // COLUMN_BLOCKS % GROUPS
    o_t = (tl.program_id(0) // (COLUMN_BLOCKS * GROUPS)).to(tl.int64) * BLOCK_T
    o_t += tl.arange(0, BLOCK_T)
    o_n = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    m_t = o_t < rows
    m_n = o_n < OUTPUTS
    p_x = x + i_group * X_GROUP + o_t * X_STRIDE
    p_matrix = matrix + i_group * M_GROUP + o_n * M_OUTPUT
    b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i_c in range(0, WIDTH, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < WIDTH
        b_x = tl.load(p_x[:, None] + o_c[None, :], mask=m_t[:, None] & m_c[None, :], other=0)
        p_block = p_matrix[None, :] + o_c[:, None] * M_WIDTH
        b_matrix = tl.load(p_block, mask=m_c[:, None] & m_n[None, :], other=0)
        b = tl.dot(b_x.to(DTYPE), b_matrix.to(DTYPE), b, input_precision="ieee")
    if bias is not None:
        b_bias = tl.load(bias + i_group * OUTPUTS + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
        if weights is not None:
            b_bias = b_bias * tl.load(weights + o_t * GROUPS + i_group, mask=m_t, other=0)[:, None]
        b += b_bias
    b *= factor
    m = m_t[:, None] & m_n[None, :]
    o_out = i_group * OUT_GROUP + o_t[:, None] * OUT_STRIDE + o_n[None, :]
    if residual is not None:
        b += tl.load(residual + o_out, mask=m, other=0).to(tl.float32)
    tl.store(out + o_out, b.to(out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows", "slots", "factor"])
def multiply_transposed(
    x,  # (T, …)
    y,  # (T, …)
    out,  # (slots, …), of which each slot has SIZE values
    sums,  # (slots, groups·OUTPUTS): Σ x, or None
    rows,  # T
    slots,
    factor,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    X_STRIDE: tl.constexpr,  # of rows and of groups
    X_GROUP: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    Y_GROUP: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    DTYPE: tl.constexpr,  # of the product's operands
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """factor·xᵀ·y and Σ x, without the factor, over the row blocks of a slot."""
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    OUTPUT_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    i_c = tl.program_id(0) % COLUMN_BLOCKS
    i_n = tl.program_id(0) // COLUMN_BLOCKS % OUTPUT_BLOCKS
    i_rest = tl.program_id(0) // (COLUMN_BLOCKS * OUTPUT_BLOCKS)
    i_group = i_rest % GROUPS
    i_slot = (i_rest // GROUPS).to(tl.int64)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_c = o_c < WIDTH
    m_n = o_n < OUTPUTS
    b = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for i_t in range(i_slot * BLOCK_T, rows, slots * BLOCK_T):
        o_t = i_t + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = o_t < rows
        p_x = x + i_group * X_GROUP + o_t[None, :] * X_STRIDE + o_n[:, None]
        p_y = y + i_group * Y_GROUP + o_t[:, None] * Y_STRIDE + o_c[None, :]
        b_x = tl.load(p_x, mask=m_n[:, None] & m_t[None, :], other=0)
        b_y = tl.load(p_y, mask=m_t[:, None] & m_c[None, :], other=0)
        b = tl.dot(b_x.to(DTYPE), b_y.to(DTYPE), b, input_precision="ieee")
        b_sum += tl.sum(b_x.to(tl.float32), 1)

    p_out = out + i_slot * SIZE + i_group * OUT_GROUP + o_n[:, None] * OUT_STRIDE + o_c[None, :]
    tl.store(p_out, b * factor, mask=m_n[:, None] & m_c[None, :])
    if sums is not None:
        p_sum = sums + (i_slot * GROUPS + i_group) * OUTPUTS + o_n
        tl.store(p_sum, b_sum, mask=m_n & (i_c == 0))

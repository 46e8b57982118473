"""What kernels of several operations share: tiles of rows, softmax, dropout."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def parameter(p, o_c, m_c, ABSENT: tl.constexpr):
    """Values of (C,) for the tile's channels, as a row in float32; ABSENT where ``p`` is None."""
    if p is None:
        b_value = tl.full([o_c.shape[0]], ABSENT, tl.float32)
    else:
        b_value = tl.load(p + o_c, mask=m_c, other=0).to(tl.float32)
    return b_value[None, :]


@triton.jit
def program_block(rows, columns, BLOCK_R: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Rows and columns of the program's block, and which of them there are; columns go first."""
    column_blocks = (columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    o_r = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tl.program_id(0) % column_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return o_r, o_c, o_r < rows, o_c < columns


@triton.jit
def load_rows(
    p,
    i_row,
    rows,
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """A tile from row ``i_row`` on, zero outside ``rows`` and COLUMNS; without MASKED all rows."""
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, BLOCK_COLUMNS)
    m = (o_c < COLUMNS)[None, :]
    if MASKED:
        m = m & (o_r < rows - i_row)[:, None]
    p_rows = p + tl.cast(i_row, tl.int64) * STRIDE
    return tl.load(p_rows + (o_r[:, None] * STRIDE + o_c[None, :]), mask=m, other=0)


@triton.jit
def store_rows(p, b, i_row, rows, STRIDE: tl.constexpr, COLUMNS: tl.constexpr):
    """The counterpart of ``load_rows``, in the dtype of ``p``."""
    o_r = tl.arange(0, b.shape[0])
    o_c = tl.arange(0, b.shape[1])
    m = (o_r < rows - i_row)[:, None] & (o_c < COLUMNS)[None, :]
    p_rows = p + tl.cast(i_row, tl.int64) * STRIDE
    tl.store(p_rows + (o_r[:, None] * STRIDE + o_c[None, :]), b.to(p.dtype.element_ty), mask=m)


@triton.jit
def keep_mask(
    seed, i_image, i_head, i_query, i_key, threshold, QUERIES: tl.constexpr, KEYS: tl.constexpr
):
    """(QUERIES, KEYS): which weights stay; word key % 4 of philox(key // 4, query, head, image)."""
    o_query = i_query + tl.arange(0, QUERIES)
    o_block = i_key // 4 + tl.arange(0, KEYS // 4)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed), o_block[None, :], o_query[:, None], i_head, i_image.to(tl.int32)
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= threshold.to(tl.uint32)


@triton.jit
def exp_logits(b_product, b_shift, scale, dtype: tl.constexpr):
    """exp(scale·product − shift).

    In float32 the logit is rounded first, as it is in ``shift``, so that a lone key has weight 1;
    in 16 bits its factor joins that of exp2, which saves a multiplication.
    """
    if dtype.primitive_bitwidth == 32:
        b_power = (b_product * scale - b_shift) * LOG2_E
    else:
        b_power = tl.fma(b_product, scale * LOG2_E, b_shift * -LOG2_E)
    return tl.exp2(b_power)

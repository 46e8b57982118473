"""The kernels of ``depthwise_conv3x3`` in Triton.

A program owns a tile of columns × channels, where the columns of all images follow one another,
and goes down the rows of a strip, so that each pixel is read from memory once.
"""

import triton
import triton.language as tl

from .common_kernels import parameter


@triton.jit
def _taps(p_weight, o_c, m_c):
    """One row u of the taps, v = 0, 1, 2; ``p_weight`` is at tap (u, 0) of channel 0."""
    p = p_weight + o_c * 9
    left = tl.load(p, mask=m_c, other=0).to(tl.float32)[None, :]
    here = tl.load(p + 1, mask=m_c, other=0).to(tl.float32)[None, :]
    right = tl.load(p + 2, mask=m_c, other=0).to(tl.float32)[None, :]
    return left, here, right


@triton.jit
def _load_three(p, stride, m, m_left, m_right):
    """The pixels left of, at and right of ``p``; zero outside the image."""
    left = tl.load(p - stride, mask=m_left, other=0)
    here = tl.load(p, mask=m, other=0)
    right = tl.load(p + stride, mask=m_right, other=0)
    return left, here, right


@triton.jit
def _add_row(total, w_left, w_here, w_right, left, here, right):
    """total + w_left·left + w_here·here + w_right·right."""
    total = tl.fma(w_left, left, total)
    total = tl.fma(w_here, here, total)
    return tl.fma(w_right, right, total)


# Sizes and strides come in units of PACK and STRIDE_PACK elements, which tells the compiler what
# divides them without a variant for every value; all index arithmetic is in int64.
_SIZES = (
    ["packs", "height", "width", "columns", "groups", "strips", "rows"]
    + ["column_blocks", "column_programs", "stride_batch", "stride_row", "stride_column"]
    + [f"{of}_stride_{along}" for of in ("grad", "x") for along in ("batch", "row", "column")]
)


@triton.jit(do_not_specialize=_SIZES)
def depthwise_conv3x3_forward(
    x,  # (B, C, H, W), channels next to each other
    weight,  # (C, 9)
    bias,  # (C) or None
    scale,  # (C) or None
    shift,  # (C) or None
    out,  # (B, H, W, C) contiguous
    packs,
    height,
    width,
    columns,
    stride_batch,
    stride_row,
    stride_column,
    groups,
    strips,
    rows,
    RESIDUAL: tl.constexpr,
    FOLD: tl.constexpr,
    PACK: tl.constexpr,
    STRIDE_PACK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """out = DW3(scale·x + shift) + bias (+ x): each input row is added to three output rows.

    FOLD takes scale and residual into the taps, shift into what a row's sum starts from. That
    rounds at |scale·x|, not at its sum with shift, which only storage in 16 bits hides.
    """
    i_slot = tl.program_id(0) // groups
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    i_begin = (i_slot % strips).to(tl.int64) * rows
    i_end = tl.minimum(i_begin + rows, height)
    # With the rows around the strip that the image has.
    i_first = tl.maximum(i_begin - 1, 0)
    i_last = tl.minimum(i_end, height - 1)
    channels = packs.to(tl.int64) * PACK
    stride_row = stride_row.to(tl.int64) * STRIDE_PACK
    stride_column = stride_column.to(tl.int64) * STRIDE_PACK

    o_c = i_group * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    o_q = (i_slot // strips).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    o_b = o_q // width
    o_j = o_q % width
    m_c = o_c < channels
    m = (o_q < columns)[:, None] & m_c[None, :]
    m_left = m & (o_j > 0)[:, None]
    m_right = m & (o_j + 1 < width)[:, None]

    w00, w01, w02 = _taps(weight, o_c, m_c)
    w10, w11, w12 = _taps(weight + 3, o_c, m_c)
    w20, w21, w22 = _taps(weight + 6, o_c, m_c)

    b_scale = parameter(scale, o_c, m_c, 1.0)
    b_shift = parameter(shift, o_c, m_c, 0.0)
    b_here = tl.zeros([BLOCK_COLUMNS, BLOCK_CHANNELS], tl.float32)
    b_here += parameter(bias, o_c, m_c, 0.0)
    b_start = b_here
    if FOLD:
        # The shift counts for taps inside the image only: those of the row below are added with
        # that row, those of the row above are left out of the image's first.
        if shift is not None:
            b_shift_above = b_shift * (
                tl.where(m_left, w00, 0.0) + w01 + tl.where(m_right, w02, 0.0)
            )
            b_shift_level = b_shift * (
                tl.where(m_left, w10, 0.0) + w11 + tl.where(m_right, w12, 0.0)
            )
            b_shift_below = b_shift * (
                tl.where(m_left, w20, 0.0) + w21 + tl.where(m_right, w22, 0.0)
            )
            b_here += b_shift_level
            b_start = b_here + b_shift_above
            b_here = tl.where(i_first > 0, b_start, b_here)
        w00, w01, w02 = w00 * b_scale, w01 * b_scale, w02 * b_scale
        w10, w11, w12 = w10 * b_scale, w11 * b_scale, w12 * b_scale
        w20, w21, w22 = w20 * b_scale, w21 * b_scale, w22 * b_scale
        if RESIDUAL:
            w11 += 1.0

    o_x = o_b * (stride_batch.to(tl.int64) * STRIDE_PACK) + o_j * stride_column
    p_x = x + i_first * stride_row + o_x[:, None] + o_c[None, :]
    o_out = (o_b * height + i_begin) * width + o_j
    p_out = out + o_out[:, None] * channels + o_c[None, :]
    out_row = width.to(tl.int64) * channels

    # A row is loaded while the one before is computed with; its centre, on which the neighbours
    # hit the cache, another row ahead.
    b_above = tl.zeros([BLOCK_COLUMNS, BLOCK_CHANNELS], tl.float32)
    b_left, b_centre, b_right = _load_three(p_x, stride_column, m, m_left, m_right)
    b_ahead = tl.load(p_x + stride_row, mask=m & (i_first < i_last), other=0)
    for i_row in range(i_first, i_last + 1):
        b_x0 = b_left.to(tl.float32)
        b_x1 = b_centre.to(tl.float32)
        b_x2 = b_right.to(tl.float32)
        p_x += stride_row
        has_next = i_row < i_last
        b_left = tl.load(p_x - stride_column, mask=m_left & has_next, other=0)
        b_centre = b_ahead
        b_right = tl.load(p_x + stride_column, mask=m_right & has_next, other=0)
        b_ahead = tl.load(p_x + stride_row, mask=m & (i_row + 1 < i_last), other=0)

        if FOLD:
            if shift is not None:
                b_above += b_shift_below
        else:
            if RESIDUAL:
                b_here += b_x1
            b_x0 = tl.where(m_left, tl.fma(b_scale, b_x0, b_shift), 0.0)
            b_x1 = tl.fma(b_scale, b_x1, b_shift)
            b_x2 = tl.where(m_right, tl.fma(b_scale, b_x2, b_shift), 0.0)
        b_above = _add_row(b_above, w20, w21, w22, b_x0, b_x1, b_x2)
        b_here = _add_row(b_here, w10, w11, w12, b_x0, b_x1, b_x2)
        b_below = _add_row(b_start, w00, w01, w02, b_x0, b_x1, b_x2)
        is_own = i_row > i_begin
        tl.store(p_out, b_above.to(out.dtype.element_ty), mask=m & is_own)
        p_out += tl.where(is_own, out_row, 0)
        b_above = b_here
        b_here = b_below
    tl.store(p_out, b_above.to(out.dtype.element_ty), mask=m & (i_end == height))


@triton.jit(do_not_specialize=_SIZES)
def depthwise_conv3x3_backward(
    grad,  # (B, C, H, W), channels next to each other
    x,  # (B, C, H, W), likewise
    weight,  # (C, 9)
    scale,  # (C) or None
    shift,  # (C) or None
    grad_x,  # (B, H, W, C) contiguous
    partials,  # (slots, 12, C), each value written once
    packs,
    height,
    width,
    columns,
    grad_stride_batch,
    grad_stride_row,
    grad_stride_column,
    x_stride_batch,
    x_stride_row,
    x_stride_column,
    groups,
    strips,
    rows,
    column_blocks,
    column_programs,
    RESIDUAL: tl.constexpr,
    PACK: tl.constexpr,
    STRIDE_PACK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The gradient of z = scale·x + shift is grad convolved with the flipped taps.

    Parameter gradients are sums over pixels q: taps k Σ z(q)·grad(q − k), bias Σ grad,
    scale Σ grad_z·x, shift Σ grad_z.
    """
    i_slot = tl.program_id(0) // groups
    i_group = (tl.program_id(0) % groups).to(tl.int64)
    i_begin = (i_slot % strips).to(tl.int64) * rows
    i_end = tl.minimum(i_begin + rows, height)
    channels = packs.to(tl.int64) * PACK
    grad_stride_row = grad_stride_row.to(tl.int64) * STRIDE_PACK
    grad_stride_column = grad_stride_column.to(tl.int64) * STRIDE_PACK
    x_stride_row = x_stride_row.to(tl.int64) * STRIDE_PACK
    grad_x_row = width.to(tl.int64) * channels

    o_c = i_group * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_c = o_c < channels
    w00, w01, w02 = _taps(weight, o_c, m_c)
    w10, w11, w12 = _taps(weight + 3, o_c, m_c)
    w20, w21, w22 = _taps(weight + 6, o_c, m_c)
    b_scale = parameter(scale, o_c, m_c, 1.0)
    b_shift = parameter(shift, o_c, m_c, 0.0)

    zeros = tl.zeros([BLOCK_COLUMNS, BLOCK_CHANNELS], tl.float32)
    s00, s01, s02 = zeros, zeros, zeros
    s10, s11, s12 = zeros, zeros, zeros
    s20, s21, s22 = zeros, zeros, zeros
    s_bias, s_scale, s_shift = zeros, zeros, zeros
    for i_columns in range((i_slot // strips).to(tl.int64), column_blocks, column_programs):
        o_q = tl.arange(0, BLOCK_COLUMNS).to(tl.int64) + i_columns * BLOCK_COLUMNS
        o_b = o_q // width
        o_j = o_q % width
        m = (o_q < columns)[:, None] & m_c[None, :]
        m_left = m & (o_j > 0)[:, None]
        m_right = m & (o_j + 1 < width)[:, None]
        o_grad = o_b * (grad_stride_batch.to(tl.int64) * STRIDE_PACK) + o_j * grad_stride_column
        p_grad = grad + i_begin * grad_stride_row + o_grad[:, None] + o_c[None, :]
        o_x = o_b * (x_stride_batch.to(tl.int64) * STRIDE_PACK)
        o_x += o_j * (x_stride_column.to(tl.int64) * STRIDE_PACK)
        p_x = x + i_begin * x_stride_row + o_x[:, None] + o_c[None, :]
        o_out = (o_b * height + i_begin) * width + o_j
        p_out = grad_x + o_out[:, None] * channels + o_c[None, :]

        # A window of three rows of the gradient slides down the strip.
        has_above = i_begin > 0
        b_g00, b_g01, b_g02 = _load_three(
            p_grad - grad_stride_row,
            grad_stride_column,
            m & has_above,
            m_left & has_above,
            m_right & has_above,
        )
        b_g10, b_g11, b_g12 = _load_three(p_grad, grad_stride_column, m, m_left, m_right)
        for i_row in range(i_begin, i_end):
            p_grad += grad_stride_row
            has_below = i_row + 1 < height
            b_x = tl.load(p_x, mask=m, other=0).to(tl.float32)
            b_g20, b_g21, b_g22 = _load_three(
                p_grad, grad_stride_column, m & has_below, m_left & has_below, m_right & has_below
            )
            g00, g01, g02 = b_g00.to(tl.float32), b_g01.to(tl.float32), b_g02.to(tl.float32)
            g10, g11, g12 = b_g10.to(tl.float32), b_g11.to(tl.float32), b_g12.to(tl.float32)
            g20, g21, g22 = b_g20.to(tl.float32), b_g21.to(tl.float32), b_g22.to(tl.float32)

            b_grad_z = _add_row(zeros, w00, w01, w02, g22, g21, g20)
            b_grad_z = _add_row(b_grad_z, w10, w11, w12, g12, g11, g10)
            b_grad_z = _add_row(b_grad_z, w20, w21, w22, g02, g01, g00)
            b_z = tl.fma(b_scale, b_x, b_shift)
            s00, s01, s02 = tl.fma(b_z, g22, s00), tl.fma(b_z, g21, s01), tl.fma(b_z, g20, s02)
            s10, s11, s12 = tl.fma(b_z, g12, s10), tl.fma(b_z, g11, s11), tl.fma(b_z, g10, s12)
            s20, s21, s22 = tl.fma(b_z, g02, s20), tl.fma(b_z, g01, s21), tl.fma(b_z, g00, s22)
            s_bias += g11
            s_scale = tl.fma(b_grad_z, b_x, s_scale)
            s_shift += b_grad_z

            b_out = b_scale * b_grad_z
            if RESIDUAL:
                b_out += g11
            tl.store(p_out, b_out.to(grad_x.dtype.element_ty), mask=m)
            p_x += x_stride_row
            p_out += grad_x_row
            b_g00, b_g01, b_g02 = b_g10, b_g11, b_g12
            b_g10, b_g11, b_g12 = b_g20, b_g21, b_g22

    p_partial = partials + i_slot.to(tl.int64) * 12 * channels + o_c
    tl.store(p_partial, tl.sum(s00, 0), mask=m_c)
    tl.store(p_partial + channels, tl.sum(s01, 0), mask=m_c)
    tl.store(p_partial + 2 * channels, tl.sum(s02, 0), mask=m_c)
    tl.store(p_partial + 3 * channels, tl.sum(s10, 0), mask=m_c)
    tl.store(p_partial + 4 * channels, tl.sum(s11, 0), mask=m_c)
    tl.store(p_partial + 5 * channels, tl.sum(s12, 0), mask=m_c)
    tl.store(p_partial + 6 * channels, tl.sum(s20, 0), mask=m_c)
    tl.store(p_partial + 7 * channels, tl.sum(s21, 0), mask=m_c)
    tl.store(p_partial + 8 * channels, tl.sum(s22, 0), mask=m_c)
    tl.store(p_partial + 9 * channels, tl.sum(s_bias, 0), mask=m_c)
    tl.store(p_partial + 10 * channels, tl.sum(s_scale, 0), mask=m_c)
    tl.store(p_partial + 11 * channels, tl.sum(s_shift, 0), mask=m_c)


@triton.jit(do_not_specialize=["slots", "count"])
def depthwise_conv3x3_sum_slots(
    partials,  # (slots, count)
    sums,  # (count)
    slots,
    count,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """sums[i] = Σ partials[slot, i], in an order that depends on the number of slots alone."""
    o_i = tl.program_id(0).to(tl.int64) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    m_i = o_i < count
    b_sum = tl.zeros([BLOCK_SLOTS, BLOCK_VALUES], tl.float32)
    for i_first in range(0, slots, BLOCK_SLOTS):
        o_slot = i_first + tl.arange(0, BLOCK_SLOTS).to(tl.int64)
        p = partials + o_slot[:, None] * count + o_i[None, :]
        b_sum += tl.load(p, mask=(o_slot < slots)[:, None] & m_i[None, :], other=0)
    tl.store(sums + o_i, tl.sum(b_sum, 0), mask=m_i)

"""The kernels of ``upsample_concat`` in Triton: bilinear sampling behind a product, its adjoint.

The index arithmetic is that of torch's ``align_corners=False`` in float32, which compilers fuse.
"""

import triton
import triton.language as tl

from .common_kernels import program_block


@triton.jit
def _source(o, size, coarse):
    """The two entries of a coarse axis that entry ``o`` of ``size`` samples, and the second's part.

    Both are the last one where there is none behind it.
    """
    scale = tl.div_rn(coarse.to(tl.float32), size.to(tl.float32))
    b_at = tl.maximum(tl.fma(scale, o.to(tl.float32) + 0.5, -0.5), 0.0)
    o_first = tl.minimum(b_at.to(tl.int32), coarse - 1)
    o_second = tl.minimum(o_first + 1, coarse - 1)
    return o_first, o_second, b_at - o_first.to(tl.float32)


@triton.jit
def _sample(mixed, o_row, o_left, o_right, b_right, o_c, m, coarse_width, CHANNELS: tl.constexpr):
    """Between two columns of one coarse row; ``o_row`` counts the rows of all images."""
    p = mixed + o_row * coarse_width * CHANNELS
    b_left = tl.load((p + o_left * CHANNELS)[:, None] + o_c[None, :], mask=m, other=0)
    b = tl.load((p + o_right * CHANNELS)[:, None] + o_c[None, :], mask=m, other=0)
    return b_left * (1.0 - b_right)[:, None] + b * b_right[:, None]


_SIZES = ["pixels", "height", "width", "coarse_height", "coarse_width"]


@triton.jit(do_not_specialize=_SIZES)
def upsample_concat_forward(
    local,  # (B, H, W, Cl)
    mixed,  # (B, Hg, Wg, C), the global stream's part on its own grid, in float32
    weight,  # (C, Cl + Cg)
    bias,  # (C) or None
    residual,  # (B, H, W, C) or None
    branch_scale,  # (B) or None
    out,  # (B, H, W, C)
    pixels,  # B·H·W
    height,
    width,
    coarse_height,
    coarse_width,
    LOCAL_WIDTH: tl.constexpr,
    GLOBAL_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = residual + branch_scale·(local·W_lᵀ + bilinear(mixed) + bias): a block of each."""
    o_t, o_n, m_t, m_n = program_block(pixels, CHANNELS, BLOCK_T, BLOCK_N)
    m = m_t[:, None] & m_n[None, :]
    dtype: tl.constexpr = local.dtype.element_ty
    b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i_c in range(0, LOCAL_WIDTH, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        m_c = o_c < LOCAL_WIDTH
        p_local = local + o_t[:, None] * LOCAL_WIDTH + o_c[None, :]
        b_local = tl.load(p_local, mask=m_t[:, None] & m_c[None, :], other=0)
        p_weight = weight + o_n[None, :] * (LOCAL_WIDTH + GLOBAL_WIDTH) + o_c[:, None]
        b_weight = tl.load(p_weight, mask=m_c[:, None] & m_n[None, :], other=0).to(dtype)
        b = tl.dot(b_local, b_weight, b, input_precision="ieee")

    # Rows behind the last sample the last pixel.
    o_pixel = tl.minimum(o_t, pixels - 1)
    o_image = o_pixel // width // height
    o_top, o_bottom, b_bottom = _source(o_pixel // width % height, height, coarse_height)
    o_left, o_right, b_right = _source(o_pixel % width, width, coarse_width)
    o_top = o_image * coarse_height + o_top
    o_bottom = o_image * coarse_height + o_bottom
    b_top = _sample(mixed, o_top, o_left, o_right, b_right, o_n, m, coarse_width, CHANNELS)
    b_low = _sample(mixed, o_bottom, o_left, o_right, b_right, o_n, m, coarse_width, CHANNELS)
    b += b_top * (1.0 - b_bottom)[:, None] + b_low * b_bottom[:, None]
    if bias is not None:
        b += tl.load(bias + o_n, mask=m_n, other=0).to(tl.float32)[None, :]
    if branch_scale is not None:
        b *= tl.load(branch_scale + o_image).to(tl.float32)[:, None]
    o_out = o_t[:, None] * CHANNELS + o_n[None, :]
    if residual is not None:
        b += tl.load(residual + o_out, mask=m, other=0).to(tl.float32)
    tl.store(out + o_out, b.to(dtype), mask=m)


@triton.jit(do_not_specialize=["rows", "size", "coarse", "inner", "channels"])
def upsample_concat_adjoint(
    x,  # (outer, size, inner, C)
    out,  # (outer, coarse, inner, C) in float32
    rows,  # outer·coarse·inner
    size,
    coarse,
    inner,
    channels,
    PACK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The adjoint of sampling along one axis, where each coarse entry gathers what sampled it."""
    channels *= PACK
    o_t, o_n, m_t, m_n = program_block(rows, channels, BLOCK_T, BLOCK_N)
    o_outer = o_t // inner // coarse
    o_coarse = o_t // inner % coarse
    p_x = x + (o_outer * size * inner + o_t % inner) * channels
    # Entries whose source lies within 1 of the coarse one, and one more at either end for rounding.
    o_first = tl.maximum(((2 * o_coarse - 1) * size - coarse) // (2 * coarse), 0)
    b = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i in range(2 * size // coarse + 4):
        o_x = o_first + i
        o_left, o_right, b_right = _source(o_x, size, coarse)
        b_weight = tl.where(o_left == o_coarse, 1.0 - b_right, 0.0)
        b_weight += tl.where(o_right == o_coarse, b_right, 0.0)
        m_x = m_t & (o_x < size) & ((o_left == o_coarse) | (o_right == o_coarse))
        p_block = (p_x + o_x * inner * channels)[:, None] + o_n[None, :]
        b_x = tl.load(p_block, mask=m_x[:, None] & m_n[None, :], other=0)
        b += b_x.to(tl.float32) * b_weight[:, None]
    p_out = out + o_t[:, None] * channels + o_n[None, :]
    tl.store(p_out, b, mask=m_t[:, None] & m_n[None, :])

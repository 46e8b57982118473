"""The DS-Block: two streams, self-attention, co-attention and an MLP."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import dsnet_kernels as kernels

from .norm import batch_norm, batch_norm_affine


def stream_widths(dim: int, num_heads: int, alpha: float) -> tuple[int, int]:
    """(local, global) channels of a block of width ``dim``; the global share is ``alpha``.

    Raises:
        ValueError: if alpha is outside [0, 1] or the global channels do not split into the heads.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha: expected 0 <= alpha <= 1, got {alpha}")
    global_dim = round(alpha * dim)
    if global_dim % num_heads:
        raise ValueError(
            f"alpha: expected round(alpha * {dim}) to be a multiple of {num_heads} heads,"
            f" got alpha {alpha}, {global_dim} global channels"
        )
    return dim - global_dim, global_dim


class DropPath(nn.Module):
    """Stochastic depth as a factor per image: 0 with probability p, else 1 / (1 − p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        kernels.checks.probability("drop_path", p)
        self.p = p

    def forward(self, x: Tensor) -> Tensor | None:
        """The (B,) factors for x's images, or None where they are all 1."""
        if self.p == 0.0 or not self.training:
            return None
        keep = 1.0 - self.p
        factors = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        return factors.bernoulli_(keep).div_(keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p:.3f}"


class GlobalAttention(nn.Module):
    """Parameters of the global stream's self-attention: LayerNorm and one projection to Q, K, V."""

    def __init__(
        self, dim: int, num_heads: int, dropout: float, backend: str | Sequence[str] | None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.backend = backend
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.global_attention(
            x,
            self.num_heads,
            self.norm.weight,
            self.norm.bias,
            self.qkv.weight,
            self.qkv.bias,
            eps=self.norm.eps,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )


class CoAttention(nn.Module):
    """Parameters of the inter-scale alignment, which maps both streams to a common width."""

    def __init__(
        self,
        local_dim: int,
        global_dim: int,
        dim: int,
        num_heads: int,
        dropout: float,
        backend: str | Sequence[str] | None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.backend = backend
        self.local_norm = nn.BatchNorm2d(local_dim)
        self.local_qkv = nn.Linear(local_dim, 3 * dim)
        self.local_proj = nn.Linear(dim, local_dim)
        self.global_norm = nn.LayerNorm(global_dim)
        self.global_qkv = nn.Linear(global_dim, 3 * dim)
        self.global_proj = nn.Linear(dim, global_dim)

    def forward(self, local: Tensor, global_: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = batch_norm_affine(self.local_norm, local)
        return kernels.co_attention(
            local,
            global_,
            self.num_heads,
            self.global_norm.weight,
            self.global_norm.bias,
            self.local_qkv.weight,
            self.local_qkv.bias,
            self.global_qkv.weight,
            self.global_qkv.bias,
            self.local_proj.weight,
            self.local_proj.bias,
            self.global_proj.weight,
            self.global_proj.bias,
            local_scale=scale,
            local_shift=shift,
            eps=self.global_norm.eps,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )


class DepthwiseConv(nn.Module):
    """x + DW3(x), or x + DW3(BN(x)) with ``norm``."""

    def __init__(self, dim: int, norm: bool, backend: str | Sequence[str] | None) -> None:
        super().__init__()
        self.backend = backend
        self.norm = nn.BatchNorm2d(dim) if norm else None
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (None, None) if self.norm is None else batch_norm_affine(self.norm, x)
        return kernels.depthwise_conv3x3(
            x,
            self.conv.weight,
            self.conv.bias,
            scale=scale,
            shift=shift,
            residual=True,
            backend=self.backend,
        )


class PointwiseMlp(nn.Module):
    """x + fc2(GELU(fc1(BN(x)))) of 1×1 convolutions."""

    def __init__(self, dim: int, ratio: float, backend: str | Sequence[str] | None) -> None:
        super().__init__()
        self.backend = backend
        hidden = int(dim * ratio)
        self.norm = nn.BatchNorm2d(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, branch_scale: Tensor | None) -> Tensor:
        scale, shift = batch_norm_affine(self.norm, x)
        return kernels.pointwise_mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            scale=scale,
            shift=shift,
            branch_scale=branch_scale,
            backend=self.backend,
        )


class DSBlock(nn.Module):
    """One block of the Dual-stream Network on (B, C, H, W).

    x₁ = x + DW3(x); [y_g, y_l] = Conv1×1(BN(x₁)); the local stream y_l passes a depthwise
    convolution at full resolution, the global stream y_g self-attention on the grid
    max(1, ⌊H/r⌋) × max(1, ⌊W/r⌋); co-attention lets each read the other; both are mixed by a 1×1
    convolution and followed by an MLP.

    Args:
        dim: C, channels in and out.
        num_heads: attention heads, of both attentions.
        global_reduction: r, how many times coarser the global grid is.
        alpha: share of the global channels. 0: convolution only; 1: self-attention only.
        alignment: False leaves the co-attention out.
        co_attention_dim: common width of the co-attention; default C / 2 rounded to the heads, the
            streams' own width at alpha 0.5.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: probability of dropping either residual branch, per image.
        attn_drop: dropout on the softmax outputs while training.
        backend: of every operation in the block; None follows :class:`dsnet_kernels.backend`.

    Raises:
        ValueError: for widths that do not split into the heads, an unknown backend, or a number
            out of its range.

    Source: DS-Net (arXiv 2105.14734), section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        global_reduction: int,
        *,
        alpha: float = 0.5,
        alignment: bool = True,
        co_attention_dim: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        attn_drop: float = 0.0,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        widths = {"dim": dim, "num_heads": num_heads, "global_reduction": global_reduction}
        for name, value in widths.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 1 <= dim * mlp_ratio < math.inf:
            raise ValueError(
                f"mlp_ratio: expected at least one hidden channel at width {dim}, got {mlp_ratio}"
            )
        if backend is not None:
            kernels.backends._normalise(backend, "backend")
        kernels.checks.probability("attn_drop", attn_drop)
        self.dim = dim
        self.global_reduction = global_reduction
        self.backend = backend
        self.local_dim, self.global_dim = stream_widths(dim, num_heads, alpha)
        if co_attention_dim is None:
            co_attention_dim = max(1, dim // 2 // num_heads) * num_heads
        kernels.checks.heads("co_attention_dim", co_attention_dim, num_heads)

        self.position = DepthwiseConv(dim, norm=False, backend=backend)
        self.norm = nn.BatchNorm2d(dim)
        self.split = nn.Conv2d(dim, dim, 1)
        self.local_conv = self.attention = self.co_attention = None
        if self.local_dim:
            self.local_conv = DepthwiseConv(self.local_dim, norm=True, backend=backend)
        if self.global_dim:
            self.attention = GlobalAttention(self.global_dim, num_heads, attn_drop, backend)
        if alignment and self.local_dim and self.global_dim:
            self.co_attention = CoAttention(
                self.local_dim, self.global_dim, co_attention_dim, num_heads, attn_drop, backend
            )
        self.fuse = nn.Conv2d(dim, dim, 1)
        self.mlp = PointwiseMlp(dim, mlp_ratio, backend)
        self.drop_path = DropPath(drop_path)

    def global_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the global tokens for a block input of height × width."""
        r = self.global_reduction
        return max(1, height // r), max(1, width // r)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_streams(x)[0]

    def forward_streams(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output, and both streams as they enter the fusion.

        Returns:
            (B, C, H, W); the local stream (B, Cl, H, W); the global stream (B, Cg, Hg, Wg).
        """
        x = self.position(x)
        z = batch_norm(self.norm, x)
        grid = self.global_grid(*x.shape[2:])
        if self.local_conv is not None:
            local = self.local_conv(self._split_rows(z, self.global_dim, self.dim))
        else:
            local = z[:, :0]
        # The global stream reads its rows of the split through the downsample alone, with which a
        # 1×1 convolution commutes: both run on the coarse grid.
        coarse = self._downsample(z, grid)
        if self.attention is not None:
            tokens = self.attention(_to_tokens(self._split_rows(coarse, 0, self.global_dim)))
            if self.co_attention is not None:
                local, tokens = self.co_attention(local, tokens)
            global_ = tokens.transpose(1, 2).unflatten(2, grid)
        else:
            global_ = coarse[:, :0]

        x = kernels.upsample_concat(
            local,
            global_,
            self.fuse.weight.flatten(1),
            self.fuse.bias,
            x,
            branch_scale=self.drop_path(x),
            backend=self.backend,
        )
        return self.mlp(x, self.drop_path(x)), local, global_

    def _split_rows(self, x: Tensor, first: int, last: int) -> Tensor:
        """Channels [first, last) of the split of x."""
        weight, bias = self.split.weight[first:last], self.split.bias[first:last]
        return functional.conv2d(x, weight, bias)

    def _downsample(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Bilinear to ``grid`` without antialiasing."""
        # Not a comparison of shapes, which would pin the size of an exported network.
        if self.global_reduction == 1:
            return x
        return functional.interpolate(x, size=grid, mode="bilinear", align_corners=False)


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), a view where x is channels_last."""
    return x.flatten(2).transpose(1, 2)

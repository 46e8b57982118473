"""A DSBlock for inference, its norms folded."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsnet_kernels as kernels
from dsnet_kernels import packed

from ..block import DSBlock
from .fold import ChannelAffine, Constants, constant_affine, fold_into_linear, wide

INFERENCE_ONLY = (
    "an optimised model is for inference only, its norms are folded;"
    " train the model that it was made from"
)

ORDER = (
    "position",
    "split_local",
    "split_global",
    "local_conv",
    "local_affine",
    "attention",
    "co_attention",
    "co_attention_affine",
    "fuse",
    "mlp",
)
"""Groups of constants, as :func:`dsnet_kernels.ds_block` takes them one after the other."""


class OptimizedBlock(nn.Module):
    """A DSBlock in evaluation, (B, C, H, W) → (B, C, H, W), of constants alone.

    With BN(x) = s·x + t: the split has W·diag(s) and b + W·t, on the coarse grid for the global
    stream, and so has the first layer of the MLP. The local depthwise convolution, whose zero
    padding comes behind its norm, and co-attention take s and t themselves. On the CPU all of it
    is one operator, :func:`dsnet_kernels.ds_block`, where that serves; its packed copies of the
    constants are made with the first call.

    Args:
        block: the source; its unfolded parameters are shared where they keep their dtype.
        name: of the block, for errors.
        dtype: of the weights; None keeps the source's. s, t and the MLP's first bias stay in
            float32 or wider.
        backend: of every operation; None follows :class:`dsnet_kernels.backend`.

    Raises:
        TypeError, ValueError: for a norm that cannot be folded.
    """

    def __init__(
        self,
        block: DSBlock,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.backend = backend
        self.dim, self.local_dim, self.global_dim = block.dim, block.local_dim, block.global_dim
        self.global_reduction = block.global_reduction
        dtype = block.split.weight.dtype if dtype is None else dtype
        accurate = wide(dtype)
        self.position = _of_layers(dtype, conv=block.position.conv)

        split, first = block.split, self.global_dim
        weight, bias = fold_into_linear(block.norm, f"{name}.norm", split.weight, split.bias, dtype)
        bias = bias.to(dtype)
        self.split_global = Constants(weight=weight[:first], bias=bias[:first])
        self.split_local = Constants(weight=weight[first:], bias=bias[first:])

        self.local_conv = self.local_affine = None
        if block.local_conv is not None:
            source = block.local_conv
            self.local_conv = _of_layers(dtype, conv=source.conv)
            affine = constant_affine(source.norm, f"{name}.local_conv.norm")
            self.local_affine = ChannelAffine(*(each.to(accurate) for each in affine))

        self.attention = None
        if block.attention is not None:
            source = block.attention
            self.num_heads, self.attention_eps = source.num_heads, source.norm.eps
            self.attention = _of_layers(dtype, norm=source.norm, qkv=source.qkv)

        self.co_attention = self.co_attention_affine = None
        if block.co_attention is not None:
            source = block.co_attention
            self.co_attention_eps = source.global_norm.eps
            self.co_attention = _of_layers(
                dtype,
                global_norm=source.global_norm,
                local_qkv=source.local_qkv,
                global_qkv=source.global_qkv,
                local_proj=source.local_proj,
                global_proj=source.global_proj,
            )
            affine = constant_affine(source.local_norm, f"{name}.co_attention.local_norm")
            self.co_attention_affine = ChannelAffine(*(each.to(accurate) for each in affine))

        weight, bias = block.fuse.weight.flatten(1), block.fuse.bias
        self.fuse = Constants(weight=weight.to(dtype), bias=bias.to(dtype))
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        weight, bias = fold_into_linear(
            block.mlp.norm, f"{name}.mlp.norm", fc1.weight, fc1.bias, dtype
        )
        self.mlp = Constants(
            fc1_weight=weight,
            fc1_bias=bias.to(accurate),
            fc2_weight=fc2.weight.to(dtype),
            fc2_bias=fc2.bias.to(dtype),
        )
        self.cache = packed.PackedCache()
        self._extents: tuple[int, ...] | None = None
        if self.co_attention is not None:
            extents = (
                self.dim,
                self.local_dim,
                self.global_dim,
                self.co_attention.local_proj_weight.shape[1],
                self.num_heads,
                self.mlp.fc1_weight.shape[0],
            )
            if kernels.BlockSizes(*extents, 1, 1).refusal() is None:
                self._extents = extents
        self.eval()

    global_grid = DSBlock.global_grid

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, with_streams=False)[0]

    def forward_streams(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output, and both streams as they enter the fusion, as DSBlock's.

        Raises:
            dsnet_kernels.BackendUnavailable: with the block's name, if an operation cannot run.
        """
        return self._run(x, with_streams=True)

    def _run(self, x: Tensor, with_streams: bool) -> tuple[Tensor, Tensor, Tensor]:
        if self._extents is not None and x.dim() == 4 and x.shape[1] == self.dim and x.numel():
            parameters = self._in_order()
            if packed.refusal(x, parameters, self.backend) is None:
                return kernels.ds_block(
                    x,
                    parameters,
                    kernels.BlockSizes(*self._extents, *self.global_grid(*x.shape[2:])),
                    self.cache,
                    attention_eps=self.attention_eps,
                    co_attention_eps=self.co_attention_eps,
                    with_streams=with_streams,
                )
        try:
            return self._streams(x)
        except kernels.BackendUnavailable as error:
            raise kernels.BackendUnavailable(f"{self.name}: {error}") from None

    def _in_order(self) -> list[Tensor]:
        """The constants as :func:`dsnet_kernels.ds_block` takes them."""
        groups = self._modules
        return [each for name in ORDER for each in groups[name]._parameters.values()]

    def _streams(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        backend = self.backend
        x = kernels.depthwise_conv3x3(x, *self.position.tensors(), residual=True, backend=backend)

        local = F.conv2d(x, *self.split_local.tensors()) if self.local_dim else x[:, :0]
        if self.local_conv is not None:
            scale, shift = self.local_affine.tensors()
            local = kernels.depthwise_conv3x3(
                local,
                *self.local_conv.tensors(),
                scale=scale,
                shift=shift,
                residual=True,
                backend=backend,
            )

        grid = self.global_grid(*x.shape[2:])
        coarse = x
        if self.global_reduction != 1:
            coarse = F.interpolate(x, size=grid, mode="bilinear", align_corners=False)
        global_ = (
            F.conv2d(coarse, *self.split_global.tensors()) if self.global_dim else coarse[:, :0]
        )

        if self.attention is not None:
            tokens = kernels.global_attention(
                global_.flatten(2).transpose(1, 2),
                self.num_heads,
                *self.attention.tensors(),
                eps=self.attention_eps,
                backend=backend,
            )
            if self.co_attention is not None:
                scale, shift = self.co_attention_affine.tensors()
                local, tokens = kernels.co_attention(
                    local,
                    tokens,
                    self.num_heads,
                    *self.co_attention.tensors(),
                    local_scale=scale,
                    local_shift=shift,
                    eps=self.co_attention_eps,
                    backend=backend,
                )
            global_ = tokens.transpose(1, 2).unflatten(2, grid)

        x = kernels.upsample_concat(local, global_, *self.fuse.tensors(), x, backend=backend)
        return kernels.pointwise_mlp(x, *self.mlp.tensors(), backend=backend), local, global_

    def train(self, mode: bool = True) -> "OptimizedBlock":
        if mode:
            raise RuntimeError(INFERENCE_ONLY)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{self.dim}, local={self.local_dim}, global={self.global_dim}"


def _of_layers(dtype: torch.dtype, **layers: nn.Module) -> Constants:
    """Weight and bias of each layer."""
    parameters = {}
    for name, layer in layers.items():
        parameters[f"{name}_weight"] = layer.weight.to(dtype)
        parameters[f"{name}_bias"] = layer.bias.to(dtype)
    return Constants(**parameters)

"""A patch embedding for inference."""

from collections.abc import Sequence

from torch import Tensor, nn

import dsnet_kernels as kernels
from dsnet_kernels import packed


class PatchEmbedding(nn.Conv2d):
    """A convolution whose kernel is its stride, with a packed weight where that serves.

    Args:
        source: whose parameters it shares.
        backend: as an operation's; None follows :class:`dsnet_kernels.backend`.
    """

    def __init__(self, source: nn.Conv2d, backend: str | Sequence[str] | None) -> None:
        super().__init__(
            source.in_channels,
            source.out_channels,
            source.kernel_size,
            source.stride,
            device="meta",
        )
        self.weight, self.bias = source.weight, source.bias
        self.backend = backend
        self.cache = packed.PackedCache()
        self.requires_grad_(False).eval()

    @staticmethod
    def stands_for(module: nn.Module) -> bool:
        """Whether ``module`` is a convolution of patches as DSNet makes them."""
        return (
            type(module) is nn.Conv2d
            and module.kernel_size == module.stride
            and module.kernel_size[0] == module.kernel_size[1]
            and module.padding == (0, 0)
            and module.dilation == (1, 1)
            and module.groups == 1
            and module.bias is not None
        )

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size[0]
        fits = x.dim() == 4 and x.numel() and x.shape[1] == self.in_channels
        fits = fits and min(x.shape[2:]) >= side and x.dtype == self.weight.dtype
        if not fits or packed.refusal(x, (self.weight, self.bias), self.backend) is not None:
            return super().forward(x)
        return kernels.patch_conv(x, self.weight, self.bias, self.cache)

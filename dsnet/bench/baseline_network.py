"""The network as one writes it in PyTorch: every BatchNorm is torch's own module.

Our blocks hand the affine of a norm to their kernels. On the reference, forming and applying this
affine takes about nine kernels where ``nn.BatchNorm2d`` takes one in evaluation. As a baseline that
would flatter our kernels.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from dsnet import block
from dsnet.norm import batch_norm
from dsnet_kernels import reference
from dsnet_kernels.reference.co_attention import co_attend
from dsnet_kernels.reference.common import attend, conv1x1, scaled_residual


def with_torch_norms(model: nn.Module, sdpa: bool = False) -> nn.Module:
    """Makes every norm of ``model`` a call of its own module, in place, and returns the model.

    Args:
        model: a network of :func:`dsnet.create_model` on the reference, without dropout.
        sdpa: the co-attention on torch's scaled_dot_product_attention.
    """
    for module in model.modules():
        if type(module) in _PLAIN:
            module.__class__ = _PLAIN[type(module)]
        if isinstance(module, _CoAttention):
            module.attention = _sdpa if sdpa else _attend
    return model


class _DepthwiseConv(block.DepthwiseConv):
    def forward(self, x: Tensor) -> Tensor:
        z = x if self.norm is None else batch_norm(self.norm, x)
        return x + reference.depthwise_conv3x3(z, self.conv.weight, self.conv.bias)


class _CoAttention(block.CoAttention):
    def forward(self, local: Tensor, global_: Tensor) -> tuple[Tensor, Tensor]:
        return co_attend(
            self.attention,
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
            None,
            None,
            self.global_norm.eps,
            batch_norm(self.local_norm, local),
        )


class _PointwiseMlp(block.PointwiseMlp):
    def forward(self, x: Tensor, branch_scale: Tensor | None) -> Tensor:
        hidden = F.gelu(conv1x1(batch_norm(self.norm, x), self.fc1.weight, self.fc1.bias))
        return scaled_residual(conv1x1(hidden, self.fc2.weight, self.fc2.bias), x, branch_scale)


_PLAIN: Mapping[type[nn.Module], type[nn.Module]] = {
    block.DepthwiseConv: _DepthwiseConv,
    block.CoAttention: _CoAttention,
    block.PointwiseMlp: _PointwiseMlp,
}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, first_head: int) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _attend(q: Tensor, k: Tensor, v: Tensor, first_head: int) -> Tensor:
    return attend(q, k, v, dropout_p=0.0)

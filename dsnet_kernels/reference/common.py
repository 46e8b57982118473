"""What several references share."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import dropout


def affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale·x + shift per channel of (B, C, H, W), rounded once to x's dtype."""
    if scale is None and shift is None:
        return x
    if shift is None:
        z = x * scale.view(-1, 1, 1)
    elif scale is None:
        z = x + shift.view(-1, 1, 1)
    else:
        z = torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1))
    return z.to(x.dtype)


def scaled_residual(branch: Tensor, residual: Tensor | None, branch_scale: Tensor | None) -> Tensor:
    """residual + branch_scale·branch, branch_scale one number per image."""
    if branch_scale is not None:
        branch = branch * branch_scale.to(branch.dtype).view(-1, 1, 1, 1)
    return branch if residual is None else residual + branch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution of (B, C, H, W) in x's dtype; weight (out, in)."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight.to(x.dtype)[:, :, None, None], bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in x's dtype."""
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def split_heads(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """(B, T, parts·h·d) → ``parts`` tensors (B, h, T, d)."""
    batch, tokens, width = x.shape
    head_dim = width // (parts * num_heads)
    return x.view(batch, tokens, parts, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    seed: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """Per head dropout(softmax(q·kᵀ/√d))·v, heads concatenated: (B, h, T, d) → (B, T, h·d).

    With a seed the dropout is that of the kernels, its heads counted from ``first_head``, else
    torch's.
    """
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    # Under autocast the softmax comes back in float32.
    weights = weights.to(v.dtype)
    if dropout_p > 0 and seed is None:
        weights = F.dropout(weights, dropout_p)
    elif dropout_p > 0:
        keep = dropout.keep_mask(weights.shape, dropout_p, seed, first_head)
        weights = torch.where(keep, weights / (1.0 - dropout_p), 0.0)
    return (weights @ v).transpose(1, 2).flatten(2)

"""BatchNorm as the affine that the kernels apply, in evaluation and in training."""

import torch
from torch import Tensor, distributed, nn


def batch_norm_affine(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) with norm(x) = scale·x + shift per channel.

    scale = weight / √(var + eps), shift = bias − mean·scale, with the running statistics in
    evaluation and the batch's own, differentiably, in training, where the running ones are then
    updated as the module itself would (``SyncBatchNorm`` over its process group included). A frozen
    BatchNorm, such as torchvision's and timm's, has its running statistics in training as well.

    Args:
        norm: ``BatchNorm2d``, ``SyncBatchNorm``, or a frozen one: a module with ``running_mean``,
            ``running_var``, ``weight``, ``bias`` and ``eps`` but no ``momentum``.
        x: (B, C, H, W).

    Returns:
        Two (C,) tensors in float32 (float64 for float64).

    Raises:
        TypeError: for another module.
        ValueError: in training, if a channel has a single value.
    """
    frozen = not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    if frozen and not _is_frozen_batch_norm(norm):
        raise TypeError(
            "norm: expected BatchNorm2d or SyncBatchNorm, or a frozen one without activation,"
            f" got {type(norm).__name__}"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not frozen and (norm.training or norm.running_mean is None):
        mean, var = _batch_statistics(norm, x.to(dtype))
    else:
        mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    scale = torch.rsqrt(var + norm.eps)
    if frozen or norm.affine:
        scale = scale * norm.weight.to(dtype)
        return scale, norm.bias.to(dtype) - mean * scale
    return scale, -mean * scale


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), and that of a SyncBatchNorm on the CPU too, where torch's own refuses to run."""
    if not isinstance(norm, nn.SyncBatchNorm) or x.device.type != "cpu":
        return norm(x)
    scale, shift = batch_norm_affine(norm, x)
    return torch.addcmul(shift.view(-1, 1, 1), x, scale.view(-1, 1, 1)).to(x.dtype)


def _is_frozen_batch_norm(norm: nn.Module) -> bool:
    if hasattr(norm, "momentum") or not hasattr(norm, "eps"):
        return False
    if not isinstance(getattr(norm, "act", None), (type(None), nn.Identity)):
        return False
    names = ("running_mean", "running_var", "weight", "bias")
    return all(isinstance(getattr(norm, name, None), Tensor) for name in names)


def _batch_statistics(norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the batch, all processes' for SyncBatchNorm."""
    count = x.shape[0] * x.shape[2] * x.shape[3]
    if isinstance(norm, nn.SyncBatchNorm) and norm.training and _world_size(norm) > 1:
        count, mean, var = _synchronise(x, count, norm.process_group)
    elif norm.training and count <= 1:
        raise ValueError(
            f"x: expected more than one value per channel when training, got shape {tuple(x.shape)}"
        )
    else:
        mean, var = _moments(x)
    if norm.training and norm.track_running_stats:
        _update_running(norm, mean.detach(), var.detach(), count)
    return mean, var


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, in float32 on the CPU as torch's BatchNorm does it."""
    # There var_mean is slow on channels_last; a compiler makes its own of it.
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _BatchNormMoments.apply(x)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var


class _BatchNormMoments(torch.autograd.Function):
    """The statistics of torch's BatchNorm, which are not differentiable by themselves.

    With n values per channel, grad_x = grad_mean / n + 2·grad_var·(x − mean) / n.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = x.shape[0] * x.shape[2] * x.shape[3]
        factor = grad_var * (2 / count)
        offset = grad_mean / count - factor * mean
        return torch.addcmul(offset.view(-1, 1, 1), x, factor.view(-1, 1, 1))


def _world_size(norm: nn.SyncBatchNorm) -> int:
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size(norm.process_group or distributed.group.WORLD)


def _synchronise(x: Tensor, count: int, group) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance over all processes, any of which may hold no image."""
    group = group or distributed.group.WORLD
    dims = (0, 2, 3)
    sums = _SumOverProcesses.apply(torch.cat([x.sum(dims), x.new_full((1,), count)]), group)
    total, mean = sums[-1], sums[:-1] / sums[-1]
    spread = _SumOverProcesses.apply((x - mean.view(-1, 1, 1)).square().sum(dims), group)
    return total, mean, spread / total


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' x; each x has part in all their losses, whose gradients add up."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        total = x.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _SumOverProcesses.apply(grad, ctx.group), None


def _update_running(norm, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:
        momentum = 1.0 / norm.num_batches_tracked.to(mean.dtype)
    else:
        momentum = norm.momentum
    unbiased = var * (count / (count - 1))
    with torch.no_grad():
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.copy_(running + momentum * (new.to(running.dtype) - running))

"""Arithmetic of a network, counted from the operations that it runs and those that it saves."""

import torch
from torch.utils.flop_counter import FlopCounterMode

import dsnet_kernels as kernels

from .block import DSBlock
from .model import DSNet


def count_macs(model: DSNet, size: int = 224) -> int:
    """Multiply-accumulates of one forward pass on one image of size × size.

    Convolutions, linear layers and both products of each attention count, as the paper's equations
    have them (no algebra that saves some); normalisations, interpolations, activations and
    softmaxes, which some counters add at a few operations per element, do not. The pass runs on the
    meta device: nothing is computed, and ``model`` may live anywhere.

    Raises:
        ValueError: for a size that the model does not take.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    dtype = next(model.parameters()).dtype
    image = torch.empty(1, model.in_chans, size, size, device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    saved = []

    def add_saved(block: DSBlock, inputs: tuple[torch.Tensor]) -> None:
        # The equations split at full resolution, the block runs the global half on its coarse grid.
        rows, columns = inputs[0].shape[2:]
        coarse_rows, coarse_columns = block.global_grid(rows, columns)
        pixels = rows * columns - coarse_rows * coarse_columns
        saved.append(pixels * block.dim * block.global_dim)

    hooks = [
        block.position.register_forward_pre_hook(
            lambda _, inputs, block=block: add_saved(block, inputs)
        )
        for block in model.modules()
        if isinstance(block, DSBlock)
    ]
    try:
        with torch.no_grad(), kernels.backend("reference"), counter:
            torch.func.functional_call(model, shapes, (image,))
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2 + sum(saved)

"""A network small enough for quick tests, and images for it."""

import importlib
from contextlib import ExitStack
from unittest import mock

import torch
from torch import nn

from dsnet.model import DSNet
from dsnet.variants import Variant
from dsnet_kernels import backends

SMALL = Variant(depths=(1, 1, 2, 1), embed_dims=(32, 64, 96, 128), num_heads=(1, 2, 3, 4))
"""Its heads have 16 channels, so that both attentions run on the kernels."""


def small(cls=DSNet, dtype=torch.float64, variant=SMALL, **kwargs):
    """A quick network with statistics away from their initial values."""
    torch.manual_seed(0)
    defaults = {"num_classes": 7} if cls is DSNet else {}
    model = cls(variant, **(defaults | kwargs)).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def randomise(module, seed=0):
    """Every parameter and statistic away from its initial value, so that none can be left out."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            noise = 1 + 0.5 * noise.abs()
        elif tensor.dim() == 1:
            noise = (1.0 if name.endswith("weight") else 0.0) + 0.3 * noise
        else:
            noise = noise / tensor[0].numel() ** 0.5
        tensor.copy_(noise)
    return module


def backends_chosen(model, x):
    """The backend of each operation that ``model(x)`` runs, one after the other."""
    chosen = []

    def record(*args, **kwargs):
        chosen.append(backends.select(*args, **kwargs))
        return chosen[-1]

    with ExitStack() as stack:
        for name in backends.OPERATIONS:
            module = importlib.import_module(f"dsnet_kernels.{name}")
            stack.enter_context(mock.patch.object(module, "select", record))
        model(x)
    return chosen


def images(height=64, width=64, batch=2, channels=3, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=dtype)

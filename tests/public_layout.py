"""Known weights in the public checkpoint layout, and files of them.

Each tensor follows from its name and shape alone, so that the logits of a network which holds them
could be computed once by the public implementation: ``data/parity_tiny_224.npz``.
"""

import pickle
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dsnet.variants import VARIANTS, Variant

DATA = Path(__file__).parent / "data"
LINEAR = ("channel_up", "cross_channel_up_sa", "fuse_channel_conv", "fuse_channel_sa", "head")


def public_shapes(variant: Variant, num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """Name to shape of a PyTorch checkpoint; α = 0.5, MLP ratio 4."""
    shapes = {}

    def add(module: str, *weight: int) -> None:
        shapes[f"{module}.weight"] = weight
        shapes[f"{module}.bias"] = weight[:1]

    def add_batch_norm(module: str, dim: int) -> None:
        add(module, dim)
        shapes[f"{module}.running_mean"] = shapes[f"{module}.running_var"] = (dim,)
        shapes[f"{module}.num_batches_tracked"] = ()

    below = 3
    for stage, dim in enumerate(variant.embed_dims, start=1):
        kernel = 4 if stage == 1 else 2
        add(f"patch_embed{stage}.proj", dim, below, kernel, kernel)
        half, below = dim // 2, dim
        for i in range(variant.depths[stage - 1]):
            block = f"blocks{stage}.{i}"
            add(f"{block}.pos_embed", dim, 1, 3, 3)
            add_batch_norm(f"{block}.norm1", dim)
            add(f"{block}.conv1", dim, dim, 1, 1)
            add(f"{block}.conv2", dim, dim, 1, 1)
            add_batch_norm(f"{block}.norm_conv1", half)
            add(f"{block}.norm_sa1", half)
            add(f"{block}.conv", half, 1, 3, 3)
            add(f"{block}.channel_up", 3 * half, half)
            add(f"{block}.cross_channel_up_conv", 3 * half, half, 1, 1)
            add(f"{block}.cross_channel_up_sa", 3 * half, half)
            add(f"{block}.fuse_channel_conv", half, half)
            add(f"{block}.fuse_channel_sa", half, half)
            add_batch_norm(f"{block}.norm_conv2", half)
            add(f"{block}.norm_sa2", half)
            add_batch_norm(f"{block}.norm2", dim)
            add(f"{block}.mlp.fc1", 4 * dim, dim, 1, 1)
            add(f"{block}.mlp.fc2", dim, 4 * dim, 1, 1)
    add_batch_norm("norm", below)
    add("head", num_classes, below)
    return shapes


@cache
def public_weights(
    variant: Variant = VARIANTS["dsnet_tiny"], num_classes: int = 1000
) -> dict[str, np.ndarray]:
    """The known weights by public name: float32, and int64 for ``num_batches_tracked``."""
    shapes = public_shapes(variant, num_classes)
    return {name: _known_tensor(name, shape) for name, shape in shapes.items()}


def public_state_dict(
    variant: Variant = VARIANTS["dsnet_tiny"], num_classes: int = 1000
) -> dict[str, torch.Tensor]:
    """The known weights as a PyTorch checkpoint's state dict."""
    weights = public_weights(variant, num_classes)
    return {name: torch.from_numpy(array.copy()) for name, array in weights.items()}


def write_pdparams(path: Path, weights: dict[str, np.ndarray], protocol: int = 4) -> Path:
    """Writes the layout of Paddle: its names for the statistics, linear weights (in, out)."""
    arrays: dict[str, object] = {}
    for name, array in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith(".weight") and name.split(".")[-2] in LINEAR:
            array = np.ascontiguousarray(array.T)
        name = name.replace("running_mean", "_mean").replace("running_var", "_variance")
        arrays[name] = array
    arrays["StructuredToParameterName@@"] = {name: f"param_{i}" for i, name in enumerate(arrays)}
    path.write_bytes(pickle.dumps(arrays, protocol=protocol))
    return path


def parity_images() -> torch.Tensor:
    """The input of the known logits: (2, 3, 224, 224) in float32."""
    return torch.from_numpy(_normal(np.random.RandomState(7), (2, 3, 224, 224)))


def parity_logits() -> torch.Tensor:
    """(2, 1000) in float64, for the tiny network with global reduction 8, 4, 2, 2."""
    with np.load(DATA / "parity_tiny_224.npz") as file:
        return torch.from_numpy(file["logits"])


def _known_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    n = _normal(np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF), shape)
    if name.endswith("running_var"):
        return (np.float32(1) + np.float32(0.2) * np.abs(n)).astype(np.float32)
    if len(shape) == 1:
        scaled = np.float32(0.1) * n
        is_scale = name.endswith("weight")
        return (np.float32(1) + scaled if is_scale else scaled).astype(np.float32)
    gain = np.float32(2.0 if "channel_up" in name else 0.35)
    return (gain * n / np.sqrt(np.float64(np.prod(shape[1:])))).astype(np.float32)


def _normal(rng: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)

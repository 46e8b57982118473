"""Writing our safetensors."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor

from ..model import DSNet
from ..optimized import Optimized
from ..variants import VARIANTS
from .errors import listing
from .file import FORMAT_VERSION, Checkpoint, read_checkpoint


def save_checkpoint(model: DSNet, path: str | PathLike, *, overwrite: bool = False) -> None:
    """Writes the weights as safetensors that :func:`dsnet.load_checkpoint` reads back.

    Shapes tell the architecture; metadata add the variant, the heads and ``global_reduction``.
    The file appears complete or not at all.

    Raises:
        FileExistsError: if the file exists, unless ``overwrite``.
        TypeError: for a model that is no DSNet.
        ValueError: for a model with a number that is not finite.
    """
    if isinstance(model, Optimized):
        raise TypeError(
            "model: expected a DSNet, got one optimised for inference, whose norms are folded;"
            " save the model that it was made from"
        )
    if not isinstance(model, DSNet):
        raise TypeError(f"model: expected a DSNet, got {type(model).__name__}")
    state = model.state_dict()
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"model: expected finite numbers, got others in {listing(broken)}")
    variant = next((name for name, known in VARIANTS.items() if known == model.variant), None)
    metadata = _metadata(variant, model.global_reduction, model.variant.num_heads)
    _write(Path(path), state, metadata, overwrite)


def convert_checkpoint(
    source: str | PathLike,
    target: str | PathLike,
    *,
    model_ema: bool = False,
    overwrite: bool = False,
) -> tuple[Checkpoint, dict[str, str]]:
    """Writes the checkpoint ``source`` as our safetensors, in its own dtypes.

    Returns:
        What was read, and the metadata written, with the SHA-256 of ``source``.

    Raises:
        CheckpointError: if ``source`` cannot be read or is no complete published network.
        FileExistsError: if ``target`` exists, unless ``overwrite``.
    """
    target = Path(target)
    _expect_free(target, overwrite)
    file = read_checkpoint(source, model_ema=model_ema)
    file.expect_complete()
    heads = VARIANTS[file.variant].num_heads
    metadata = _metadata(file.variant, file.global_reduction, heads)
    metadata["source_sha256"] = _sha256(Path(source))
    _write(target, file.tensors, metadata, overwrite)
    return file, metadata


def _metadata(
    variant: str | None, global_reduction: tuple[int, ...] | None, num_heads: tuple[int, ...]
) -> dict[str, str]:
    metadata = {"format": "pt", "format_version": FORMAT_VERSION}
    if variant is not None:
        metadata["variant"] = variant
    if global_reduction is not None:
        metadata["global_reduction"] = json.dumps(global_reduction)
    return metadata | {"num_heads": json.dumps(num_heads)}


def _expect_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already, and replacing it was not asked for")


def _write(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], overwrite: bool
) -> None:
    from safetensors.torch import save

    _expect_free(path, overwrite)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected an existing folder to write to")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, got a folder")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(plain, metadata)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

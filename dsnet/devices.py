"""The device that a command runs on."""

import torch


def resolve(name: str) -> str:
    """Returns a device's name: ``auto`` becomes ``cuda`` where torch sees a GPU, else ``cpu``.

    Raises:
        ValueError: for a device that torch cannot use.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: expected a GPU for {name!r}, got none: {_no_gpu()}")
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:  # AssertionError: a torch without that device
        raise ValueError(f"--device: cannot use {name!r}: {error}") from error
    return name


def _no_gpu() -> str:
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} sees no GPU"

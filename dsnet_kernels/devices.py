"""Which backends the devices of this machine can run, whatever the tensor."""

import torch

from . import native, triton


def refusal(backend: str, device: str | None = None) -> str | None:
    """Why no device here runs ``backend``, or None; that it is built is another question.

    Args:
        backend: any of :data:`dsnet_kernels.backends.BACKENDS`.
        device: a type of device, such as ``"cuda"``; None asks for any that this machine has.
    """
    if device is not None and not is_present(device):
        return f"no {device} device here"
    if backend == "cpu":
        return _wrong("cpu", device)
    if backend == "triton" and "cpu" in triton.devices and device in (None, "cpu"):
        # Without a GPU: the interpreter, or a driver that launches nothing.
        return triton.import_refusal()
    if backend in ("cuda", "triton"):
        return _wrong("cuda", device) or _gpu_refusal(backend)
    return None


def is_present(device: str) -> bool:
    """Whether this machine has a device of that type.

    Raises:
        ValueError: for no type of device.
    """
    try:
        torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected a type of device, got {device!r}") from None
    if device in ("cpu", "meta"):
        return True
    module = getattr(torch, device, None) or getattr(torch.backends, device, None)
    return hasattr(module, "is_available") and module.is_available()


def gpus() -> range:
    """The indices of the GPUs that torch sees."""
    return range(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _wrong(runs_on: str, device: str | None) -> str | None:
    return None if device in (None, runs_on) else f"it does not run on {device}"


def _gpu_refusal(backend: str) -> str | None:
    """None if one GPU runs the backend; else the reason of each."""
    if not gpus():
        return f"{'built' if backend == 'cuda' else 'installed'}; no NVIDIA GPU here"
    if backend == "triton" and triton.import_refusal() is not None:
        return triton.import_refusal()
    check = native.cuda_gpu_refusal if backend == "cuda" else native.gpu_refusal
    reasons = [check(index) for index in gpus()]
    return None if None in reasons else "; ".join(dict.fromkeys(reasons))

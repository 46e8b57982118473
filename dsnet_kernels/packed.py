"""Parameters packed once for many calls on the CPU: when that serves, and the cache."""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from . import backends, native

DTYPES = (torch.float32, torch.bfloat16)


def refusal(
    x: Tensor, parameters: Sequence[Tensor], backend: str | Sequence[str] | None
) -> str | None:
    """Why the operators with packed parameters do not serve a call, or None."""
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        return f"x is {x.dtype} on {x.device}; expected float32 or bfloat16 on the CPU"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return "a traced call keeps no packed parameters"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transformed call has tensors of its own, which none may keep"
    if backends.leading(backend, "cpu") != "cpu":
        return "cpu is not the first backend asked for"
    if native.cpu_refusal() is not None:
        return native.cpu_refusal()
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses dtypes operation by operation"
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *parameters)):
        return "the operators have no gradients"
    if any(each.is_inference() for each in parameters):
        return "parameters made in inference mode do not show when they change"
    expected = (x.dtype, torch.float32)
    if any(each.dtype not in expected or each.is_cuda for each in parameters):
        return "parameters are not on the CPU, in x's dtype or float32"
    return None


class PackedCache:
    """Packed copies of parameters, made again when one of those changes.

    Copies and pickles of the cache are empty.
    """

    def __init__(self) -> None:
        self._packed: dict[Hashable, tuple[tuple, Tensor]] = {}

    def get(
        self, parameters: Sequence[Tensor], layout: Hashable, pack: Callable[[], Tensor]
    ) -> Tensor:
        """What ``pack`` returned last for this ``layout``, instruction set, and these values."""
        introspection, _ = native.introspection()
        layout = (introspection.cpu_capability(), layout)
        # Another tensor, or a version counter that has moved.
        stamp = tuple((each.data_ptr(), each._version) for each in parameters)
        found = self._packed.get(layout)
        if found is None or found[0] != stamp:
            found = (stamp, pack())
            self._packed[layout] = found
        return found[1]

    def clear(self) -> None:
        self._packed.clear()

    def __reduce__(self) -> tuple:
        return PackedCache, ()

"""One call of an emulated launcher: tensors into the emulator's memory, and results out of it."""

from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def with_adjacent_channels(x: Tensor) -> Tensor:
    """(B, C, H, W), or a channels_last copy where its channels do not lie next to each other."""
    if x.stride(1) == 1 or x.shape[1] == 1:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def change(launch: Any, **fields: int) -> Any:
    """The launch configuration with other values in some of its fields."""
    for name, value in fields.items():
        setattr(launch, name, value)
    return launch


class Call:
    """The emulator's memory of one call, bounds-checked; it lives as long as the call.

    Args:
        emulator: a module of :func:`emulator_build.load` that binds ``Storage`` and, for the
            methods of these names, ``Pixels`` and ``Parameter``.
        dtype: of the activations.
        seed: of the order of threads.
        fields: of the launch configuration that are to be replaced, with their values.
    """

    def __init__(
        self,
        emulator: ModuleType,
        dtype: torch.dtype,
        seed: int = 0,
        fields: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.emulator, self.dtype, self.seed, self.fields = emulator, dtype, seed, fields
        self.storage = getattr(emulator.Storage, str(dtype).removeprefix("torch."))
        self._buffers: dict[str, Any] = {}

    def launch(self, *args: Any) -> Any:
        """The launch configuration that the emulator's ``launch`` chooses, with ``fields``."""
        return change(self.emulator.launch(*args), **self.fields)

    def run(self, launcher: Callable[..., None], args: Any, launch: Any) -> None:
        """Runs the kernels of one launcher."""
        self.emulator.set_seed(self.seed)
        launcher(args, self.storage, launch)

    def place(self, name: str, tensor: Tensor) -> int:
        """Address of a tensor; of its whole storage only the tensor's elements are readable."""
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        present = torch.zeros(storage.shape, dtype=torch.bool)
        present.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        flags = np.repeat(present.numpy(), tensor.element_size())
        data = storage.view(torch.uint8).numpy()
        self._buffers[name] = self.emulator.Buffer(name, data, present=flags)
        return self._buffers[name].address + tensor.storage_offset() * tensor.element_size()

    def pixels(self, name: str, tensor: Tensor) -> Any:
        """(B, C, H, W), copied first where the bindings copy."""
        tensor = with_adjacent_channels(tensor.detach())
        address = self.place(name, tensor)
        return self.emulator.Pixels(address, *(tensor.stride(d) for d in (0, 2, 3)))

    def channels_last(self, name: str, tensor: Tensor) -> int:
        """Address of (B, H, W, C) contiguous, copied first where the bindings copy."""
        return self.place(name, tensor.detach().permute(0, 2, 3, 1).contiguous())

    def matrix(self, name: str, tensor: Tensor) -> int:
        """Address of a contiguous matrix in the dtype of the activations."""
        return self.place(name, tensor.detach().to(self.dtype).contiguous())

    def parameter(self, name: str, tensor: Tensor | None) -> Any:
        """Contiguous values, or the mark of their absence."""
        if tensor is None:
            return self.emulator.Parameter(0, True)
        address = self.place(name, tensor.detach().contiguous())
        return self.emulator.Parameter(address, tensor.dtype == torch.float32)

    def output(self, name: str, count: int, dtype: torch.dtype) -> int:
        """Address of ``count`` values that nobody has written."""
        self._buffers[name] = self.emulator.Buffer(name, count * dtype.itemsize)
        return self._buffers[name].address

    def result(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """What an output holds; every byte of it has been written."""
        assert self._buffers[name].written.all(), f"{name}: some values were never written"
        result = torch.empty(shape, dtype=dtype)
        result.view(-1).view(torch.uint8).copy_(torch.from_numpy(self._buffers[name].bytes))
        return result

    def result_channels_last(self, name: str, like: Tensor) -> Tensor:
        """An output in the shape and dtype of (B, C, H, W), channels_last."""
        batch, channels, height, width = like.shape
        return self.result(name, like.dtype, (batch, height, width, channels)).permute(0, 3, 1, 2)

"""The memory of the GPU that the emulator stands in for, as torch uses it during one call."""

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Memory(TorchDispatchMode):
    """In the block all memory that torch allocates is the emulator's: guarded and watched.

    The emulator reports a kernel's access outside the bounds of a tensor, and a read of a value
    that neither a kernel nor torch has written. The block does the same for torch's own
    operations, which read the results of kernels.

    Args:
        emulator: a module of :func:`emulator_build.load` for an operation.
        owner: what allocates, for messages.
    """

    def __init__(self, emulator: ModuleType, owner: str) -> None:
        super().__init__()
        self.emulator, self.owner = emulator, owner
        self._allocations: list[Any] = []

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in read-only memory; of its storage only its own elements hold a value."""
        tensor = tensor.detach()
        if self._buffer(tensor) is not None:
            return tensor
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        present = torch.zeros(storage.shape, dtype=torch.bool)
        present.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        flags = np.repeat(present.numpy(), tensor.element_size())
        data = storage.view(torch.uint8).numpy()
        buffer = self.emulator.Buffer(name, data, present=flags)
        return _tensor(buffer, tensor.dtype).as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )

    def finish(self) -> None:
        """Results are not written any more: later calls only read them."""
        for buffer in self._allocations:
            buffer.writable = False
        self._allocations.clear()

    def unwritten(self, tensor: Tensor) -> int:
        """The number of bytes of a tensor that hold no value."""
        if tensor.numel() == 0:
            return 0
        buffer, offset, flags = self._span(tensor)
        return int((flags & ~buffer.written[offset : offset + flags.size]).sum())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is aten.empty.memory_format:
            return self._empty(*args, **kwargs)
        if function in (aten.mm.out, aten.mm.dtype_out):
            return self._multiply(*args[:2], kwargs["out"])
        result = function(*args, **kwargs)
        if function is aten.zero_.default:
            self._mark_written(result)
        elif self._buffer(result) is None:
            # The result is a copy, not a view.
            self._check_written(function, args[0])
            result = self.place(f"{function} in {self.owner}", result)
        return result

    def _empty(
        self,
        size: list[int],
        *,
        dtype: torch.dtype,
        memory_format: torch.memory_format | None = None,
        **_: Any,
    ) -> Tensor:
        like = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format)
        name = f"allocation {len(self._allocations)} of {self.owner}, {dtype} {tuple(size)}"
        buffer = self.emulator.Buffer(name, like.numel() * dtype.itemsize)
        self._allocations.append(buffer)
        return _tensor(buffer, dtype).as_strided(size, like.stride())

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """The product on a GPU: torch has none with a wider result on the CPU. Rounded once."""
        for operand in (a, b):
            self._check_written("a product", operand)
        out.copy_(a.double() @ b.double())
        self._mark_written(out)
        return out

    def _buffer(self, tensor: Tensor) -> Any:
        """The emulator's memory that a tensor lies in, or None."""
        return self.emulator.Buffer.find(tensor.untyped_storage().data_ptr())

    def _span(self, tensor: Tensor) -> tuple[Any, int, np.ndarray]:
        """A tensor's buffer, its first byte there, and flags of its bytes from there on."""
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        present = torch.zeros(1 + sum((n - 1) * s for n, s in strides), dtype=torch.bool)
        present.as_strided(tensor.shape, tensor.stride(), 0).fill_(True)
        buffer = self._buffer(tensor)
        flags = np.repeat(present.numpy(), tensor.element_size())
        return buffer, tensor.data_ptr() - buffer.address, flags

    def _mark_written(self, tensor: Tensor) -> None:
        if tensor.numel() > 0:
            buffer, offset, flags = self._span(tensor)
            buffer.mark_written(offset, flags)

    def _check_written(self, reader: Any, tensor: Tensor) -> None:
        if count := self.unwritten(tensor):
            name = self._buffer(tensor).name
            raise RuntimeError(f"{reader} reads {name}: nobody wrote {count} of its bytes")


def _tensor(buffer: Any, dtype: torch.dtype) -> Tensor:
    """The buffer's memory as a row of values; it lives as long as they do."""
    return torch.from_numpy(buffer.memory).view(dtype)

"""Triton's kernels without a GPU, run by its interpreter; ``TRITON_INTERPRET=1`` asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np


@contextmanager
def fused_multiply_add() -> Iterator[None]:
    """In the block an fma rounds once, as on a GPU; the interpreter's rounds its product too."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self, x, y, z):
        assert x.data.dtype == np.float32
        wide = np.float64
        with np.errstate(over="ignore", invalid="ignore"):
            value = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
            return TensorHandle(value.astype(np.float32), z.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_fma", create_fma):
        yield

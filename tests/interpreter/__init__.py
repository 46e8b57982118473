"""Triton's kernels without a GPU, run by its interpreter; ``TRITON_INTERPRET=1`` asks for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np


@contextmanager
def stand_in() -> Iterator[None]:
    """In the block an fma rounds once, as on a GPU; the interpreter's rounds its product too.

    Functions that a kernel calls patch Triton's language once per module and not at every call,
    which took a third of the time: those of the package share the modules that a launch patches,
    and what is patched for Triton's own is never restored.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    patched = set()

    def create_fma(self, x, y, z):
        assert x.data.dtype == np.float32
        wide = np.float64
        with np.errstate(over="ignore", invalid="ignore"):
            value = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
            return TensorHandle(value.astype(np.float32), z.dtype.scalar)

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    with (
        mock.patch.object(InterpreterBuilder, "create_fma", create_fma),
        mock.patch.object(InterpretedFunction, "__call__", call),
    ):
        yield

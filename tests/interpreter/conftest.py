"""What Triton's interpreter needs to round as a GPU does."""

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def fused_multiply_add(monkeypatch):
    """Rounds an fma once, as a GPU does; the interpreter rounds its product as well."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self, x, y, z):
        assert x.data.dtype == np.float32
        wide = np.float64
        value = x.data.astype(wide) * y.data.astype(wide) + z.data.astype(wide)
        with np.errstate(over="ignore"):
            return TensorHandle(value.astype(np.float32), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)

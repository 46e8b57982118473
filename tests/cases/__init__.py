"""One module per operation with kernels, each exporting its ``CASE``."""

import importlib
import pkgutil
from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
from harness import OpCase
from variants import Variant, gpu_mark, gpu_variants, variants

CASES: tuple[OpCase, ...] = tuple(
    importlib.import_module(f"cases.{module.name}").CASE
    for module in pkgutil.iter_modules(__path__)
)

_PAIRS = [(case, variant) for case in CASES for variant in variants(case.name)]


def _mark(
    keep: Callable[[Variant], bool] = lambda variant: True, dtypes: bool = False
) -> pytest.MarkDecorator:
    """Parametrizes by ``case`` and ``variant``, and by each ``dtype`` of the variant."""
    parameters = []
    for case, variant in _PAIRS:
        if not keep(variant):
            continue
        for dtype in variant.dtypes if dtypes else (None,):
            values = (case, variant, dtype) if dtypes else (case, variant)
            parts = [str(part).removeprefix("torch.") for part in values]
            parameters.append(pytest.param(*values, id="-".join(parts), marks=gpu_mark(variant)))
    names = ("case", "variant", "dtype") if dtypes else ("case", "variant")
    return pytest.mark.parametrize(names, parameters)


_KERNEL, _COMPILED = attrgetter("is_kernel"), attrgetter("is_compiled")

on_every_variant = _mark()
in_every_dtype = _mark(dtypes=True)
on_every_kernel = _mark(_KERNEL)
on_every_kernel_and_dtype = _mark(_KERNEL, dtypes=True)
on_compiled_kernels = _mark(_COMPILED)
on_compiled_kernels_and_dtype = _mark(_COMPILED, dtypes=True)
on_cpu_kernels = _mark(lambda variant: variant.is_compiled and variant.device == "cpu")
in_float64 = _mark(lambda variant: variant.is_kernel and torch.float64 in variant.dtypes)
# The emulator copies the whole storage of a tensor.
on_kernels_in_place = _mark(lambda v: v.is_kernel and v.stand_in != "emulated")
on_gpu = pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{case}-{variant}", marks=gpu_mark(variant))
        for case in CASES
        for variant in gpu_variants(case.name)
    ],
)

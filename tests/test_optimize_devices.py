"""Folding for devices without float64, such as Apple's GPUs; fake tensors stand for theirs."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dsnet.optimize import _check_dtype
from dsnet.optimized.fold import constant_affine, fold_into_linear, rounded


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device, as torch's backend for Apple's GPUs does."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            is_tensor = isinstance(each, torch.Tensor)
            if is_tensor and each.device.type == "mps" and each.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_folds_without_float64_on_the_device(dtype, affine):
    with FakeTensorMode(), NoFloat64(), torch.no_grad():
        norm = nn.BatchNorm2d(8, affine=affine, device="mps").eval()
        matrix, vector = torch.empty(4, 8, device="mps"), torch.empty(4, device="mps")
        weight, bias = fold_into_linear(norm, "norm", matrix, vector, dtype)
        constants = [*constant_affine(norm, "norm"), bias]
        assert {(each.device.type, each.dtype) for each in constants} == {("cpu", torch.float64)}
        placed = [weight, *(rounded(each, dtype, weight) for each in constants)]
        assert {(each.device.type, each.dtype) for each in placed} == {("mps", dtype)}
        assert norm.running_mean.device.type == "mps"


@pytest.mark.parametrize(("devices", "accepted"), [({"mps"}, True), ({"cuda", "cpu"}, False)])
def test_float16_is_taken_off_the_cpu(devices, accepted):
    with contextlib.nullcontext() if accepted else pytest.raises(TypeError, match="dtype: exp"):
        _check_dtype(torch.float16, devices)

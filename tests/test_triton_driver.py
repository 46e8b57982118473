"""The Triton backend from the public call to the launch, on a driver that launches nothing."""

import pytest
import torch

import dsnet
import dsnet_kernels
from dsnet_kernels import triton as backend

pytest.importorskip("triton", reason="Triton is not installed")
if backend.INTERPRETED:
    pytest.skip("the interpreter has no driver", allow_module_level=True)

from benchmarks.compile_gates.triton_driver import compilations


def optimised(model: str):
    """One image through an optimised network in bfloat16."""
    network = dsnet.optimize(dsnet.create_model(model).eval().to(torch.bfloat16))
    image = torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16)

    def run():
        with torch.inference_mode():
            network(image)

    return run


def test_variants_of_an_optimised_network():
    assert 30 < compilations(optimised("dsnet_tiny")).total() <= 50


def test_the_driver_leaves_nothing_behind():
    compilations(lambda: None)
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 1, 3, 3)
    with pytest.raises(dsnet_kernels.BackendUnavailable, match="triton: x is on cpu, not on a GPU"):
        dsnet_kernels.depthwise_conv3x3(x, weight, backend="triton")

"""What ``dsnet profile`` counts: products, launches, bytes."""

import functools

import pytest
import torch

import dsnet_kernels
from dsnet.bench import cases
from dsnet.bench.profile import counts
from dsnet.bench.profile.steps import FORWARD, FUSED, OTHER, Step


@pytest.mark.parametrize("case", cases.CASES[:-1], ids=lambda case: f"{case.operation}-{case.use}")
def test_products_of_kernels_against_those_of_the_reference(case):
    (stage, *_) = cases.stages("dsnet_tiny", 2, (64, 64))
    tensors, constants = case.tensors(stage, torch.float32, 0), dict(case.constants(stage))
    counter = counts.Counts()
    with torch.no_grad(), counter:
        counter.start()
        case.function(functools.partial(getattr, dsnet_kernels))(
            **tensors, **constants, backend="reference"
        )
        counter.stop()
    dense = counter.counts[OTHER, FORWARD].macs
    arguments = {**tensors, **constants, "absorbed": False}
    if case.operation == "co_attention":
        arguments["local"] = tensors["local"].flatten(2).transpose(1, 2)
        absorbed = counts.PRODUCTS[case.operation](arguments | {"absorbed": True})
        chosen = counts.PRODUCTS[case.operation](arguments | {"absorbed": None})
        assert chosen == min(absorbed, dense)
    if case.operation == "upsample_concat":
        # The global half is mixed on its own grid.
        pixels = stage.grid[0] ** 2 - stage.global_grid[0] ** 2
        dense -= stage.batch * pixels * stage.global_channels * stage.channels
    assert counts.PRODUCTS[case.operation](arguments) == dense


def test_every_operation_has_its_products():
    assert set(counts.PRODUCTS) == set(dsnet_kernels.backends.OPERATIONS) == set(FUSED.values())


def test_launches_are_calls_that_write_and_bytes_what_they_touch():
    counter = counts.Counts()
    x = torch.randn(4, 8)
    with torch.no_grad(), counter:
        counter.start()
        y = x.t()[:2] + torch.ones(8, 1)[0].expand(4)
        torch.empty(100).view(10, 10)
        y.mul_(2.0)
        counter.stop()
    count = counter.counts[OTHER, FORWARD]
    # The ones, the sum, the product in place.
    assert count.launches == 3
    assert count.bytes == 4 * (8 + (8 + 1 + 8) + 8)
    assert count.macs == 0


class Event:
    """One of the profiler's."""

    def __init__(self, name, start, correlation=0, on_device=False):
        self.name, self.start_ns = (lambda: name), (lambda: start)
        self.correlation_id = lambda: correlation
        kind = "CUDA" if on_device else "CPU"
        self.device_type = lambda: getattr(torch.autograd.DeviceType, kind)


def test_kernels_of_a_gpu_belong_to_the_step_that_launched_them():
    watch = counts.Launches()
    first, second = Step("position", 1, 1), Step("split", 1, 1)
    watch.close(first, FORWARD)
    watch.close(second, FORWARD)
    found = watch.counts(
        [
            Event("cudaLaunchKernel", 10, 1),
            Event(f"{counts.MARKER}0", 20),
            Event("cudaLaunchKernel", 30, 2),
            Event("cuLaunchKernelEx", 31, 3),
            Event("cudaMemcpyAsync", 32, 4),
            Event(f"{counts.MARKER}1", 40),
            # Run later than launched, as they are.
            Event("one", 50, 1, on_device=True),
            Event("two", 60, 2, on_device=True),
            Event("three", 70, 3, on_device=True),
            Event("Memcpy HtoD", 80, 4, on_device=True),
        ]
    )
    assert found == {(first, FORWARD): 1, (second, FORWARD): 2}
    with pytest.raises(RuntimeError, match="expected kernels of the GPU, found none"):
        watch.counts([])

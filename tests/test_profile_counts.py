"""What ``dsnet profile`` counts: products, launches, bytes."""

import functools

import pytest
import torch
from small_network import randomise

import dsnet
import dsnet_kernels
from dsnet.bench import cases
from dsnet.bench.profile import counts, steps
from dsnet.bench.profile.products import PRODUCTS, Count
from dsnet.bench.profile.steps import FORWARD, FUSED, OTHER, Step
from dsnet.optimized import OptimizedBlock
from dsnet_kernels.co_attention import absorbs


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
        absorbed = PRODUCTS[case.operation](arguments | {"absorbed": True})
        chosen = PRODUCTS[case.operation](arguments | {"absorbed": None})
        assert chosen == min(absorbed, dense)
    if case.operation == "upsample_concat":
        # The global half is mixed on its own grid.
        pixels = stage.grid[0] ** 2 - stage.global_grid[0] ** 2
        dense -= stage.batch * pixels * stage.global_channels * stage.channels
    assert PRODUCTS[case.operation](arguments) == dense


def test_every_operation_has_its_products():
    operations = set(dsnet_kernels.backends.OPERATIONS)
    assert operations == set(FUSED.values())
    packed = {"patch_conv", "ds_block"}
    assert PRODUCTS.keys() == operations | packed | {f"{name}_pack" for name in packed}


BLOCKS = {
    "absorbed": ({"dim": 64, "num_heads": 1, "global_reduction": 8}, (16, 24)),
    "projected": ({"dim": 80, "num_heads": 5, "global_reduction": 2}, (8, 6)),
    "same grid": ({"dim": 32, "num_heads": 2, "global_reduction": 1}, (5, 5)),
    "unequal": (
        {
            "dim": 43,
            "num_heads": 2,
            "global_reduction": 3,
            "alpha": 16 / 43,
            "co_attention_dim": 48,
            "mlp_ratio": 2.3,
        },
        (12, 9),
    ),
}


def counted(function, x):
    """Counts of a block by operation, all of them in it."""
    counter = counts.Counts()
    with torch.no_grad():
        function(x)
        with counter, steps.followed(counter):
            counter.start()
            function(x)
            counter.stop()
    found = {step: count for (step, _), count in counter.counts.items() if step.block}
    assert all(step.block == 1 for step in found)
    return {step.operation: count for step, count in found.items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_steps_of_a_whole_block_count_as_the_operations_do(name):
    if "cpu" not in dsnet_kernels.available_backends("co_attention"):
        pytest.skip("the native libraries are not built")
    sizes, grid = BLOCKS[name]
    block = OptimizedBlock(randomise(dsnet.DSBlock(**sizes)).eval(), name)
    x = torch.randn(3, block.dim, *grid).contiguous(memory_format=torch.channels_last)
    inside, apart = counted(block, x), counted(block._streams, x)
    downsample = apart.pop("downsample", None)
    assert inside.pop("other") == Count(launches=1, ours=True)
    assert inside.keys() == apart.keys()
    for operation, count in inside.items():
        assert (count.launches, count.macs) == (0, apart[operation].macs), operation
        if operation != "split":
            assert count.bytes == apart[operation].bytes, operation
    assert all(apart[operation].launches == 1 for operation in FUSED)
    # The coarse grid's samples are neither written nor read again.
    coarse = block.global_grid(*grid)
    samples = 4 * 3 * block.dim * coarse[0] * coarse[1]
    separate = apart["split"].bytes
    if downsample is not None:
        separate += downsample.bytes - 2 * samples
    assert inside["split"].bytes == separate
    heads = sizes["num_heads"]
    absorbed = absorbs(grid[0] * grid[1], coarse[0] * coarse[1], block.local_dim, heads)
    assert absorbed is (name in ("absorbed", "unequal"))


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

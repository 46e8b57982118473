"""How kernels are started on a GPU, on a CUDA runtime that records its calls and runs nothing.

The sources are those of the CUDA library: ``csrc/cuda/launch.cuh``, ``csrc/bindings/cuda/launch.h``
and the bindings of ``depthwise_conv3x3``. Tensors on the CPU say that they are on device 1.
"""

import emulator_build
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsnet_kernels  # noqa: F401 - defines the operators

pytestmark = pytest.mark.skipif(
    emulator_build.cuda_headers() is None, reason="cuda_runtime.h: no CUDA toolkit has it here"
)
LARGE = 64 * 1024
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


class OnTheCpu(TorchDispatchMode):
    """In the block memory that is asked for on a GPU comes from the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs:
            assert kwargs["device"] == torch.device("cuda:1")
            kwargs = kwargs | {"device": "cpu"}
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def module():
    module = emulator_build.load("runtime")
    library = torch.library.Library("dsnet_recorded", "DEF")
    for name in ("depthwise_conv3x3", "depthwise_conv3x3_backward"):
        schema = str(getattr(torch.ops.dsnet_kernels, name).default._schema)
        library.define(schema.removeprefix("dsnet_kernels::"))
    yield module
    library._destroy()


@pytest.fixture
def runtime(module):
    yield module
    module.fail(False, False)
    module.fail_stream_query(False)
    module.make_current(0)
    for device in range(2):
        module.use_stream(device, 0)
    module.last_error()
    module.take_calls()


def calls_of(runtime, *launches):
    """What reaches the runtime for launches of (second kernel, dynamic shared bytes)."""
    for is_second, size in launches:
        runtime.launch(is_second, size, 0)
    return [(call["call"], call["bytes"]) for call in runtime.take_calls()]


def forward(x, weight):
    operator = torch.ops.dsnet_recorded.depthwise_conv3x3.default
    with OnTheCpu():
        return operator.redispatch(CUDA, x, weight, None, None, None, False)


def backward(grad, x, weight):
    operator = torch.ops.dsnet_recorded.depthwise_conv3x3_backward.default
    with OnTheCpu():
        return operator.redispatch(CUDA, grad, x, weight, None, None, False)


def inputs():
    return torch.zeros(2, 8, 5, 5).to(memory_format=torch.channels_last), torch.zeros(8, 1, 3, 3)


# The launch itself


def test_a_launch_hands_on_everything(runtime):
    runtime.make_current(1)
    runtime.launch(True, 1000, 4096)
    (call,) = runtime.take_calls()
    assert call == {
        "call": "launch",
        "device": 1,
        "kernel": runtime.kernel(True),
        "bytes": 1000,
        "stream": 4096,
        "blocks": (5, 1, 1),
        "threads": (64, 1, 1),
        "attributes": 0,
        "argument": 42,
        "pointer": 0,
    }


def test_shared_memory_above_48_kb_is_allowed_once_per_kernel_and_device(runtime):
    # Sizes that no other test uses: limits stay raised as long as the process lives.
    size = 80 * 1024
    assert calls_of(runtime, (False, 48 * 1024)) == [("launch", 48 * 1024)]
    assert calls_of(runtime, (False, size)) == [("attribute", size), ("launch", size)]
    assert calls_of(runtime, (False, size)) == [("launch", size)]
    # Less is allowed too, and does not lower the limit; more raises it.
    assert calls_of(runtime, (False, size - 1024)) == [("launch", size - 1024)]
    more = size + 1024
    assert calls_of(runtime, (False, more)) == [("attribute", more), ("launch", more)]
    assert calls_of(runtime, (True, size)) == [("attribute", size), ("launch", size)]
    runtime.make_current(1)
    assert calls_of(runtime, (False, more)) == [("attribute", more), ("launch", more)]


def test_the_attribute_is_that_of_the_kernel_and_of_dynamic_shared_memory(runtime):
    size = 90 * 1024
    runtime.launch(True, size, 0)
    attribute, launch = runtime.take_calls()
    assert attribute["kernel"] == launch["kernel"] == runtime.kernel(True)
    assert attribute["is_shared"]


def test_threads_raise_the_limit_once(runtime):
    size = 100 * 1024
    runtime.launch_in_threads(8, size)
    calls = [call["call"] for call in runtime.take_calls()]
    assert sorted(calls) == ["attribute"] + 8 * ["launch"]
    assert calls[0] == "attribute"


def test_a_refused_attribute_names_the_kernel_and_is_asked_for_again(runtime):
    size = 110 * 1024
    runtime.fail(True, False)
    with pytest.raises(RuntimeError, match=r"^kernel some_kernel: invalid argument$"):
        runtime.launch(False, size, 0)
    assert [call["call"] for call in runtime.take_calls()] == ["attribute"]
    runtime.fail(False, False)
    assert calls_of(runtime, (False, size)) == [("attribute", size), ("launch", size)]


@pytest.mark.parametrize("attribute", [True, False])
def test_an_error_is_not_left_for_the_next_kernel_of_torch(runtime, attribute):
    runtime.fail(attribute, True)
    with pytest.raises(RuntimeError, match=r"kernel some_kernel: (invalid|no kernel image)"):
        runtime.launch(False, 120 * 1024, 0)
    assert runtime.last_error() == 0


# Bindings


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("stream", [0, 1], ids=["first stream", "side stream"])
def test_kernels_run_on_the_device_of_the_tensors_and_its_current_stream(runtime, current, stream):
    x, weight = inputs()
    runtime.make_current(current)
    # The other device has another current stream.
    runtime.use_stream(0, 1 - stream)
    expected = runtime.use_stream(1, stream)
    forward(x, weight)
    backward(x, x, weight)
    launches = [call for call in runtime.take_calls() if call["call"] == "launch"]
    assert [call["argument"] for call in launches] == [7, 8]
    assert launches[0]["pointer"] == x.data_ptr()
    for call in launches:
        assert (call["device"], call["stream"]) == (1, expected)
    assert runtime.device() == current


def test_the_current_device_comes_back_after_an_error(runtime):
    runtime.fail(False, True)
    with pytest.raises(RuntimeError, match="kernel depthwise_forward: no kernel image is avail"):
        forward(*inputs())
    assert runtime.device() == 0


def test_a_failed_query_of_the_stream_is_an_error(runtime):
    runtime.fail_stream_query(True)
    with pytest.raises(RuntimeError, match="aoti_torch_get_current_cuda_stream"):
        forward(*inputs())
    assert runtime.take_calls() == []
    assert runtime.device() == 0


def test_tensors_on_two_devices_are_refused(runtime):
    x, weight = inputs()
    grad = torch.zeros_like(x)
    runtime.place(weight.data_ptr(), 0)
    with pytest.raises(RuntimeError, match="weight: expected x's device"):
        forward(x, weight)
    runtime.place(weight.data_ptr(), 1)
    runtime.place(grad.data_ptr(), 0)
    with pytest.raises(RuntimeError, match="grad: expected x's device"):
        backward(grad, x, weight)
    runtime.place(grad.data_ptr(), 1)
    assert runtime.take_calls() == []
    assert runtime.device() == 0

"""Every operation on a GPU: one shape, streams, graphs and devices."""

import pytest
import torch
from cases import on_gpu
from harness import assert_same_bits, compare, evaluate, inputs_on, placed, sample, tensors_of
from variants import GPU_DTYPES

DELAY = 50_000_000
"""Clock cycles, some 30 ms: whatever does not wait for the stream comes too early."""


def sample_on_gpu(case, seed=0, device="cuda"):
    inputs, grads = sample(case, case.small[1], seed=seed)
    return inputs_on(device, inputs), [placed(grad, device) for grad in grads]


@on_gpu
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_one_shape_is_within_budget(case, variant, dtype):
    """The least that has to work: the other tests try all shapes, layouts and options."""
    compare(case, variant, *(sample(case, case.small[0], dtype, seed) for seed in range(2)))


@on_gpu
def test_follows_the_current_stream(case, variant):
    """Inputs arrive on a side stream after a delay; only what is queued behind it sees them."""
    inputs, grads = sample_on_gpu(case)
    late = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(inputs).items()}
    with variant.active():
        expected = evaluate(case.function, inputs, grads)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(DELAY)
            for name, tensor in late.items():
                tensor.copy_(inputs[name])
            got = evaluate(case.function, inputs | late, grads)
        stream.synchronize()
    assert_same_bits(got, expected)


@on_gpu
def test_a_captured_graph_computes_anew(case, variant):
    inputs, grads = sample_on_gpu(case)
    new_inputs, new_grads = sample_on_gpu(case, seed=1)
    with variant.active():
        # Capture allows no compilation and no first use of a library.
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            evaluate(case.function, inputs, grads)
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = evaluate(case.function, inputs, grads)
        expected = evaluate(case.function, new_inputs, new_grads)
        for name, tensor in tensors_of(inputs).items():
            tensor.copy_(new_inputs[name])
        for grad, new in zip(grads, new_grads, strict=True):
            grad.copy_(new)
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits(captured, expected)


@on_gpu
def test_the_device_is_the_tensors_and_not_the_current_one(case, variant):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs, and torch sees one")
    inputs, grads = sample_on_gpu(case, device="cuda:1")
    with variant.active():
        with torch.cuda.device(1):
            expected = evaluate(case.function, inputs, grads)
        with torch.cuda.device(0):
            got = evaluate(case.function, inputs, grads)
            assert torch.cuda.current_device() == 0
    assert {value.get_device() for value in got.values()} == {1}
    assert_same_bits(got, expected)

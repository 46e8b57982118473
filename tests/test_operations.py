"""Numbers of every operation on every variant: budget, exactness, layouts, hostile inputs."""

import pytest
import torch
from cases import (
    CASES,
    in_every_dtype,
    on_compiled_kernels_and_dtype,
    on_cpu_kernels,
    on_every_kernel,
    on_every_kernel_and_dtype,
    on_every_variant,
    on_kernels_in_place,
)
from harness import (
    assert_same_bits,
    assert_within_budget,
    compare,
    evaluate,
    exact_results,
    generator,
    inputs_on,
    mapped,
    outputs_of,
    run,
    sample,
    tensors_of,
)
from layouts import LAYOUTS, STAND_IN_LAYOUTS, apart
from variants import gpu_mark, variants

from dsnet_kernels import BackendUnavailable, triton
from dsnet_kernels.backends import OPERATIONS
from dsnet_kernels.checks import FLOATING


def with_layout(case, inputs, grads, layout):
    """Activations and gradients in another layout."""
    changed = {name: layout(inputs[name]) for name in case.activations}
    return inputs | changed, [layout(grad) for grad in grads]


def is_summed(case, name):
    """Whether a result is a parameter's gradient, a sum over images."""
    return name.startswith("grad ") and name.removeprefix("grad ") not in case.activations


# What is under test


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_is_under_test(case):
    backends = set(OPERATIONS[case.name].present)
    if triton.INTERPRETED:
        backends &= {"triton"}
    elif not torch.cuda.is_available():
        backends -= {"triton"}
    assert {variant.backend for variant in variants(case.name)} == backends


def test_every_operation_with_a_backend_has_a_case():
    names = {operation.name for operation in OPERATIONS.values() if operation.present}
    assert {case.name for case in CASES} == names


@on_every_variant
def test_other_dtypes_are_refused_with_the_reason(case, variant):
    for dtype in FLOATING:
        inputs = inputs_on(variant.device, case.make(case.small[0], dtype, generator(0)))
        with variant.active():
            if dtype in variant.dtypes:
                assert outputs_of(case.function(**inputs))[0].dtype == dtype
                continue
            with pytest.raises(BackendUnavailable, match=rf"{variant.backend}: .* is {dtype}"):
                case.function(**inputs)


# Values


@in_every_dtype
def test_within_budget(case, variant, dtype):
    for shape in case.shapes:
        compare(case, variant, *(sample(case, shape, dtype, seed) for seed in range(3)))


@on_compiled_kernels_and_dtype
def test_large_inputs_are_within_budget(case, variant, dtype):
    for shape in case.native_shapes:
        compare(case, variant, sample(case, shape, dtype))


@in_every_dtype
def test_every_option_is_within_budget(case, variant, dtype):
    for name, option in case.options.items():
        for shape in case.small:
            seeds = range(2 if variant.stand_in else 4)
            samples = [sample(case, shape, dtype, seed, option=option) for seed in seeds]
            if name not in case.refused.get(variant.backend, ()):
                compare(case, variant, *samples)
                continue
            with variant.active(), pytest.raises(BackendUnavailable):
                run(case, variant, *samples[0])


@on_every_kernel_and_dtype
def test_small_integers_are_exact(case, variant, dtype):
    for seed, shape in enumerate(case.exact_shapes):
        inputs, grads = sample(case, shape, dtype, seed, exact=True)
        # The reference rounds between its steps in 16 bits; float64 rounds nothing.
        oracle = exact_results(case, inputs, grads)
        with variant.active():
            got = run(case, variant, inputs, grads)
        assert_same_bits(got, {name: value.to(dtype) for name, value in oracle.items()})


@on_every_variant
def test_float32_parameters_beside_16_bits(case, variant):
    def mixed(seed):
        inputs = case.make(case.small[1], torch.float32, generator(seed))
        inputs |= {name: inputs[name].to(variant.half) for name in case.activations}
        _, grads = sample(case, case.small[1], variant.half, seed)
        return inputs, grads

    got = compare(case, variant, *(mixed(seed) for seed in range(2)))
    for name in tensors_of(mixed(0)[0]):
        expected = variant.half if name in case.activations else torch.float32
        assert got[f"grad {name}"].dtype == expected


# Layouts


@on_every_kernel_and_dtype
def test_layouts_do_not_change_bits(case, variant, dtype):
    layouts = STAND_IN_LAYOUTS if variant.stand_in else LAYOUTS
    for shape in case.small:
        inputs, grads = sample(case, shape, dtype)
        with variant.active():
            plain = run(case, variant, inputs, grads)
        for layout, changed in layouts.items():
            with variant.active():
                other = run(case, variant, *with_layout(case, inputs, grads, changed))
            assert other["out0"].stride() == plain["out0"].stride(), layout
            for name, value in plain.items():
                if variant.backend in case.sums_follow_layout and is_summed(case, name):
                    torch.testing.assert_close(other[name], value)
                else:
                    assert torch.equal(other[name], value), f"{name}, {layout}"


@on_every_kernel_and_dtype
def test_strides_of_parameters_do_not_change_bits(case, variant, dtype):
    inputs, grads = sample(case, case.small[1], dtype)
    strided = {
        name: tensor.repeat_interleave(2, dim=-1)[..., ::2]
        for name, tensor in tensors_of(inputs).items()
        if name not in case.activations
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    with variant.active():
        plain = run(case, variant, inputs, grads)
        other = run(case, variant, inputs | strided, grads)
    assert_same_bits(other, plain)


@on_every_variant
def test_expanded_sample(case, variant):
    inputs, grads = sample(case, case.small[1])
    for name in case.activations:
        inputs[name] = inputs[name][:1].expand_as(inputs[name])
    compare(case, variant, (inputs, grads))
    scalar = [torch.ones(()).expand_as(grad) for grad in grads]
    row = [grad[(slice(1),) * (grad.dim() - 1)].expand_as(grad) for grad in grads]
    for expanded in (scalar, row):
        assert all(0 in grad.stride() for grad in expanded)
        compare(case, variant, (inputs, expanded))


@on_kernels_in_place
def test_offsets_beyond_two_to_the_31_elements(case, variant):
    inputs, grads = sample(case, case.small[0], variant.half)

    def spread(x):
        return apart(x.to(variant.device), 2**31 + 24)

    with variant.active():
        expected = run(case, variant, inputs, grads)
        got = run(case, variant, *with_layout(case, inputs, grads, spread))
    assert_same_bits(got, expected)


# NaN, and what a result must not depend on


@on_every_kernel_and_dtype
def test_nan_stays_in_its_image(case, variant, dtype):
    inputs, grads = sample(case, case.small[1], dtype)
    others = [0, 2]

    def spoilt(tensor):
        tensor = tensor.clone()
        tensor[1] = float("nan")
        return tensor

    bad_inputs = inputs | {name: spoilt(inputs[name]) for name in case.activations}
    bad_grads = [spoilt(grad) for grad in grads]
    with variant.active():
        clean = run(case, variant, inputs, grads)
    for pair in ((bad_inputs, grads), (inputs, bad_grads)):
        expected = evaluate(case.reference, *pair)
        with variant.active():
            got = run(case, variant, *pair)
        for name, value in got.items():
            assert torch.equal(value.isnan(), expected[name].isnan()), name
            if not is_summed(case, name):
                assert torch.equal(value[others], clean[name][others]), name
        assert any(value.isnan().any() for value in got.values())


@on_cpu_kernels
def test_threads_do_not_change_bits(case, variant):
    inputs, grads = sample(case, case.native_shapes[0])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with variant.active():
                results.append(run(case, variant, inputs, grads))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@on_every_kernel
def test_repeats_are_bit_equal(case, variant):
    """In the emulator with another order of threads each time; the interpreter knows but one."""
    inputs, grads = sample(case, case.small[1])
    # On a GPU blocks come in another order each time, and a test has seconds.
    plain = 50 if variant.device == "cuda" else 1000
    repeats = {"emulated": 8, "interpreted": 1}.get(variant.stand_in, plain)
    with variant.active():
        first = run(case, variant, inputs, grads)
        for _ in range(repeats):
            assert_same_bits(run(case, variant, inputs, grads), first)


@on_every_kernel
def test_every_output_is_written(case, variant):
    """Under deterministic algorithms torch fills fresh memory with NaN."""
    inputs, grads = sample(case, case.small[1])
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=variant.device).isnan().all()
        with variant.active():
            got = run(case, variant, inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in got.values())


# The checks themselves

FAULTS = [
    pytest.param(case, variant, fault, id=f"{case}-{variant}-{name}", marks=gpu_mark(variant))
    for case in CASES
    for variant in variants(case.name)
    for name, fault in case.faults.items()
]


@pytest.mark.parametrize(("case", "variant", "fault"), FAULTS)
def test_the_budget_catches(case, variant, fault):
    inputs = case.make(case.small[0], torch.float32, generator(0))
    with variant.active():
        outputs = outputs_of(fault(case.function, inputs_on(variant.device, inputs)))
    broken = {f"out{i}": output.cpu() for i, output in enumerate(outputs)}
    oracle = evaluate(case.reference, mapped(inputs, torch.Tensor.double))
    with pytest.raises(AssertionError, match=r"budget|cosine"):
        assert_within_budget(broken, evaluate(case.reference, inputs), oracle)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_budget_catches_results_of_zeros(case):
    inputs, grads = sample(case, case.small[0])
    oracle = exact_results(case, inputs, grads)
    good = evaluate(case.reference, inputs, grads)
    for name, value in good.items():
        broken = good | {name: torch.zeros_like(value)}
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_within_budget(broken, good, oracle)

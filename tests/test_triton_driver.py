"""The Triton backend from the public call to the launch, on a driver that launches nothing."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dsnet
import dsnet_kernels
from dsnet.bench.cases import CASES, stages
from dsnet.bench.ops import make_inputs, ours
from dsnet_kernels import triton as backend

pytest.importorskip("triton", reason="Triton is not installed")
if backend.INTERPRETED:
    pytest.skip("the interpreter has no driver", allow_module_level=True)

from benchmarks.compile_gates.triton_driver import H100, MI300, compilations, counting
from dsnet_kernels.triton import compiling, launch

ROOT = str(Path(dsnet_kernels.__file__).parents[1])
BF16 = torch.bfloat16
STAGES = stages("dsnet_tiny", batch=1, size=(224, 224))


def forward(case, stage, dtype=BF16):
    """One call of ``case`` that wants no gradient."""
    inputs = make_inputs(case, stage, dtype, backward=False)

    def run():
        with torch.inference_mode():
            return ours("triton", case, inputs).call()

    return run


def both_ways(case, stage, dtype=BF16):
    """One call of ``case`` and of its gradient."""
    inputs = make_inputs(case, stage, dtype, backward=True)
    return lambda: ours("triton", case, inputs).values()


def launches(function) -> int:
    with counting() as count:
        function()
    return count.launches.total()


# Launches: an operation's forward, and with its backward, in stages 1, 2 and 3 of the tiny network.
LAUNCHES = {
    "depthwise_conv3x3 local": [(1, 3)] * 3,
    "depthwise_conv3x3 position": [(1, 3)] * 3,
    "global_attention attention": [(1, 5)] * 3,
    "co_attention exchange": [(9, 29), (9, 29), (7, 22)],
    "upsample_concat mixing": [(2, 8)] * 3,
    "pointwise_mlp mlp": [(1, 3), (1, 6), (2, 7)],
    "alignment both": [(11, 37), (11, 37), (9, 30)],
}


@pytest.mark.parametrize("i_stage", [0, 1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation} {case.use}")
def test_launches_of_an_operation(case, i_stage):
    stage, expected = STAGES[i_stage], LAUNCHES[f"{case.operation} {case.use}"][i_stage]
    assert (launches(forward(case, stage)), launches(both_ways(case, stage))) == expected


def optimised(model: str = "dsnet_tiny", image=(224, 224)):
    """One image through an optimised network in bfloat16."""
    network = dsnet.optimize(dsnet.create_model(model).eval().to(BF16))
    x = torch.zeros(1, 3, *image, dtype=BF16)

    def run():
        with torch.inference_mode():
            network(x)

    return run


def test_launches_of_an_optimised_block():
    """Two depthwise convolutions, both attentions, the mixing and the MLP, by stage."""
    network = dsnet.optimize(dsnet.create_model("dsnet_tiny").eval().to(BF16))
    for i, most in enumerate((15, 15, 14, 14)):
        stage = network.module.stages[i]
        block, width = next(m for m in stage.modules() if hasattr(m, "co_attention")), STAGES[i]
        x = torch.zeros(1, width.channels, *width.grid, dtype=BF16)
        with counting() as count, dsnet_kernels.backend("triton"), torch.inference_mode():
            block(x.contiguous(memory_format=torch.channels_last))
        assert 0 < count.launches.total() <= most, count.launches


# Variants, each of which a fresh process compiles


def test_variants_of_an_optimised_network():
    assert 20 < compilations(optimised()).total() <= 42


def test_variants_of_all_operations():
    def run():
        for case in CASES:
            for stage in STAGES:
                both_ways(case, stage)()

    found = compilations(run)
    assert 50 < found.total() <= 101
    assert found["multiply_rows"] <= 17
    assert found["multiply_transposed"] <= 10


def test_sizes_are_no_variants():
    """Neither the batch nor the image's size, nor strides of products."""
    case = next(case for case in CASES if case.operation == "upsample_concat")

    def run(batch, size):
        return compilations(both_ways(case, stages("dsnet_tiny", batch, size)[1])).total()

    def run_all():
        for batch, size in ((2, (224, 224)), (3, (192, 160)), (8, (224, 256))):
            both_ways(case, stages("dsnet_tiny", batch, size)[1])()

    assert compilations(run_all).total() == run(2, (224, 224))


# Host time: tables are looked up and not built, and a call makes no more tensors than it did


def test_a_repeated_call_builds_no_table(monkeypatch):
    built = collections.Counter()
    real = launch.Launch.__init__

    def count(self, *args, **keywords):
        built["launches"] += 1
        real(self, *args, **keywords)

    monkeypatch.setattr(launch.Launch, "__init__", count)
    with counting():
        for case in CASES:
            run = both_ways(case, STAGES[0])
            launch.forget_tables()
            run()
            assert built["launches"] > 0
            built.clear()
            run()
            assert built["launches"] == 0, case.operation


# GPUs of other makers


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation} {case.use}")
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
def test_options_that_an_amd_gpu_does_not_have_are_left_out(case, dtype):
    with counting(MI300) as count:
        for stage in (STAGES[0], STAGES[2]):
            both_ways(case, stage, dtype)()
    assert count.launches


def test_registers_are_limited_on_nvidia_gpus():
    case = next(case for case in CASES if case.operation == "depthwise_conv3x3")
    for target, limited in ((H100, True), (MI300, False)):
        with counting(target) as count:
            forward(case, STAGES[0])()
        ((_, key),) = count.variants
        assert ("maxnreg" in key) == limited


def test_a_kernel_compiles_for_an_amd_gpu():
    case = next(case for case in CASES if case.operation == "upsample_concat")
    with counting(MI300, compiles=True) as count:
        forward(case, STAGES[0])()
    assert count.launches == {"multiply_rows": 1, "upsample_concat_forward": 1}


def test_auto_passes_over_triton_on_amd_gpus_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for operation in dsnet_kernels.backends.OPERATIONS.values():
        if "triton" in operation.present:
            tensors = [torch.empty(1) for _ in operation.tensors]
            assert "AMD GPU" in operation.reason_to_avoid("triton", *tensors)
    monkeypatch.setattr(torch.version, "hip", None)
    assert backend.loses() is None


# Compilation in parallel


def test_what_was_compiled_in_parallel_is_not_compiled_again():
    run = optimised(image=(64, 64))
    with counting() as count, dsnet_kernels.backend("triton"):
        compiled = backend.compile_in_parallel(run, threads=4)
        assert compiled == len(count.variants) == len(set(count.variants)) > 20
        assert not count.launches
        run()
        assert len(count.variants) == compiled
        assert count.launches.total() > 100


def test_a_backward_is_compiled_in_parallel_too():
    case = next(case for case in CASES if case.operation == "pointwise_mlp")
    run = both_ways(case, STAGES[2])
    with counting() as count:
        compiled = backend.compile_in_parallel(run)
        assert not count.launches
        run()
    assert compiled == len(count.variants) == 7


def test_kernels_compile_in_parallel(tmp_path, monkeypatch):
    """Through Triton's own compiler, into an empty cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = next(case for case in CASES if case.operation == "upsample_concat")
    run = forward(case, STAGES[1])
    with counting(compiles=True) as count:
        assert backend.compile_in_parallel(run) == 2
        assert len(list(tmp_path.glob("*/*.cubin"))) == 2
        run()
    assert len(count.variants) == 2
    assert count.launches.total() == 2


def test_an_error_of_the_compiler_is_raised_and_ends_the_collection(monkeypatch):
    def fail(self):
        raise RuntimeError("no registers left")

    monkeypatch.setattr(compiling._Variant, "compile", fail)
    run = forward(CASES[0], STAGES[0])
    with counting() as count:
        with pytest.raises(RuntimeError, match="no registers left"):
            backend.compile_in_parallel(run)
        run()
    assert count.launches.total() == 1


def test_an_error_of_the_function_ends_the_collection():
    def fail():
        raise ValueError("wrong image")

    with counting(), pytest.raises(ValueError, match="wrong image"):
        backend.compile_in_parallel(fail)
    assert launch.collector.take is None


# A machine without a C compiler

DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
"""


@pytest.mark.parametrize("imports", ["triton", "CC"])
def test_without_a_c_compiler_triton_is_refused_with_the_reason(tmp_path, imports):
    """Triton builds what launches kernels; a folder with a stub of the GPU's library stands in."""
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-o", library, tmp_path / "driver.c"], check=True)
    code = (
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "from dsnet_kernels import triton\n"
        "print(triton.import_refusal())"
    )
    environment = {
        **os.environ,
        "PATH": "",
        "PYTHONPATH": ROOT,
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
    }
    environment.pop("CC", None)
    if imports == "CC":
        environment["CC"] = str(tmp_path / "absent")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("triton does not find or build its driver: ")
    if imports != "CC":
        assert "C compiler" in done.stdout


def test_the_driver_leaves_nothing_behind():
    compilations(lambda: None)
    x, weight = torch.zeros(1, 8, 4, 4), torch.zeros(8, 1, 3, 3)
    with pytest.raises(dsnet_kernels.BackendUnavailable, match="triton: x is on cpu, not on a GPU"):
        dsnet_kernels.depthwise_conv3x3(x, weight, backend="triton")

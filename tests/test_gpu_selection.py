"""Which GPUs, drivers and platforms ``auto`` gives to which backend; no GPU is needed."""

import json
from dataclasses import replace

import pytest
import torch
from variants import OnDevice

import dsnet_kernels
from dsnet_kernels import devices, information, native, triton
from dsnet_kernels.backends import OPERATIONS, select

DEPTHWISE = OPERATIONS["depthwise_conv3x3"]
SHAPE = (2, 64, 56, 56)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, both backends built; sets its capability, record and versions."""

    def machine(capability=(9, 0), record=None, versions=(13000, 13000)):
        # Each call of a test is another machine.
        for cached in (native.gpu_capability, native._library_refusal):
            cached.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "A GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(native, "build_record", lambda: record)
        monkeypatch.setattr(native, "cuda_versions", lambda: versions)
        monkeypatch.setattr(triton, "import_refusal", lambda: None)
        monkeypatch.setattr(triton, "INTERPRETED", False)
        monkeypatch.setattr(triton, "devices", ("cuda",))
        for operation in OPERATIONS.values():
            for name in ("cuda", "triton"):
                monkeypatch.setitem(operation.present, name, lambda: None)

    return machine


def built_for(*architectures):
    return {"cuda_architectures": list(architectures), "cuda_toolkit": "13.0"}


DEFAULT = ("80-real", "90-real", "100-virtual")


# Code for the GPU


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (DEFAULT, (8, 0), True),
        (DEFAULT, (8, 9), True),
        (DEFAULT, (9, 0), True),
        (DEFAULT, (10, 3), True),
        (DEFAULT, (12, 0), True),
        (("80-real",), (9, 0), False),
        (("90-real",), (8, 0), False),
        (("90-virtual",), (8, 9), False),
        (("86-real",), (8, 0), False),
        (("80",), (9, 0), True),
        (("90a-real",), (9, 0), True),
        (("90a",), (10, 0), False),
        (("100f-real",), (10, 3), True),
        (("100f-virtual",), (12, 0), False),
        ((), (9, 0), True),
        (("native",), (9, 0), True),
    ],
)
def test_auto_takes_the_library_where_it_has_code_for_the_gpu(gpu, architectures, capability, runs):
    gpu(capability, built_for(*architectures))
    x = OnDevice("cuda", SHAPE)
    assert select(DEPTHWISE, "auto", x) == ("cuda" if runs else "triton")
    refusal = DEPTHWISE.reason_against("cuda", x)
    if runs:
        assert refusal is None
    else:
        major, minor = capability
        assert refusal == (
            f"GPU 0 has compute capability {major}.{minor};"
            f" the library was built for {', '.join(architectures)}"
        )


@pytest.mark.parametrize("record", [None, {"CUDA": "not built"}])
def test_a_record_without_architectures_refuses_nothing(gpu, record):
    gpu((12, 0), record)
    assert select(DEPTHWISE, "auto", OnDevice("cuda", SHAPE)) == "cuda"


# The driver


@pytest.mark.parametrize(
    ("versions", "capability", "reason"),
    [
        ((12080, 13000), (9, 0), "the NVIDIA driver serves CUDA 12.8, the library was built with"),
        ((13000, 13010), (9, 0), None),
        ((13010, 13000), (12, 0), None),
        ((13000, 13010), (12, 0), "a driver for CUDA 13.0 does not translate PTX of CUDA 13.1"),
        (None, (12, 0), None),
    ],
)
def test_drivers_older_than_the_library_are_refused(gpu, versions, capability, reason):
    gpu(capability, built_for(*DEFAULT), versions)
    x = OnDevice("cuda", SHAPE)
    found = DEPTHWISE.reason_against("cuda", x)
    assert select(DEPTHWISE, "auto", x) == ("cuda" if reason is None else "triton")
    assert found is None if reason is None else reason in found


def test_versions_are_read_from_the_library_once(monkeypatch):
    calls = []

    class Library:
        def __init__(self, path):
            calls.append(path)

        @staticmethod
        def dsnet_kernels_cuda_versions(driver, runtime):
            driver._obj.value, runtime._obj.value = 12080, 13000
            return 0

    monkeypatch.setattr(native.ctypes, "CDLL", Library)
    assert [native.cuda_versions() for _ in range(3)] == [(12080, 13000)] * 3
    assert calls == [str(native.CUDA.path)]


@pytest.mark.parametrize("status", [0, 3, None])
def test_versions_of_a_library_that_does_not_tell_are_unknown(monkeypatch, status):
    class Library:
        def __init__(self, path):
            if status is not None:
                self.dsnet_kernels_cuda_versions = lambda driver, runtime: status

    monkeypatch.setattr(native.ctypes, "CDLL", Library)
    assert native.cuda_versions() == ((0, 0) if status == 0 else None)


# Platforms


def test_rocm_has_no_cuda_library(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    refusal = native._load_cuda().refusal
    assert refusal.endswith("was built for ROCm, the library is for NVIDIA GPUs")


def test_a_triton_that_cannot_compile_is_passed_over(gpu, monkeypatch):
    gpu((9, 0), built_for("80-real"))
    monkeypatch.setattr(triton, "import_refusal", lambda: "triton finds no C compiler")
    x = OnDevice("cuda", SHAPE)
    assert select(DEPTHWISE, "auto", x) == "reference"
    assert DEPTHWISE.reason_against("triton", x) == "triton finds no C compiler"


def test_a_failed_build_is_the_reason(monkeypatch, tmp_path):
    record = {"compiler": "GNU 12.2.0", "cuda_failure": "error: no such thing\nmore"}
    (tmp_path / "build.json").write_text(json.dumps(record))
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    refusal = native._load_cuda().refusal
    assert refusal.endswith("was not built into this installation: error: no such thing")
    text = information.render(dsnet_kernels.info())
    assert "cuda_failure       error: no such thing\n                     more\n" in text


# Compiled and repeated calls


def test_the_capability_is_asked_for_once_per_gpu(gpu, monkeypatch):
    asked = []
    gpu()
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, 0)
    )
    for _ in range(3):
        for index in (0, 1):
            assert native.cuda_gpu_refusal(index) is None
            assert native.gpu_refusal(index) is None
    assert asked == [0, 1]


def test_refusals_of_gpus_are_constants_of_a_compiled_graph(gpu, monkeypatch):
    gpu((9, 0), built_for("80-real"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.compiler.reset()

    def function(x):
        return x + (1 if native.cuda_gpu_refusal(0) is None else 2)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())).item() == 2
    torch.compiler.reset()


# What is told


def test_backends_are_available_where_their_device_is(gpu, monkeypatch):
    assert dsnet_kernels.available_backends("depthwise_conv3x3", device="meta") == ("reference",)
    assert "sdpa" in dsnet_kernels.available_backends("global_attention", device="meta")
    with pytest.raises(ValueError, match="device: expected a type of device, got 'gpu'"):
        dsnet_kernels.available_backends(device="gpu")
    gpu(record=built_for("80-real"))
    found = {
        device: dsnet_kernels.available_backends("depthwise_conv3x3", device=device)
        for device in ("cpu", "cuda", torch.device("cuda", 0), None)
    }
    assert "triton" not in found["cpu"]
    assert found["cuda"] == found[torch.device("cuda", 0)] == ("reference", "triton")
    assert set(found[None]) == {*found["cpu"], *found["cuda"]}
    gpu()
    found = dsnet_kernels.available_backends("depthwise_conv3x3", device="cuda")
    assert found == ("reference", "triton", "cuda")


def test_without_a_gpu_its_backends_are_built_and_not_usable(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = dsnet_kernels.info()
    assert facts["operations"]["pointwise_mlp"]["cuda"] == "built; no NVIDIA GPU here"
    assert facts["operations"]["pointwise_mlp"]["triton"] == "installed; no NVIDIA GPU here"
    assert list(facts["auto"]) == ["cpu"]
    assert not {"cuda", "triton"} & set(dsnet_kernels.available_backends())
    assert dsnet_kernels.available_backends(device="cuda") == ()


def test_info_names_gpus_versions_and_choices(gpu, monkeypatch):
    monkeypatch.setattr(native, "CUDA", replace(native.CUDA, refusal=None))
    gpu((12, 0), built_for("90-real"))
    monkeypatch.setattr(triton, "REFUSAL", None)
    monkeypatch.setattr(information.metadata, "version", lambda name: "3.6.0")
    facts = dsnet_kernels.info()
    assert facts["versions"]["triton"] == "3.6.0"
    assert facts["machine"]["gpus"] == ["A GPU with compute capability 12.0"]
    assert list(facts["auto"]) == ["cpu", "cuda:0"]
    for operation in ("depthwise_conv3x3", "co_attention", "global_attention"):
        assert facts["auto"]["cuda:0"]["bfloat16"][operation] == "triton"
        assert facts["operations"][operation]["cuda"].startswith("GPU 0 has compute capability")
        assert facts["operations"][operation]["triton"] is None
    lines = information.render(facts).splitlines()
    assert "    depthwise_conv3x3  triton" in lines[lines.index("  cuda:0, bfloat16") :]


def test_types_of_device():
    assert devices.is_present("cpu")
    assert devices.is_present("mps") == torch.backends.mps.is_available()
    assert devices.is_present("cuda") == torch.cuda.is_available()

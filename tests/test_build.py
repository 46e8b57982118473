"""What the build decides, and what it leaves behind for ``info``."""

import importlib
from pathlib import Path

import pytest
import torch

from dsnet_kernels import native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cuda_toolkit(monkeypatch, tmp_path):
    """The module, in a world without CUDA variables, nvcc or GPUs."""
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    for name in ("DSNET_CUDA", "CUDACXX", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    module = importlib.import_module("cuda_toolkit")
    exists = module.os.access
    monkeypatch.setattr(
        module.os, "access", lambda path, mode: "/usr/local" not in str(path) and exists(path, mode)
    )
    return module


@pytest.fixture
def torch_location(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    return importlib.import_module("torch_location")


def program(path: Path, output: str) -> Path:
    """An executable that prints ``output``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n".replace("cat", "/bin/cat"))
    path.chmod(0o755)
    return path


NVCC = "Cuda compilation tools, release 13.0, V13.0.88"


def test_no_toolkit_is_a_reason_unless_it_is_required(cuda_toolkit, monkeypatch):
    assert cuda_toolkit.find_toolkit().startswith("not built: no nvcc in CUDACXX")
    monkeypatch.setenv("DSNET_CUDA", "1")
    with pytest.raises(SystemExit, match=r"DSNET_CUDA=1: expected nvcc in .* found none"):
        cuda_toolkit.find_toolkit()


def test_cuda_can_be_refused_and_mistyped(cuda_toolkit, monkeypatch, tmp_path):
    program(tmp_path / "nvcc", NVCC)
    monkeypatch.setenv("DSNET_CUDA", "0")
    assert cuda_toolkit.find_toolkit() == "not built: DSNET_CUDA=0"
    monkeypatch.setenv("DSNET_CUDA", "yes")
    with pytest.raises(SystemExit, match="DSNET_CUDA: expected auto, 0 or 1, got 'yes'"):
        cuda_toolkit.find_toolkit()


def test_toolkit_is_looked_for_in_order(cuda_toolkit, monkeypatch, tmp_path):
    on_path = program(tmp_path / "nvcc", NVCC)
    found = cuda_toolkit.find_toolkit()
    assert found == (on_path, "13.0.88", "80-real;90-real;100-real;100-virtual")
    home = program(tmp_path / "home/bin/nvcc", NVCC)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda_toolkit.find_toolkit().nvcc == home
    named = program(tmp_path / "other/nvcc", NVCC)
    monkeypatch.setenv("CUDACXX", str(named))
    assert cuda_toolkit.find_toolkit().nvcc == named


def test_architectures_are_named_visible_or_default(cuda_toolkit, monkeypatch, tmp_path):
    program(tmp_path / "nvcc", NVCC)
    program(tmp_path / "nvidia-smi", "9.0\n7.5\n9.0")
    assert cuda_toolkit.find_toolkit().architectures == "90-real"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;12.0+PTX")
    assert cuda_toolkit.find_toolkit().architectures == "80-real;90a-real;120-real;120-virtual"


@pytest.mark.parametrize("name", ["7.5", "Hopper", "90", "8.0+SASS"])
def test_architectures_that_kernels_cannot_have(cuda_toolkit, name):
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected .* got"):
        cuda_toolkit.cmake_architectures([name])


def test_torch_is_found_without_importing_it(torch_location):
    found = torch_location.find_torch()
    assert found.folder == Path(torch.__file__).parent
    assert found.version == torch.__version__


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cu117"])
def test_an_old_torch_does_not_serve(torch_location, monkeypatch, tmp_path, version):
    header = tmp_path / "torch/include/torch/csrc/stable/library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(torch_location, "_candidates", lambda: [tmp_path / "torch"])
    assert torch_location.find_torch() is None
    (tmp_path / "torch/version.py").write_text("__version__ = '2.10.0'\n")
    assert torch_location.find_torch() == (tmp_path / "torch", "2.10.0")
    header.unlink()
    assert torch_location.find_torch() is None


@pytest.fixture
def introspection():
    module, absent = native.introspection()
    assert module is not None, absent
    return module


def test_record_is_the_same_in_the_file_and_in_the_module(introspection):
    record = native.build_record()
    assert introspection.build_configuration() == record
    assert {"compiler", "torch", "stable ABI", "CPU", "CUDA", "flags"} == set(record)


def test_capability_is_checked(introspection):
    before = introspection.cpu_capability()
    with pytest.raises(ValueError, match=r"cpu_capability: expected one of generic.* got 'avx9'"):
        introspection.set_cpu_capability("avx9")
    assert introspection.cpu_capability() == before
    assert before in introspection.cpu_capabilities()


def test_launch_configurations_can_be_read(introspection):
    forward = introspection.depthwise_conv3x3_launch((64, 64, 56, 56), "bfloat16")
    assert forward.startswith("pack 8, threads 8 x 16, groups 1,")
    assert introspection.depthwise_conv3x3_launch((2, 3, 5, 7), "float32").startswith("pack 1,")
    backward = introspection.depthwise_conv3x3_launch((64, 64, 56, 56), "float16", backward=True)
    assert backward.startswith("pack 4,")
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16"):
        introspection.depthwise_conv3x3_launch((1, 1, 1, 1), "float64")
    narrow = introspection.pointwise_mlp_launch((64, 64, 56, 56), 256, "bfloat16", False)
    assert narrow.startswith("fused, blocks of 128 tokens")
    wide = introspection.pointwise_mlp_launch((64, 320, 14, 14), 1280, "bfloat16", True, True)
    assert wide.startswith("slabs 1 of 12544 tokens, blocks of 128 across hidden")


@pytest.mark.parametrize(
    ("capability", "usable"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_old_gpus_are_refused_with_the_reason(monkeypatch, capability, usable):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    reason = native.gpu_refusal(0)
    assert (reason is None) == usable
    if not usable:
        assert reason == "GPU 0 has compute capability 7.5; the kernels need 8.0 or newer"


def test_a_library_that_does_not_load_keeps_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    assert "was not built" in native._load("cpu").refusal
    (tmp_path / "libdsnet_kernels_cpu.so").write_bytes(b"not a library")
    assert "does not load: " in native._load("cpu").refusal
    (tmp_path / "libdsnet_kernels_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "was built without CUDA" in native._load_cuda().refusal

"""What the build decides, and what it leaves behind for ``info``."""

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

from dsnet_kernels import information, native

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
    return script(path, f"/bin/cat <<'END'\n{output}\nEND\n")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def fake_nvcc(path: Path, known=(75, 80, 86, 90, 100, 120), version="13.0.88") -> Path:
    """An nvcc that says its version and architectures, and compiles nothing."""
    listed = " ".join(f"compute_{number}" for number in known)
    return script(
        path,
        "case $1 in\n"
        f"--version) echo 'Cuda compilation tools, release 13.0, V{version}' ;;\n"
        "--dryrun) echo '#$ INCLUDES=\"-I/cuda/include\"  ' ;;\n"
        f"--list-gpu-arch) for name in {listed}; do echo $name; done ;;\n"
        '*) echo "$0: error: cannot compile" >&2; exit 1 ;;\nesac\n',
    )


def test_no_toolkit_is_none(cuda_toolkit):
    assert cuda_toolkit.find_toolkit() is None


def test_cuda_can_be_mistyped(cuda_toolkit, monkeypatch):
    assert cuda_toolkit.cuda_wanted() == "auto"
    monkeypatch.setenv("DSNET_CUDA", "yes")
    with pytest.raises(SystemExit, match="DSNET_CUDA: expected auto, 0 or 1, got 'yes'"):
        cuda_toolkit.cuda_wanted()


def test_toolkit_is_looked_for_in_order(cuda_toolkit, monkeypatch, tmp_path):
    on_path = fake_nvcc(tmp_path / "nvcc")
    assert cuda_toolkit.find_toolkit() == (on_path, "13.0.88", (80, 90))
    home = fake_nvcc(tmp_path / "home/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda_toolkit.find_toolkit().nvcc == home
    named = fake_nvcc(tmp_path / "other/nvcc")
    monkeypatch.setenv("CUDACXX", str(named))
    assert cuda_toolkit.find_toolkit().nvcc == named


def test_architectures_are_named_visible_or_default(cuda_toolkit, monkeypatch, tmp_path):
    fake_nvcc(tmp_path / "nvcc")
    program(tmp_path / "nvidia-smi", "9.0\n7.5\n9.0")
    assert cuda_toolkit.find_toolkit().record == ["90-real", "90-virtual"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0+PTX 8.0 9.0a;10.0")
    found = cuda_toolkit.find_toolkit()
    assert found.record == ["80-real", "90-real", "100-real", "120-real", "100-virtual"]
    assert found.flags == [
        "--generate-code=arch=compute_80,code=[sm_80,sm_90]",
        "--generate-code=arch=compute_100,code=[sm_100,sm_120,compute_100]",
    ]
    assert str(found) == "13.0.88 for 80 90 100 120, PTX 100"


def test_architectures_are_those_that_nvcc_knows(cuda_toolkit, monkeypatch, tmp_path):
    fake_nvcc(tmp_path / "nvcc", known=(50, 80, 86, 90))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0 10.0+PTX")
    found = cuda_toolkit.find_toolkit()
    assert found.record == ["80-real", "90-real", "80-virtual"]
    assert found.flags == ["--generate-code=arch=compute_80,code=[sm_80,sm_90,compute_80]"]


def test_a_gpu_newer_than_nvcc_gets_ptx_that_it_translates(cuda_toolkit, tmp_path):
    fake_nvcc(tmp_path / "nvcc", known=(50, 80, 86, 90))
    program(tmp_path / "nvidia-smi", "12.0")
    assert cuda_toolkit.find_toolkit().record == ["90-real", "90-virtual"]


def test_an_nvcc_that_knows_no_architecture_is_an_error(cuda_toolkit, tmp_path):
    fake_nvcc(tmp_path / "nvcc", known=(50, 75))
    with pytest.raises(cuda_toolkit.ToolkitError, match="knows no architecture up to 80, 90"):
        cuda_toolkit.find_toolkit()


def test_headers_of_cuda_are_where_nvcc_has_them(cuda_toolkit, tmp_path):
    nvcc = fake_nvcc(tmp_path / "nvcc")
    assert cuda_toolkit.include_folder(nvcc) == Path("/cuda/include")
    program(tmp_path / "nvcc", "nothing")
    with pytest.raises(cuda_toolkit.ToolkitError, match="--dryrun: expected INCLUDES, got"):
        cuda_toolkit.include_folder(nvcc)


def test_an_nvcc_that_does_not_run_is_an_error(cuda_toolkit, tmp_path):
    script(tmp_path / "nvcc", "echo libcudafe.so: not found >&2; exit 127\n")
    with pytest.raises(cuda_toolkit.ToolkitError, match=r"--version: libcudafe\.so: not found"):
        cuda_toolkit.find_toolkit()


@pytest.mark.parametrize("name", ["7.5", "Hopper", "90", "8.0+SASS"])
def test_architectures_that_kernels_cannot_have(cuda_toolkit, name):
    with pytest.raises(cuda_toolkit.ToolkitError, match=r"TORCH_CUDA_ARCH_LIST: expected .* got"):
        cuda_toolkit.architectures([name])


def test_architectures_older_than_the_kernels_are_left_out(cuda_toolkit):
    assert cuda_toolkit.architectures(["5.2", "7.5", "8.0", "9.0a+PTX"]) == [80, 90]


def test_a_named_compiler_that_is_not_there_is_an_error(cuda_toolkit, monkeypatch, tmp_path):
    fake_nvcc(tmp_path / "nvcc")
    monkeypatch.setenv("CUDACXX", str(tmp_path / "other"))
    with pytest.raises(cuda_toolkit.ToolkitError, match="CUDACXX: expected a compiler, got"):
        cuda_toolkit.find_toolkit()


@pytest.fixture
def cuda_build(cuda_toolkit):
    return importlib.import_module("cuda_build")


@pytest.fixture
def setup_module(monkeypatch, cuda_toolkit, tmp_path):
    """setup.py as a module, and its command with folders of its own."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    module = runpy.run_path(str(ROOT / "setup.py"))
    command = module["CMakeBuild"](setuptools.Distribution())
    command.build_temp = str(tmp_path / "temp")
    for name in ("cmake", "cuda"):
        (tmp_path / "temp" / name).mkdir(parents=True)
    (tmp_path / "temp/cmake/CMakeCache.txt").write_text("CMAKE_CXX_COMPILER:FILEPATH=/bin/c++\n")
    (tmp_path / "package").mkdir()
    return module, command


def build_cuda(command, wanted, tmp_path):
    return command._build_cuda(wanted, Path(torch.__file__).parent, tmp_path / "package")


def test_a_failed_cuda_part_is_recorded(setup_module, monkeypatch, tmp_path, capfd):
    _, command = setup_module
    nvcc = fake_nvcc(tmp_path / "nvcc")
    stale = tmp_path / "package/libdsnet_kernels_cuda.so"
    stale.touch()
    monkeypatch.setenv("MAX_JOBS", "1")
    record = build_cuda(command, "auto", tmp_path)
    failure = f"nvcc co_attention for 80 90: {nvcc}: error: cannot compile"
    assert record == {
        "CUDA": f"not built: {failure}",
        "cuda_toolkit": "13.0.88",
        "cuda_architectures": [],
        "cuda_failure": failure,
    }
    assert not stale.exists()
    output = capfd.readouterr().out
    assert output.startswith("nvcc co_attention for 80 90\n")
    assert output.count("\nnvcc ") < 3  # No more are begun.
    with pytest.raises(SystemExit, match="DSNET_CUDA=1: nvcc co_attention for 80 90: "):
        build_cuda(command, "1", tmp_path)


def test_no_cuda_part_is_no_failure_unless_it_is_required(setup_module, tmp_path):
    _, command = setup_module
    for wanted, reason in (("auto", "no nvcc in CUDACXX"), ("0", "DSNET_CUDA=0")):
        record = build_cuda(command, wanted, tmp_path)
        assert record["CUDA"].startswith(f"not built: {reason}")
        assert record["cuda_failure"] is None
    with pytest.raises(SystemExit, match=r"DSNET_CUDA=1: expected nvcc in .* found none"):
        build_cuda(command, "1", tmp_path)


def test_an_install_says_in_its_last_lines_what_failed(setup_module, monkeypatch, tmp_path, capfd):
    _, command = setup_module
    fake_nvcc(tmp_path / "nvcc")
    command.build_lib, command.inplace = str(tmp_path / "lib"), False
    package = tmp_path / "lib/dsnet_kernels"
    package.mkdir(parents=True)
    install = f'echo \'{{"CPU": "generic"}}\' >{package}/build.json'
    script(tmp_path / "cmake", f"case $1 in --install) {install} ;; esac\n")
    monkeypatch.setenv("MAX_JOBS", "1")
    command.build_extension(setuptools.Extension("dsnet_kernels._C", sources=[]))
    record = json.loads((package / "build.json").read_text())
    failure = record["cuda_failure"]
    assert failure.endswith("error: cannot compile")
    assert record["CPU"] == "generic"
    assert record["CUDA"] == f"not built: {failure}"
    assert "commit" in record
    last = capfd.readouterr().out.splitlines()[-3:]
    assert last == [
        "dsnet-kernels: the CUDA kernels are missing, everything else works:",
        f"  {failure}",
        "  DSNET_CUDA=1 makes this an error.",
    ]
    monkeypatch.setattr(native, "_FOLDER", package)
    facts = information.info()
    assert f"not built: {failure}" in information.render(facts)


def test_cores_are_counted_where_affinity_does_not_exist(setup_module, monkeypatch):
    module, _ = setup_module
    assert module["cores"]() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert module["cores"]() == 7


def test_a_unit_is_compiled_again_where_a_header_changed(cuda_build, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    header, source, output = tmp_path / "a.h", tmp_path / "a.cpp", tmp_path / "a.o"
    header.write_text("inline int f() { return 1; }\n")
    source.write_text('#include "a.h"\nint g() { return f(); }\n')
    command = ["c++", *cuda_build.dependencies(output), "-c", str(source), "-o", str(output)]
    unit = cuda_build.Unit("compile a", tuple(command), output)
    for _ in range(2):
        cuda_build._compile(unit)
    assert capfd.readouterr().out == "compile a\ncompile a: 0 CPU s\n"
    os.utime(header, (2**32, 2**32))
    cuda_build._compile(unit)
    assert capfd.readouterr().out == "compile a\ncompile a: 0 CPU s\n"


def test_seconds_of_a_command_include_its_children(cuda_build):
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    done = cuda_build.run(["/bin/sh", "-c", f"{sys.executable} -c '{busy}'; true"], "busy")
    assert 0.3 <= done.seconds < 3


def test_commit_is_that_of_the_checkout(monkeypatch, cuda_toolkit, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    commit_of = importlib.import_module("commit").commit_of
    assert commit_of(tmp_path) is None

    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *name, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "file").write_text("1")
    git("init", "--quiet")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    git("tag", "-a", "v1", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert commit_of(tmp_path) == f"{head}-dirty"


def test_a_report_outside_a_checkout_has_the_commit_of_the_build(monkeypatch, tmp_path):
    from dsnet.bench import report

    monkeypatch.setattr(report, "__file__", str(tmp_path / "dsnet/bench/report.py"))
    monkeypatch.setattr(native, "build_record", lambda: {"commit": "abc"})
    assert report.environment("x")["commit"] == "abc"
    monkeypatch.setattr(native, "build_record", lambda: None)
    assert report._commit() is None


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


def test_record_says_what_was_built():
    record = native.build_record()
    assert set(record) == {
        "compiler",
        "torch",
        "stable ABI",
        "CPU",
        "flags",
        "CUDA",
        "cuda_toolkit",
        "cuda_architectures",
        "cuda_failure",
        "commit",
    }
    assert isinstance(record["cuda_architectures"], list)
    if native.CUDA.path.exists():
        assert record["cuda_architectures"][-1].endswith("-virtual")
        assert record["cuda_failure"] is None


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

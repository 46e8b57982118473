"""The nvcc gate: every kernel's registers, shared memory and spills are those checked in."""

import re
from dataclasses import replace

import pytest

from benchmarks.compile_gates import nvcc
from benchmarks.compile_gates.nvcc import GateError, Resources

NVCC = nvcc.find_nvcc()
CUDA = nvcc.cuda_build.SOURCES / "cuda"
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc: none in CUDACXX, CUDA_HOME or PATH")

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fi' for 'sm_80'
ptxas info    : Function properties for _Z1fi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 163 registers, used 1 barriers, 13824 bytes smem, 584 bytes cmem[0]
ptxas info    : Compile time = 212.944 ms
ptxas info    : Compiling entry function '_Z1fi' for 'sm_90'
ptxas info    : Function properties for _Z1fi
    48 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 584 bytes cmem[0]
"""
PARSED = {
    "_Z1fi": {"sm_80": Resources(163, 13824, 0, 0), "sm_90": Resources(255, 0, 48, 40)},
}
TABLE = {
    "f": {"sm_80": Resources(40, 1024, 0, 0), "sm_90": Resources(48, 1024, 0, 0)},
    "g<float, 4>": {"sm_80": Resources(32, 0, 0, 0)},
}


def changed(kernel="f", target="sm_90", **fields):
    """The table as if one kernel took something else."""
    targets = TABLE[kernel] | {target: replace(TABLE[kernel][target], **fields)}
    return TABLE | {kernel: targets}


def test_report_is_read_by_kernel_and_target():
    assert nvcc.parse(REPORT) == PARSED


@pytest.mark.parametrize(
    "report",
    [
        "ptxas info    : 0 bytes gmem\n",
        REPORT.replace("Used 163 registers", ""),
        REPORT.replace("0 bytes spill loads", ""),
    ],
    ids=["no kernel", "no registers", "no spills"],
)
def test_report_without_a_figure_is_refused(report):
    with pytest.raises(GateError, match="ptxas: expected"):
        nvcc.parse(report)


@pytest.mark.parametrize("same_compiler", [True, False])
def test_the_table_itself_passes_in_silence(same_compiler):
    assert nvcc.compare(TABLE, TABLE, same_compiler) == nvcc.Verdict((), ())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"registers": 49}, "f, sm_90: 49 registers, not 48"),
        ({"shared": 1028}, "f, sm_90: 1028 bytes of shared memory, not 1024"),
        ({"spills": 8}, "f, sm_90: expected no spills, got 8 bytes"),
        ({"stack": 16}, "f, sm_90: expected no stack, got 16 bytes"),
    ],
)
def test_excess_fails(fields, message):
    assert nvcc.compare(changed(**fields), TABLE, True).failures == (message,)


def test_another_compiler_may_take_other_registers_but_not_spill():
    found = changed(registers=60, spills=4)
    verdict = nvcc.compare(found, TABLE, same_compiler=False)
    assert verdict.failures == ("f, sm_90: expected no spills, got 4 bytes",)
    assert verdict.notes == ("f, sm_90: 60 registers, not 48",)


def test_fewer_registers_are_noted():
    verdict = nvcc.compare(changed(registers=40), TABLE, True)
    assert verdict == nvcc.Verdict((), ("f, sm_90: 40 registers, fewer than 48",))


def test_spills_in_the_table_excuse_nothing():
    table = changed(spills=8)
    assert nvcc.compare(table, table, True).failures == (
        "f, sm_90: expected no spills, got 8 bytes",
    )


@pytest.mark.parametrize("same_compiler", [True, False])
def test_kernel_that_the_table_does_not_know_fails(same_compiler):
    table = {"f": TABLE["f"]}
    assert nvcc.compare(TABLE, table, same_compiler).failures == (
        "g<float, 4>, sm_80: not in nvcc.json",
    )


def test_kernel_that_is_no_longer_compiled_fails():
    found = {"f": {"sm_80": TABLE["f"]["sm_80"]}, "g<float, 4>": TABLE["g<float, 4>"]}
    assert nvcc.compare(found, TABLE, True).failures == (
        "f, sm_90: in nvcc.json, but no such kernel is compiled",
    )


def test_names_keep_template_arguments_and_lose_namespace_and_parameters():
    mangled = {
        "_ZN5dsnet4cuda1fIfLi4EEEvPT_": TABLE["f"],
        "_ZN5dsnet4cuda1gEPKfl": TABLE["g<float, 4>"],
    }
    assert nvcc.demangle(mangled) == {"f<float, 4>": TABLE["f"], "g": TABLE["g<float, 4>"]}


def test_two_kernels_of_one_name_are_refused():
    with pytest.raises(GateError, match="expected 2 different names"):
        nvcc.demangle({"_ZN5dsnet4cuda1fEi": TABLE["f"], "_ZN5dsnet4cuda1fEl": TABLE["f"]})


def test_table_is_written_as_it_is_read(tmp_path):
    path = tmp_path / "nvcc.json"
    nvcc.write_table("13.0.88", TABLE, path)
    assert nvcc.read_table(path) == ("13.0.88", TABLE)


def test_checked_in_table_is_as_update_writes_it(tmp_path):
    path = tmp_path / "nvcc.json"
    nvcc.write_table(*nvcc.read_table(), path)
    assert path.read_text("utf-8") == nvcc.TABLE.read_text("utf-8")


def test_checked_in_table_has_every_kernel_of_the_sources_on_every_target():
    sources = "".join(path.read_text("utf-8") for path in CUDA.glob("*.cu*"))
    names = set(re.findall(r"__global__[^;{]*?\b(\w+)\(\s*const", sources))
    _, kernels = nvcc.read_table()
    assert {kernel.partition("<")[0] for kernel in kernels} == names
    targets = [f"sm_{architecture}" for architecture in nvcc.ARCHITECTURES]
    assert all(list(found) == targets for found in kernels.values())


@pytest.fixture
def gate_reports():
    if NVCC is None:
        pytest.skip("nvcc: none in CUDACXX, CUDA_HOME or PATH")
    return nvcc.compile_kernels(NVCC)


def included(path):
    """Names of the headers beside ``path`` that it includes, and that they include."""
    names = set(re.findall(r'#include "cuda/(\w+\.cuh)"', path.read_text("utf-8")))
    return names.union(*(included(path.with_name(name)) for name in names))


def test_every_kernel_header_is_in_a_translation_unit():
    headers = {p.name for p in CUDA.glob("*.cuh") if "__global__" in p.read_text("utf-8")}
    assert headers
    assert headers <= set().union(*(included(unit) for unit in nvcc.cuda_build.kernel_units()))


def test_the_units_that_start_first_exist():
    units = [path.stem for path in nvcc.cuda_build.kernel_units()]
    assert tuple(units[: len(nvcc.cuda_build.LONGEST)]) == nvcc.cuda_build.LONGEST


def test_slow_units_and_many_kernels_fail(monkeypatch):
    reports = {"a": nvcc.UnitReport(REPORT, 45.0), "b": nvcc.UnitReport(REPORT, 45.6)}
    assert nvcc.bounds_broken(reports) == ["b: 46 CPU seconds, not 45"]
    monkeypatch.setattr(nvcc, "KERNELS_BOUND", 1)
    assert nvcc.bounds_broken(reports)[1:] == ["2 kernels, not 1"]


def test_no_kernel_is_in_two_units(gate_reports):
    places = [
        (kernel, unit)
        for unit, report in gate_reports.items()
        for kernel in {found["kernel"] for found in nvcc.ENTRY.finditer(report.text)}
    ]
    twice = {kernel for kernel, _ in places if [k for k, _ in places].count(kernel) > 1}
    assert not twice


@needs_nvcc
def test_kernels_take_what_the_table_allows(capsys):
    status = nvcc.main([])
    output = capsys.readouterr()
    print(output.out)
    assert status == 0, output.err
    assert re.search(r"^  co_attention_backward +\d+ kernels +\d+\.\d CPU s$", output.out, re.M)


@needs_nvcc
def test_source_that_does_not_compile_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "kernels.cu").write_text("__global__ void f() { undeclared(); }\n")
    monkeypatch.setattr(nvcc, "CACHE", tmp_path / "cache")
    with pytest.raises(GateError, match='identifier "undeclared" is undefined'):
        nvcc.compile_kernels(NVCC, [tmp_path / "kernels.cu"])


@needs_nvcc
def test_spill_that_the_compiler_makes_is_found(tmp_path, monkeypatch):
    source = """
    __global__ void __launch_bounds__(1024, 2) spilling(float* p) {
      float kept[64];
    #pragma unroll
      for (int i = 0; i < 64; ++i) kept[i] = p[i * 1024 + threadIdx.x];
      __syncthreads();
    #pragma unroll
      for (int i = 0; i < 64; ++i) p[((i * 7) % 64) * 1024 + threadIdx.x] = kept[i] * kept[63 - i];
    }
    """
    (tmp_path / "kernels.cu").write_text(source)
    monkeypatch.setattr(nvcc, "CACHE", tmp_path / "cache")
    report = nvcc.compile_kernels(NVCC, [tmp_path / "kernels.cu"])["kernels"]
    assert report.seconds > 0.1
    found = nvcc.demangle(nvcc.parse(report.text))
    assert all(resources.spills > 0 for resources in found["spilling"].values())
    assert any("expected no spills" in f for f in nvcc.compare(found, TABLE, True).failures)

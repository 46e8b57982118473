"""The gate on the resources of the Triton kernels, compiled for GPUs that need not be here."""

import copy
import json
import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.compile_gates import triton_gate as gate

TABLE = json.loads(gate.TABLE.read_text())


def test_kernels_stay_within_the_table():
    failures, remarks = gate.compare(TABLE, gate.measure_all())
    print("\n".join(remarks))
    assert not failures


def test_the_table_has_every_case_and_no_spill():
    assert TABLE["kernels"].keys() == {case.name for case in gate.cases()}
    for by_architecture in TABLE["kernels"].values():
        assert by_architecture.keys() == {"sm_80", "sm_90", "sm_100"}
        assert all(r["stack"] == r["local"] == 0 for r in by_architecture.values())


NAME = "depthwise_conv3x3_forward bf16 C=64"


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("registers", 1, "registers .*, the table allows"),
        ("shared", 16, "shared .*, the table allows"),
        ("stack", 8, "spills: stack memory of 8 bytes"),
        ("local", 4, "spills: local memory of 4 bytes"),
    ],
)
@pytest.mark.parametrize("other_version", [False, True], ids=["same", "other"])
def test_an_excess_is_reported(kind, more, message, other_version):
    found = copy.deepcopy(TABLE)
    found["kernels"][NAME]["sm_90"][kind] += more
    if other_version:
        found["versions"]["triton"] = "0.0"
    failures, remarks = gate.compare(TABLE, found)
    fails = kind in ("stack", "local") or not other_version
    (line,) = failures if fails else remarks[1:]
    assert line.startswith(f"{NAME}, sm_90: ")
    assert re.search(message, line)
    assert bool(failures) == fails
    assert bool(remarks) == other_version


def test_kernels_missing_on_either_side_fail():
    found = copy.deepcopy(TABLE)
    found["kernels"]["new"] = found["kernels"].pop(NAME)
    failures, _ = gate.compare(TABLE, found)
    assert failures[0].startswith(f"{NAME}: in the table and no longer compiled")
    assert [line for line in failures if line.startswith("new, sm_80: not in the table")]


def test_fewer_resources_pass():
    found = copy.deepcopy(TABLE)
    found["kernels"][NAME]["sm_90"]["registers"] -= 1
    assert gate.compare(TABLE, found) == ([], [])


def test_a_figure_that_is_not_there_is_an_error():
    good = "REG:32 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:400"
    assert gate.parse_resources(good) == {"registers": 32, "shared": 16, "stack": 8, "local": 0}
    with pytest.raises(ValueError, match="expected STACK:<number>"):
        gate.parse_resources("REG:32 SHARED:16 LOCAL:0")

"""``python -m benchmarks.gpu --dry-run``: the work of every phase, counted and held to bounds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import models, ops, record, sanitizer, tables
from benchmarks.gpu.phases import LIMITS
from benchmarks.gpu.program import Context
from benchmarks.gpu.record import Record
from dsnet.bench.cases import CASES

ROOT = Path(__file__).resolve().parents[1]


def test_a_plan_with_too_many_rows_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "variants", lambda function: None)
    monkeypatch.setattr(ops, "MOST_ROWS", 10)
    problem = ops._count(Context(tmp_path / "result.json", dry_run=True))
    assert re.fullmatch(r"rows of operations: expected 1 to 10, got \d+", problem)


@pytest.mark.parametrize("lost", [1, 128])
def test_a_plan_of_networks_without_a_wanted_batch_fails(lost, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "variants", lambda function: None)
    assert models._count(Context(tmp_path / "result.json", dry_run=True)) is None
    tuned = tuple(plan for plan in models.PLANS if plan.batch != lost)
    monkeypatch.setattr(models, "PLANS", tuned)
    problem = models._count(Context(tmp_path / "result.json", dry_run=True))
    assert "rows at batch 1 and 128: expected 2 to 2, got 1" in problem
    assert "rows at batch 1 and 128 against max-autotune: expected 2 to 2, got 1" in problem


def test_elements_drawn_are_those_of_the_arguments():
    plan = ops.Plan(2, size=(32, 32), stages=(1,))
    expected = sum(
        value.numel()
        for case, stage in plan.places()
        for value in case.tensors(stage, torch.bfloat16, 0).values()
    )
    assert ops.elements_drawn((plan,)) == expected


def test_triton_variants_are_compiled_once_by_all_processes_together(tmp_path):
    """In a process of its own, with an empty cache on disk and two compilers."""
    pytest.importorskip("triton")
    code = """
import os, pathlib
from benchmarks.gpu import warm_up
from tests_of_warm_up import depthwise

if __name__ == "__main__":
    print(warm_up.variants(depthwise), warm_up.fill_cache(depthwise, (9, 0), 2))
    found = pathlib.Path(os.environ["TRITON_CACHE_DIR"]).rglob("depthwise*.cubin")
    print(len(list(found)))
"""
    (tmp_path / "tests_of_warm_up.py").write_text(
        "import torch, dsnet_kernels\n"
        "def depthwise():\n"
        "    for channels in (64, 17):\n"
        "        x = torch.zeros(2, channels, 8, 8).to(memory_format=torch.channels_last)\n"
        "        weight = torch.zeros(channels, 1, 3, 3)\n"
        "        dsnet_kernels.depthwise_conv3x3(x, weight, torch.zeros(channels))\n"
    )
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env=os.environ
        | {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2", "2"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """A dry run of every phase."""
    folder = tmp_path_factory.mktemp("gpu")
    arguments = ["--out", str(folder), "--dry-run", "--commit", "abc"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, Record.from_json((folder / "record.json").read_text("utf-8"))


def test_dry_run_passes_every_phase_and_leaves_eight_files(dry):
    folder, found = dry
    assert [phase.name for phase in found.phases] == list(LIMITS)
    assert all(phase.status == "passed" for phase in found.phases)
    logs = {f"{name}.log" for name in LIMITS}
    assert {path.name for path in folder.iterdir()} == {"record.json", "summary.md", *logs}


def test_dry_run_says_so_and_where_it_ran(dry):
    folder, found = dry
    assert found.dry_run
    assert found.gpu is None
    assert found.commit == "abc"
    assert found.versions["torch"] == torch.__version__
    assert found.native_sources == record.native_sources()
    assert found.machine["cores"] >= 1
    text = (folder / "summary.md").read_text("utf-8")
    assert text.startswith("# Dry run")
    assert not re.search(r"\d (µs|ms)\b|TB/s|\d×\s*\|", text)


def test_dry_run_counts_the_work_of_every_phase_within_bounds(dry):
    folder, found = dry
    counts = {
        (phase.name, count["name"]): count
        for phase in found.phases
        for count in phase.results.get("counts", ())
    }
    expected = {
        *(("models", name) for name in ("rows of networks", "training steps")),
        *(("ops", name) for name in ("rows of operations", "elements drawn on the GPU")),
        *(("tests", name) for name in ("tests", "tests of the smoke subset")),
        ("sanitizer", "calls of small inputs"),
    }
    assert expected <= counts.keys()
    for phase in ("models", "ops", "sanitizer"):
        # Triton is not everywhere; where it is, its compilations are counted.
        is_counted = (phase, "Triton variants") in counts
        assert is_counted == (found.versions["triton"] is not None)
    for count in counts.values():
        assert count["least"] <= count["value"] <= count["most"]
    text = (folder / "summary.md").read_text("utf-8")
    assert "Work that a GPU would be given" in text


def test_dry_run_checks_every_contender_of_the_operations(dry):
    rows = tables.rows_of(dry[1].phase("ops").results)
    works = {f"{work}, CUDA graph" for work in ("forward", "backward")}
    assert {row.work for row in rows} == works | {"forward", "forward, 50 calls per graph"}
    graphs = [row for row in rows if row.work in works]
    assert len(graphs) == len(CASES) * 2 * 2
    for found in rows:
        assert found.result("native").median > 0
        assert found.result("copy").median > 0
        assert all(result.problem is None for result in found.results)
        assert len(found.ours()) == 1
    assert {found.judged for found in graphs} == {8}


def test_dry_run_counts_bytes_of_the_backward_alone(dry):
    rows = {
        (row["work"], row["stage"]): row
        for row in dry[1].phase("ops").results["rows"]
        if row["use"].startswith("local")
    }
    forward, backward = (rows[f"{work}, CUDA graph", 1] for work in ("forward", "backward"))
    assert 2 * backward["bytes"] == 3 * forward["bytes"]


def test_dry_run_times_the_networks_plain_and_as_graphs(dry):
    rows = tables.rows_of(dry[1].phase("models").results)
    assert [row.work for row in rows] == ["inference", "training", "inference"]
    names = [result.name for result in rows[0].results]
    assert {"eager_amp", "sdpa", "auto", "auto, CUDA graph"} <= set(names)
    # Two images of 32×32 pixels are too few for a baseline under autocast in training.
    assert not any(result.problem for row in rows for result in row.results if row.judged)
    assert not any(result.problem for row in rows for result in row.ours())


def test_dry_run_shows_the_sanitizers_commands_and_collects_the_tests(dry):
    folder, found = dry
    log = (folder / "sanitizer.log").read_text()
    for backend, tool in sanitizer.RUNS:
        assert re.search(rf"^compute-sanitizer --tool {tool} .* cuda {backend}$", log, re.MULTILINE)
        status = found.phase("sanitizer").results["tools"][f"{backend} {tool}"]
        assert status == {"status": "not run"}
    counts = {count["name"]: count["value"] for count in found.phase("tests").results["counts"]}
    # Both backends of a GPU are under test.
    assert counts["tests"] > 500
    assert 0 < counts["tests of the smoke subset"] < counts["tests"] / 5

"""``python -m benchmarks.gpu``: phases, limits, record; end to end as a dry run."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import build, clock, phases, record, sanitizer, summary, tests
from benchmarks.gpu.phases import LIMITS, Phase, run_phase
from benchmarks.gpu.program import Context, MissingError
from benchmarks.gpu.record import Record
from dsnet.bench.cases import CASES

ROOT = Path(__file__).resolve().parents[1]

PASSES = """
import json, pathlib
text = json.dumps({"status": "passed", "detail": None, "results": {"answer": 42}})
pathlib.Path(RESULT).write_text(text)
"""
DIES = "print('last words'); raise SystemExit(3)"
HANGS = """
import json, pathlib, subprocess, sys, time
pathlib.Path(RESULT).write_text(json.dumps({"results": {"half": 1}}))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(RESULT + ".child").write_text(str(child.pid))
time.sleep(60)
"""


def scripted(scripts):
    """A phase's command from the script of its name; those without one pass."""

    def make(name, result, dry_run):
        script = scripts.get(name, PASSES).replace("RESULT", repr(str(result)))
        return [sys.executable, "-c", script]

    return make


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command with scripted phases; returns exit status and record."""

    def run(scripts, *arguments):
        patched = partial(run_phase, command=scripted(scripts))
        monkeypatch.setattr(command, "run_phase", patched)
        status = command.main(["--out", str(tmp_path / "out"), "--dry-run", *arguments])
        return status, Record.from_json((tmp_path / "out" / "record.json").read_text("utf-8"))

    return run


def test_a_failing_phase_stops_no_later_one(run):
    status, found = run({"build": DIES, "roofs": "raise RuntimeError"})
    assert status == 1
    statuses = {phase.name: phase.status for phase in found.phases}
    assert list(statuses) == list(LIMITS)
    failed = [name for name, status in statuses.items() if status == "failed"]
    assert failed == ["build", "roofs"]
    assert found.phase("build").detail == (
        "the phase ended with exit status 3 before it told its own"
    )
    assert found.phase("ops").results == {"answer": 42}


def test_output_of_a_phase_is_in_its_log(run, tmp_path):
    _, found = run({"build": DIES}, "--phases", "build")
    log = tmp_path / "out" / found.phase("build").log
    assert log.read_text() == "last words\n"


def test_a_phase_over_its_limit_is_ended_with_its_children_and_keeps_its_results(tmp_path):
    phase = run_phase(
        "ops", tmp_path, tmp_path, limit=4, dry_run=True, command=scripted({"ops": HANGS})
    )
    assert (phase.status, phase.detail) == ("timeout", "ended after its limit of 4 s")
    assert phase.results == {"half": 1}
    assert phase.seconds < 4 + 2 * phases.GRACE
    child = Path(f"/proc/{(tmp_path / 'ops.json.child').read_text()}/stat")
    # Gone, or a zombie that nobody has waited for.
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_limit_comes_from_the_command_line(run):
    _, found = run({"ops": HANGS}, "--phases", "ops,roofs", "--limit", "ops=1")
    assert [(p.name, p.status, p.limit) for p in found.phases] == [
        ("roofs", "passed", LIMITS["roofs"]),
        ("ops", "timeout", 1.0),
    ]


def test_all_phases_fit_in_ten_minutes():
    assert sum(LIMITS.values()) <= 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phases", "build,fly"], "argument --phases: expected build, tests, .* got 'fly'"),
        (["--limit", "ops"], "argument --limit: expected PHASE=SECONDS .* got 'ops'"),
        (["--limit", "ops=-1"], "argument --limit: expected PHASE=SECONDS .* got 'ops=-1'"),
        (["--limit", "fly=1"], "argument --limit: expected PHASE=SECONDS .* got 'fly=1'"),
        (["--out", "/dev/null/x"], "--out: cannot make the folder /dev/null/x: Not a directory"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path), "--dry-run", *arguments])
    assert re.search(message, capsys.readouterr().err)


def test_without_a_gpu_only_a_dry_run_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_sees_gpu", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path / "out")])
    assert "nvidia-smi shows no GPU; --dry-run goes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


PHASE = Phase("roofs", "passed", 1.0, 20, "roofs.log", None, {"copy_bytes_per_second": 4e12})
RECORD = Record(
    dry_run=False,
    machine={"cpu": "a CPU"},
    gpu={"name": "a GPU", "driver": "1.2"},
    versions={"torch": "2.13.0", "triton": None},
    commit="abc",
    native_sources="0" * 64,
    date="2026-01-01T00:00:00+00:00",
    command="python -m benchmarks.gpu --out x",
    seconds=1.0,
    phases=(PHASE,),
)


def test_record_is_read_as_it_is_written():
    assert Record.from_json(RECORD.to_json()) == RECORD


@pytest.mark.parametrize("change", [{"version": 2}, {"schema": "dsnet-bench"}])
def test_foreign_record_is_refused(change):
    text = json.dumps(dataclasses.asdict(RECORD) | change)
    with pytest.raises(ValueError, match="record: expected dsnet-gpu version 1, got"):
        Record.from_json(text)


def test_digest_tells_of_changed_and_renamed_sources(tmp_path):
    source = tmp_path / "csrc" / "cuda" / "a.cuh"
    source.parent.mkdir(parents=True)
    digests = set()
    for text in ("one", "two"):
        source.write_text(text)
        digests.add(record.native_sources(tmp_path))
    source.rename(source.with_name("b.cuh"))
    digests.add(record.native_sources(tmp_path))
    assert len(digests) == 3
    (tmp_path / "csrc" / "cpu.cpp").write_text("not for a GPU")
    assert record.native_sources(tmp_path) in digests


def test_sanitizer_asks_each_tool_for_an_exit_status_of_its_own():
    found = sanitizer.commands(["python", "script"])
    assert list(found) == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert found["racecheck"] == [
        *("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "86"),
        *("--print-limit", "20", "python", "script"),
    ]


@pytest.mark.parametrize(
    ("code", "output", "status", "errors"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "passed", 0),
        (0, "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed", 0),
        (86, "========= ERROR SUMMARY: 3 errors", "failed", 3),
        (0, "RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", "failed", 2),
        (0, "", "exit status 0, no summary", None),
        (1, "Device not supported", "exit status 1, no summary", None),
    ],
)
def test_sanitizer_passes_only_with_its_own_word(code, output, status, errors):
    assert sanitizer.verdict(code, output) == {"status": status, "errors": errors}


def test_missing_sanitizer_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    monkeypatch.setattr(sanitizer.subprocess, "run", lambda *args, **kwargs: None)
    with pytest.raises(MissingError, match="compute-sanitizer: expected on PATH"):
        sanitizer.run(Context(tmp_path / "result.json", dry_run=False))


def test_build_names_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.nvcc, "find_nvcc", lambda: None)
    with pytest.raises(MissingError, match=r"needs setuptools, pybind11, .*nvcc, not found here"):
        build.run(Context(tmp_path / "result.json", dry_run=False))


@pytest.mark.parametrize(
    ("code", "counts", "problem"),
    [
        (0, {"passed": 3, "failed": 0, "skipped": 1}, None),
        (0, {"passed": 0, "failed": 0, "skipped": 4}, "every test was skipped"),
        (1, {"passed": 3, "failed": 2, "skipped": 0}, "pytest ended with status 1, 2 tests failed"),
        (5, {}, "pytest ended with status 5, 0 tests failed"),
    ],
)
def test_skipped_tests_prove_nothing(code, counts, problem):
    assert tests.problem(code, counts, dry_run=False) == problem


def test_junit_outcomes_are_counted(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        "<testsuites><testsuite><testcase/><testcase><failure/><error/></testcase>"
        "<testcase><skipped/></testcase><testcase/></testsuite></testsuites>"
    )
    assert tests.counted(report) == {"passed": 2, "failed": 1, "skipped": 1}


def test_timer_counts_the_call_and_not_what_empties_the_caches():
    timings = clock.timer("cpu")({"a": lambda: None, "b": lambda: time.sleep(2e-3)}, budget=0)
    assert timings["b"].median >= 2e-3 > timings["a"].median
    assert len(timings["a"].seconds) == 3


def row(problem=None, work="forward"):
    results = [
        {"name": "eager_nchw", "role": "baseline", "median": 3e-5, "quartiles": [3e-5, 3e-5]},
        {"name": "cuda", "role": "ours", "error": 0.5, "problem": problem},
    ]
    if problem is None:
        results[1] |= {"median": 1e-5, "quartiles": [9e-6, 1.1e-5], "ratio": 3.0}
    return {
        "kind": "op",
        "subject": "depthwise_conv3x3",
        "use": "local: x",
        "work": work,
        "stage": 1,
        "shape": [256, 32, 56, 56],
        "dtype": "bfloat16",
        "flops": 1,
        "bytes": 30_000_000,
        "best": "eager_nchw",
        "results": results,
    }


def with_rows(*rows, **changes):
    ops = Phase("ops", "passed", 1.0, 180, "ops.log", None, {"rows": list(rows)})
    return dataclasses.replace(RECORD, phases=(PHASE_WITH_MATRIX, ops), **changes)


PHASE_WITH_MATRIX = dataclasses.replace(
    PHASE, results={"copy_bytes_per_second": 4e12, "matrix_flops_per_second": 8e14}
)


def test_summary_gives_time_speed_up_and_share_of_the_copy_bandwidth():
    text = summary.render(with_rows(row()))
    assert "Copy 4.00 TB/s, bf16 matrix product 800 TFLOP/s." in text
    assert "| cuda | 10.0 ± 1.0 µs | 3.00× | 75% | 0.50 |" in text
    assert "| local, 1 | 256×32×56×56 | 30.0 ± 0.0 µs |" in text
    assert "torch 2.13.0" in text
    assert "triton" not in text


def test_summary_shows_no_speed_up_where_the_check_failed():
    text = summary.render(with_rows(row("check failed: out")))
    assert "| cuda | failed | – | – | check failed: out |" in text


def test_dry_summary_shows_no_time():
    text = summary.render(with_rows(row(), dry_run=True, gpu=None))
    assert text.startswith("# Dry run: no GPU was used and nothing was measured\n")
    assert "| local, 1 | 256×32×56×56 | – | cuda | – | – | – | 0.50 |" in text
    assert "TB/s" not in text


@pytest.mark.gpu
def test_replayed_graph_computes_anew():
    x = torch.ones(4, device="cuda")
    replay = clock.captured(lambda: x * 2, "cuda")
    x.fill_(3)
    assert torch.equal(replay().cpu(), torch.full((4,), 6.0))


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
        timeout=300,
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
    assert not re.search(r"\d (µs|ms)\b|TB/s|×\s*\|", text)


def test_dry_run_checks_every_contender_call_by_call_and_as_a_graph(dry):
    rows = [summary.row_of(fields) for fields in dry[1].phase("ops").results["rows"]]
    works = {"forward", "backward", "forward, CUDA graph", "backward, CUDA graph"}
    assert {row.work for row in rows} == works
    assert len(rows) == len(CASES) * 4 * len(works)
    for found in rows:
        assert found.result("native").median > 0
        assert found.result("copy").median > 0
        assert all(result.problem is None for result in found.results)
        assert len(found.ours()) == 1
    compiled = [found for found in rows if found.result("compile")]
    assert {found.use.split(":")[0] for found in compiled} == {"local"}


def test_dry_run_counts_bytes_of_the_backward_alone(dry):
    rows = {
        (row["work"], row["stage"]): row
        for row in dry[1].phase("ops").results["rows"]
        if row["use"].startswith("local")
    }
    assert 2 * rows["backward", 1]["bytes"] == 3 * rows["forward", 1]["bytes"]


def test_dry_run_times_the_networks_and_counts_no_launches(dry):
    results = dry[1].phase("models").results
    assert [row["work"] for row in results["rows"]] == ["inference", "training"]
    names = [result["name"] for result in results["rows"][0]["results"]]
    assert names[-2:] == ["eager_channels_last, CUDA graph", "auto, CUDA graph"]
    counts = {"eager_nchw": None, "eager_channels_last": None, "auto": None}
    assert results["launches"] == {"inference": counts, "training": counts}


def test_dry_run_shows_the_sanitizers_commands_and_collects_the_tests(dry):
    folder, found = dry
    log = (folder / "sanitizer.log").read_text()
    for tool in sanitizer.TOOLS:
        command = f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool}"
        assert command in log
        assert found.phase("sanitizer").results["tools"][tool] == {"status": "not run"}
    assert re.search(r"^\d+ calls forward and backward on cpu$", log, re.MULTILINE)
    assert found.phase("tests").results == {"gpu": {"exit_status": 0}}
    collected = (folder / "tests.log").read_text()
    assert "test_replayed_graph_computes_anew" in collected
    for backend in ("cuda", "triton"):
        assert f"test_follows_the_current_stream[depthwise_conv3x3-{backend}]" in collected

"""``python -m benchmarks.gpu``: phases, limits, record; end to end as a dry run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    build,
    devices,
    models,
    ops,
    phases,
    record,
    rows,
    sanitizer,
    summary,
    tables,
    tests,
)
from benchmarks.gpu.counts import Count
from benchmarks.gpu.journal import counted
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

    def make(name, result, dry_run, limit):
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
        "the phase ended with exit status 3 before it wrote a verdict"
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


ASKS = """
import json, pathlib, signal, time
try:
    pathlib.Path(RESULT).write_text(json.dumps({"results": {"half": 1}}))
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(RESULT).write_text(json.dumps({"results": {"last": 2}}))
"""


def test_a_phase_is_interrupted_before_it_is_ended(tmp_path):
    """An interrupt lets it write its results; the request to end does not."""
    phase = run_phase(
        "ops", tmp_path, tmp_path, limit=3, dry_run=True, command=scripted({"ops": ASKS})
    )
    assert (phase.status, phase.results) == ("timeout", {"last": 2})


SLOW = """
import json, pathlib, time
for i in range(3):
    text = json.dumps({"results": {"rows": i}})
    pathlib.Path(RESULT + ".new").write_text(text)
    pathlib.Path(RESULT + ".new").rename(RESULT)
    time.sleep(2 * PATIENCE)
"""


def test_the_record_follows_a_running_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "POLL", 0.05)
    seen = []
    script = SLOW.replace("PATIENCE", "0.2")
    run_phase(
        "ops",
        tmp_path,
        tmp_path,
        limit=30,
        dry_run=True,
        command=scripted({"ops": script}),
        progress=seen.append,
    )
    assert {phase.status for phase in seen} == {"running"}
    assert [phase.results["rows"] for phase in seen] == [0, 1, 2]


def test_a_running_phase_is_in_the_record(run, tmp_path, monkeypatch):
    monkeypatch.setattr(phases, "POLL", 0.05)
    written = []
    write = command.write_atomically

    def spy(path, text):
        write(path, text)
        if path.name == "record.json":
            written.append([(p.name, p.status) for p in Record.from_json(text).phases])

    monkeypatch.setattr(command, "write_atomically", spy)
    run({"roofs": SLOW.replace("PATIENCE", "0.2")}, "--phases", "roofs")
    assert [("roofs", "running")] in written


def test_limit_comes_from_the_command_line(run):
    _, found = run({"ops": HANGS}, "--phases", "ops,roofs", "--limit", "ops=1")
    assert [(p.name, p.status, p.limit) for p in found.phases] == [
        ("roofs", "passed", LIMITS["roofs"]),
        ("ops", "timeout", 1.0),
    ]


def test_the_budget_shortens_later_phases_and_starts_none_without_time(run):
    budget = phases.GRACE + phases.SHORTEST + 4
    start = time.monotonic()
    status, found = run({"build": HANGS}, "--budget", str(budget))
    assert time.monotonic() - start < budget + 5
    assert status == 1
    build, *others = found.phases
    assert (build.status, build.limit) == ("timeout", pytest.approx(budget - phases.GRACE, abs=1))
    assert {phase.status for phase in others} == {"not started"}
    assert others[0].detail == f"{budget:g} s are over"


def test_three_commands_do_everything_in_ten_minutes_each():
    assert [name for names in phases.COMMANDS for name in names] == list(LIMITS)
    assert phases.BUDGET < 600
    for names in phases.COMMANDS:
        # The last one is shortened at most a little.
        assert sum(LIMITS[name] for name in names[:-1]) + 200 <= phases.BUDGET


def test_the_command_itself_needs_no_torch():
    code = (
        "import sys, benchmarks.gpu.__main__, benchmarks.gpu.program, benchmarks.gpu.build,"
        " benchmarks.gpu.tests, benchmarks.gpu.sanitizer; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phases", "build,fly"], "argument --phases: expected build, roofs, .* got 'fly'"),
        (["--limit", "ops"], "argument --limit: expected PHASE=SECONDS .* got 'ops'"),
        (["--limit", "ops=-1"], "argument --limit: expected PHASE=SECONDS .* got 'ops=-1'"),
        (["--limit", "fly=1"], "argument --limit: expected PHASE=SECONDS .* got 'fly=1'"),
        (["--budget", "0"], "argument --budget: expected seconds such as 570, got '0'"),
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


ROOFS = [
    {"name": "copy", "dtype": "float32", "work": 4, "median": 1e-12, "quartiles": [1e-12, 1e-12]},
    {"name": "product", "dtype": "bfloat16", "work": 8, "median": 1e-14, "quartiles": [0, 0]},
]
PHASE = Phase("roofs", "passed", 1.0, 20, "roofs.log", None, {"roofs": ROOFS})
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


@pytest.mark.parametrize("change", [{"version": 1}, {"schema": "dsnet-bench"}])
def test_foreign_record_is_refused(change):
    text = json.dumps(dataclasses.asdict(RECORD) | change)
    with pytest.raises(ValueError, match="record: expected dsnet-gpu version 2, got"):
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
    assert sanitizer.command("racecheck", ["python", "script"]) == [
        *("compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "86"),
        *("--print-limit", "20", "python", "script"),
    ]


def test_sanitizer_finds_races_of_cuda_first_and_runs_every_tool_on_every_backend():
    assert sanitizer.RUNS[:2] == (("cuda", "racecheck"), ("cuda", "synccheck"))
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    assert set(sanitizer.RUNS) == {(b, t) for b in ("cuda", "triton") for t in tools}


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


def python(code):
    return [sys.executable, "-u", "-c", code]


def test_a_tool_is_interrupted_at_its_limit_and_its_output_kept(capsys):
    code = "import time; print('ERROR SUMMARY: 0 errors'); time.sleep(60)"
    found = sanitizer._streamed(python(code), 2)
    assert (found["status"], found["errors"]) == ("timeout", 0)
    assert found["seconds"] < 2 + 2 * sanitizer.ENDING
    assert "ERROR SUMMARY: 0 errors" in capsys.readouterr().out


def test_errors_count_also_of_a_tool_that_did_not_finish():
    code = "import time; print('ERROR SUMMARY: 3 errors'); time.sleep(60)"
    assert sanitizer._streamed(python(code), 2)["status"] == "failed"


def test_a_backend_that_fails_without_a_tool_is_given_to_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        sanitizer, "script", lambda backend: python("raise SystemExit(backend != 'cuda')")
    )
    plain = {"cuda": 0, "triton": 3}
    monkeypatch.setattr(
        sanitizer, "script", lambda backend: python(f"raise SystemExit({plain[backend]})")
    )
    monkeypatch.setattr(
        sanitizer, "command", lambda tool, script: python("print('ERROR SUMMARY: 0 errors')")
    )
    monkeypatch.setattr("benchmarks.gpu.warm_up.fill_cache", lambda function: 0)
    context = Context(tmp_path / "result.json", dry_run=False, limit=100)
    assert sanitizer.run(context) == "plain triton: exit status 3"
    cuda = {f"cuda {tool}" for backend, tool in sanitizer.RUNS if backend == "cuda"}
    assert context.results["tools"].keys() == cuda
    assert {tool["status"] for tool in context.results["tools"].values()} == {"passed"}


def test_missing_sanitizer_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: None)
    with pytest.raises(MissingError, match="compute-sanitizer: expected on PATH"):
        sanitizer.run(Context(tmp_path / "result.json", dry_run=False))


def test_build_names_what_it_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_version", lambda name: None)
    monkeypatch.setattr(build.nvcc, "find_nvcc", lambda: None)
    with pytest.raises(MissingError, match=r"needs setuptools, not found here, .*nvcc, not found"):
        build.run(Context(tmp_path / "result.json", dry_run=False))


def test_build_names_what_is_too_old(monkeypatch):
    versions = {"setuptools": "65.5.0", "pybind11": "2.12", "cmake": "3.28.3", "ninja": "1.11"}
    monkeypatch.setattr(build, "_version", versions.get)
    monkeypatch.setattr(build.nvcc, "find_nvcc", lambda: "nvcc")
    assert build.lacking() == ["setuptools >= 77, found 65.5.0"]


@pytest.mark.parametrize("failing", ["cpu", "cuda"])
def test_build_installs_the_cpu_library_first_whatever_becomes_of_cuda(
    failing, tmp_path, monkeypatch
):
    steps = []

    def step(command, env=None, **kwargs):
        if env is None:
            info = {"build": {}, "libraries": {"cpu": None, "cuda": "not built"}, "operations": {}}
            return subprocess.CompletedProcess(command, 0, json.dumps(info))
        steps.append(env["DSNET_CUDA"])
        assert env["MAX_JOBS"] == str(os.cpu_count())
        name = "cuda" if env["DSNET_CUDA"] == "1" else "cpu"
        return subprocess.CompletedProcess(command, int(name == failing))

    monkeypatch.setattr(build, "lacking", list)
    monkeypatch.setattr(build.subprocess, "run", step)
    context = Context(tmp_path / "result.json", dry_run=False)
    problem = build.run(context)
    assert steps == ["0", "1"]
    assert problem == f"the {failing} step ended with exit status 1; cuda: not built"
    assert context.results["steps"][failing]["exit_status"] == 1


@pytest.mark.parametrize(
    ("code", "counts", "problem"),
    [
        (0, {"passed": 3, "failed": 0}, None),
        (0, {"passed": 0, "failed": 0}, "every test was skipped"),
        (1, {"passed": 3, "failed": 2}, "pytest ended with status 1, 2 tests failed"),
        (5, {"passed": 0, "failed": 0}, "pytest ended with status 5, 0 tests failed"),
        (
            None,
            {"passed": 3, "failed": 1},
            "pytest was ended at its limit, 3 tests passed, 1 failed",
        ),
    ],
)
def test_skipped_tests_prove_nothing(code, counts, problem):
    assert tests.problem(code, counts) == problem


def test_outcomes_of_a_journal_are_counted_once_per_test():
    lines = [
        {"test": "a", "outcome": "passed"},
        {"test": "b", "outcome": "failed"},
        {"test": "c", "outcome": "skipped"},
        {"test": "d", "outcome": "passed"},
        {"test": "d", "outcome": "failed"},
    ]
    found = counted(map(json.dumps, lines))
    assert found == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["b", "d"]}


INTERRUPTED = """
import time
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2, "last words"

def test_hangs_in_compile():
    time.sleep(60)

def test_another():
    pass
"""


@pytest.mark.parametrize(("workers", "limit"), [((), 5), (("-n", "2"), 8)], ids=["serial", "xdist"])
def test_tests_that_ran_count_after_an_interrupt(workers, limit, tmp_path, monkeypatch, capfd):
    """One file cannot be imported, one test hangs: all others are in the journal."""
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(INTERRUPTED.replace("test_", "test_gpu_"))
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: x")
    options = [option for option in tests.OPTIONS if option not in ("-m", "gpu")]
    journal = tmp_path / "journal.jsonl"
    monkeypatch.setattr(tests, "OPTIONS", ["-p", "no:randomly", *options])
    arguments = [str(tmp_path), "--rootdir", str(tmp_path), *workers, "--journal", str(journal)]
    assert tests._pytest(arguments, limit) is None
    found = counted(journal.read_text().splitlines())
    assert (found["passed"], found["failed"]) == (2, 2)
    assert {name.rpartition("/")[2] for name in found["failures"]} == {
        "test_broken.py",
        "test_some.py::test_gpu_fails",
    }
    assert "last words" in capfd.readouterr().out


def test_the_smoke_subset_runs_first_and_leaves_time_for_the_others(tmp_path, monkeypatch):
    limits = []

    def pytest_(arguments, limit):
        limits.append(limit)
        Path(arguments[arguments.index("--journal") + 1]).write_text(
            json.dumps({"test": "a", "outcome": "passed"})
        )
        return 0 if len(limits) > 1 else None

    monkeypatch.setattr(tests, "_pytest", pytest_)
    context = Context(tmp_path / "tests.json", dry_run=False, limit=300)
    problem = tests.run(context)
    assert problem == "smoke: pytest was ended at its limit, 1 tests passed, 0 failed"
    assert list(context.results) == ["smoke", "others"]
    assert limits == [pytest.approx(150, abs=5), pytest.approx(300 - tests.ENDING, abs=5)]


@pytest.mark.parametrize(("value", "in_bounds"), [(0, False), (1, True), (3, True), (4, False)])
def test_counts_out_of_bounds_fail_the_phase(value, in_bounds, tmp_path):
    context = Context(tmp_path / "result.json", dry_run=True)
    problem = context.count(Count("rows", value, most=3, least=1))
    assert (problem is None) == in_bounds
    assert context.results["counts"][0]["value"] == value
    if not in_bounds:
        assert problem == f"rows: expected 1 to 3, got {value}"


def test_a_row_without_time_is_named(tmp_path):
    def never(until):
        raise AssertionError

    context = Context(tmp_path / "result.json", dry_run=False, limit=rows.MARGIN / 2)
    tasks = [rows.Task("one", never), rows.Task("two", never)]
    assert rows.take(context, tasks) == "no time was left for 2 rows"
    assert context.results["missing"] == ["one", "two"]


def test_a_call_of_many_is_timed_less_the_launch_of_its_graph():
    device = devices.stand_in()
    replays = []

    def captured(call, calls=1):
        def replay():
            replays.append(calls)
            time.sleep(1e-3 + calls * 4e-4)

        return replay

    device = devices.many_calls(dataclasses.replace(device, capture=captured))
    call = device.capture(lambda: None)
    found = device.cold_timer({("ours", "a"): call, ("roof", "copy"): lambda: None}, budget=0)
    assert found.keys() == {("ours", "a"), ("roof", "copy")}
    # 50 sleeps of 0.4 ms over that of one, and the sleeps' own overhead.
    assert all(3.5e-4 < timing.median < 8e-4 for timing in found.values())
    assert set(replays) == {1, devices.CALLS}


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
    results = {"rows": list(rows), "roofs": ROOFS, "missing": ["a row"]}
    ops = Phase("ops", "passed", 1.0, 180, "ops.log", None, results)
    return dataclasses.replace(RECORD, phases=(PHASE, ops), **changes)


def test_summary_has_the_tables_of_the_bench_and_names_rows_without_time():
    text = summary.render(with_rows(row()))
    assert "- copy float32: 4.00 TB/s" in text
    assert "### depthwise_conv3x3, bfloat16, forward" in text
    assert re.search(r"\| 256×32×56×56 \| fwd \|.* \\~3\.00× ", text)
    assert "No time was left for 1 rows: a row." in text
    assert "torch 2.13.0" in text
    assert "triton" not in text


def test_summary_shows_no_speed_up_where_the_check_failed():
    text = summary.render(with_rows(row("check failed: out")))
    assert "×**" not in text
    assert "| FAILED |" in text
    assert "ours cuda, stage 1, forward: check failed: out" in text


def test_summary_of_networks_has_images_per_second_and_launches():
    results = [
        {"name": "eager_amp", "role": "baseline", "median": 2e-3, "quartiles": [2e-3, 2e-3]},
        {"name": "auto, CUDA graph", "role": "ours", "median": 1e-3, "quartiles": [1e-3, 1e-3]},
    ]
    results[1] |= {"launches": 194, "ratio": 2.0, "error": 0.5}
    model = row() | {"kind": "model", "subject": "dsnet_tiny", "work": "inference", "stage": 0}
    model |= {"shape": [128, 3, 224, 224], "best": "eager_amp", "results": results}
    text = tables.render("models", {"rows": [model]})
    assert "| inference | bfloat16 | 128 | auto, CUDA graph | 1.00 ±0% ms | 128000 | 194 |" in text
    assert "| eager AMP | 2.00 ±0% ms | 64000 | - | - |" in text


def test_dry_summary_shows_counts_and_no_time():
    count = {"name": "rows", "value": 308, "most": 1320, "least": 1}
    found = with_rows(row(), dry_run=True, gpu=None)
    phase = found.phases[1]
    counted = dataclasses.replace(phase, results=phase.results | {"counts": [count]})
    text = summary.render(dataclasses.replace(found, phases=(PHASE, counted)))
    assert text.startswith("# Dry run: no GPU was used and nothing was measured\n")
    assert "| ops | rows | 308 | 1 | 1,320 |" in text
    assert "| depthwise_conv3x3 forward | 1 | 256×32×56×56 | bfloat16 | eager_nchw, cuda |" in text
    assert not re.search(r"TB/s|\d ms|\d×\s*\|", text)


@pytest.mark.gpu
def test_replayed_graph_computes_anew():
    x = torch.ones(4, device="cuda")
    replay = devices.find("cuda").capture(lambda: x * 2)
    x.fill_(3)
    assert torch.equal(replay().cpu(), torch.full((4,), 6.0))


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
    assert len(graphs) == len(CASES) * 4 * 2
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
    assert not any(result.problem for row in rows for result in row.results)


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

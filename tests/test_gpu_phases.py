"""The phases of ``python -m benchmarks.gpu``: build, tests, sanitizers, rows, tables."""

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
from gpu_records import PHASE, ROOFS, row, with_rows

from benchmarks.gpu import build, devices, rows, sanitizer, summary, tables, tests, warm_up
from benchmarks.gpu.counts import Count
from benchmarks.gpu.journal import counted
from benchmarks.gpu.program import Context, MissingError


def test_sanitizer_asks_each_tool_for_an_exit_status_of_its_own():
    assert sanitizer.command("/bin/tool", "racecheck", ["python", "script"]) == [
        *("/bin/tool", "--tool", "racecheck", "--error-exitcode", "86"),
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


def test_a_script_ends_with_its_tool(tmp_path):
    """A tool that ignores interrupts, with a child that holds its output open."""
    code = f"""
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
time.sleep(60)
"""
    found = sanitizer._streamed(python(code), 2)
    assert (found["status"], found["exit_status"]) == ("timeout", -9)
    assert found["seconds"] < 2 + sanitizer.ENDING + 3
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    # Gone, or a zombie that nobody has waited for.
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_errors_count_also_of_a_tool_that_did_not_finish():
    code = "import time; print('ERROR SUMMARY: 3 errors'); time.sleep(60)"
    assert sanitizer._streamed(python(code), 2)["status"] == "failed"


def test_a_backend_that_fails_without_a_tool_is_given_to_none(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: "/bin/tool")
    plain = {"cuda": 0, "triton": 3}
    monkeypatch.setattr(
        sanitizer, "script", lambda backend: python(f"raise SystemExit({plain[backend]})")
    )
    monkeypatch.setattr(
        sanitizer, "command", lambda path, tool, script: python("print('ERROR SUMMARY: 0 errors')")
    )
    monkeypatch.setattr("benchmarks.gpu.warm_up.fill_cache", lambda function: 0)
    context = Context(tmp_path / "result.json", dry_run=False, limit=100)
    assert sanitizer.run(context) == "plain triton: exit status 3"
    cuda = {f"cuda {tool}" for backend, tool in sanitizer.RUNS if backend == "cuda"}
    assert context.results["tools"].keys() == cuda
    assert {tool["status"] for tool in context.results["tools"].values()} == {"passed"}


def test_the_sanitizer_is_found_in_the_toolkit_too(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitizer.find_sanitizer() == str(tool)


def test_a_cache_that_cannot_be_filled_is_told_and_stops_nothing(monkeypatch, capsys):
    def fails(function):
        raise RuntimeError("ptxas refused a variant")

    monkeypatch.setattr(warm_up, "fill_cache", fails)
    warm_up.warm_up(sanitizer.small_inputs_on_triton)
    printed = capsys.readouterr()
    assert "Triton's cache is not filled" in printed.out
    assert "ptxas refused a variant" in printed.err


def test_missing_sanitizer_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: None)
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

    monkeypatch.setattr(build, "_architectures", lambda context: {})

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


def test_a_phase_that_ends_within_a_row_has_named_what_is_left(tmp_path):
    def fails(until):
        raise ValueError("too much")

    def interrupted(until):
        raise KeyboardInterrupt

    context = Context(tmp_path / "result.json", dry_run=False, limit=100)
    tasks = [rows.Task("one", fails), rows.Task("two", interrupted), rows.Task("three", fails)]
    with pytest.raises(KeyboardInterrupt):
        rows.take(context, tasks)
    written = json.loads((tmp_path / "result.json").read_text("utf-8"))["results"]
    assert written["missing"] == ["two", "three"]
    assert written["failures"] == ["one: ValueError: too much"]


def test_a_row_that_raises_stops_no_later_one(tmp_path):
    def raises(until):
        raise ValueError("too much\nof it")

    found = tables.row_of(row())
    context = Context(tmp_path / "result.json", dry_run=False, limit=100)
    tasks = [rows.Task("one", raises), rows.Task("two", lambda until: found)]
    assert rows.take(context, tasks) == "failed: one: ValueError: too much"
    assert [each["subject"] for each in context.results["rows"]] == [found.subject]


def test_tables_are_written_with_every_row(tmp_path):
    context = Context(tmp_path / "ops.json", dry_run=False, limit=100)
    context.render = partial(tables.render, "ops")
    rows.take(context, [rows.Task("one", lambda until: tables.row_of(row()))])
    assert "### depthwise_conv3x3, bfloat16, forward" in (tmp_path / "ops.md").read_text("utf-8")


def test_the_summary_shows_the_exponentials_of_a_forward():
    roof = {"name": "exponentials", "dtype": "float32", "work": 100, "median": 1e-10}
    attention = row() | {"subject": "global_attention", "shape": [2, 49, 32], "image": [224, 224]}
    results = {"rows": [attention], "roofs": [*ROOFS, roof | {"quartiles": [1e-10, 1e-10]}]}
    text = tables.render("ops", results)
    # 2 images, 1 head, 49 tokens squared, at 1e12 per second.
    assert "- stage 1, 2 images: the exponentials alone take 0.005 µs" in text


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

"""``python -m benchmarks.gpu``: phases, limits, budget, record."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from gpu_records import RECORD

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import phases, record
from benchmarks.gpu.phases import LIMITS, run_phase
from benchmarks.gpu.record import Record

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
    assert "no GPU is visible; --dry-run goes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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

"""compute-sanitizer's tools over every operation's kernels on small inputs, one tool at a time."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

from .counts import Count
from .phases import ROOT, signal_group
from .program import Context, MissingError

RUNS = (
    # The CUDA backend compiles nothing at run time. Races and barriers are found by no test.
    *(("cuda", tool) for tool in ("racecheck", "synccheck", "memcheck", "initcheck")),
    *(("triton", tool) for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
)
FOUND = 86
"""Exit status of a tool that found something."""

# The caching allocator would hide an access beyond a tensor's end.
SETTINGS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

ENDING = 3.0
"""Seconds that a tool has to write its summary after it was interrupted."""

MOST_CALLS = 60
MOST_VARIANTS = 120
"""Bounds of the dry run."""


def script(backend: str, device: str = "cuda") -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.small_inputs", device, backend]


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer: on PATH, else in the folder of the CUDA toolkit."""
    toolkit = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    folders = [os.environ.get("PATH", os.defpath), f"{toolkit}/bin"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def command(path: str, tool: str, program: list[str]) -> list[str]:
    options = ["--error-exitcode", str(FOUND), "--print-limit", "20"]
    return [path, "--tool", tool, *options, *program]


def run(context: Context) -> str | None:
    path = find_sanitizer()
    results = context.results
    results |= {"compute_sanitizer": path, "plain": {}, "tools": {}}
    if context.dry_run:
        return _dry(context)
    if path is None:
        raise MissingError("compute-sanitizer: expected on PATH or in CUDA_HOME, found none")
    for i, (backend, tool) in enumerate(RUNS):
        if backend not in results["plain"]:
            # Without a tool first: a failure here is none of its findings.
            results["plain"][backend] = _plain(backend, context.left() / 2)
            context.write()
        if results["plain"][backend]["status"] != "passed":
            continue
        # The first tools are the most important: half of the time left, or an even share.
        left = context.left() - ENDING
        limit = max(left / 2, left / (len(RUNS) - i))
        results["tools"][f"{backend} {tool}"] = _streamed(
            command(path, tool, script(backend)), limit
        )
        context.write()
    found = {f"plain {name}": result for name, result in results["plain"].items()}
    found |= results["tools"]
    bad = [f"{name}: {r['status']}" for name, r in found.items() if r["status"] != "passed"]
    return "; ".join(bad) or None


def _plain(backend: str, limit: float) -> dict:
    start = time.monotonic()
    if backend == "triton":
        from .warm_up import warm_up

        warm_up(small_inputs_on_triton)
    result = _streamed(script(backend), limit - (time.monotonic() - start))
    # A plain run has no summary: its exit status is its verdict.
    if result["status"] != "timeout":
        code = result["exit_status"]
        result["status"] = "passed" if code == 0 else f"exit status {code}"
    return result | {"seconds": round(time.monotonic() - start, 1)}


def small_inputs_on_triton() -> None:
    """What the scripts call on Triton, with CPU tensors: for the counting driver."""
    from .small_inputs import calls

    for _, call in calls("triton", "cpu"):
        call()


def _streamed(command: list[str], limit: float) -> dict:
    """Runs a tool, prints its output as it comes, and interrupts it after ``limit`` seconds."""
    print(shlex.join([*(f"{k}={v}" for k, v in SETTINGS.items()), *command]), flush=True)
    start, lines = time.monotonic(), []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # The tool has the script as a child, which is ended with it.
        start_new_session=True,
    )

    def stream() -> None:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)

    reader = threading.Thread(target=stream, daemon=True)
    reader.start()
    ended = False
    try:
        process.wait(max(0.0, limit))
    except subprocess.TimeoutExpired:
        ended = True
        signal_group(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING)
    finally:
        signal_group(process, signal.SIGKILL)
        process.wait()
    reader.join(ENDING)
    result = {"seconds": round(time.monotonic() - start, 1), "exit_status": process.returncode}
    result |= verdict(process.returncode, "".join(lines))
    # Errors that a tool printed before it was ended count.
    return result | ({"status": "timeout"} if ended and result["status"] != "failed" else {})


def verdict(code: int, output: str) -> dict:
    """The tool's status and its own count of errors; without such a count nothing was checked."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    errors = int(summary[1]) if summary else None
    if code == 0 and errors == 0:
        status = "passed"
    elif code == FOUND or errors:
        status = "failed"
    else:
        status = f"exit status {code}, {'no' if errors is None else errors} summary"
    return {"status": status, "errors": errors}


def _dry(context: Context) -> str | None:
    """Shows the commands, runs the calls on the CPU, and counts calls and compilations."""
    from .small_inputs import run as small_inputs
    from .warm_up import variants

    for backend, tool in RUNS:
        print(shlex.join(command("compute-sanitizer", tool, script(backend))), flush=True)
        context.results["tools"][f"{backend} {tool}"] = {"status": "not run"}
    count = small_inputs("reference", "cpu")
    print(f"{count} calls forward and backward on the CPU", flush=True)
    found = variants(small_inputs_on_triton)
    return context.count(
        Count("calls of small inputs", count, MOST_CALLS, least=1),
        *([] if found is None else [Count("Triton variants", found, MOST_VARIANTS, least=1)]),
    )

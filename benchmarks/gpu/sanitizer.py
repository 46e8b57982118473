"""compute-sanitizer's four tools over every operation's kernels on small inputs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time

from .phases import ROOT
from .program import Context, MissingError

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86
"""Exit status of a tool that found something."""

# The caching allocator would hide an access past a tensor's end.
SETTINGS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def commands(script: list[str]) -> dict[str, list[str]]:
    """What to execute, by tool."""
    options = ["--error-exitcode", str(FOUND), "--print-limit", "20"]
    return {tool: ["compute-sanitizer", "--tool", tool, *options, *script] for tool in TOOLS}


def run(context: Context) -> str | None:
    script = [sys.executable, "-m", "benchmarks.gpu.small_inputs", context.device]
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    path = shutil.which("compute-sanitizer")
    context.results |= {"compute_sanitizer": path, "tools": {}}
    # Without a tool first: what fails here is no finding of theirs.
    subprocess.run(script, cwd=ROOT, env=os.environ | SETTINGS, check=True)
    for tool, command in commands(script).items():
        print(shlex.join([*settings, *command]), flush=True)
        if context.dry_run:
            context.results["tools"][tool] = {"status": "not run"}
            continue
        if path is None:
            raise MissingError("compute-sanitizer: expected on PATH, found none")
        context.results["tools"][tool] = _check(command)
        context.write()
    bad = {
        tool: result["status"]
        for tool, result in context.results["tools"].items()
        if result["status"] not in ("passed", "not run")
    }
    return "; ".join(f"{tool}: {status}" for tool, status in bad.items()) or None


def _check(command: list[str]) -> dict:
    start = time.monotonic()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | SETTINGS,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, flush=True)
    return {"seconds": round(time.monotonic() - start, 1)} | verdict(done.returncode, done.stdout)


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

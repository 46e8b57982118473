"""Builds the native libraries in place, the CPU's first, and checks that they load."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib import metadata

from ..compile_gates import nvcc
from .phases import ROOT
from .program import Context, MissingError

COMMAND = [sys.executable, "setup.py", "build_ext", "--inplace"]

SETTINGS = {"DSNET_NATIVE": "1", "MAX_JOBS": str(os.cpu_count() or 1)}
# The second step requires the toolkit, and compiles for the visible GPUs.
STEPS = {"cpu": {"DSNET_CUDA": "0"}, "cuda": {"DSNET_CUDA": "1"}}

PROGRAMS = ("cmake", "ninja")
"""Requirements that may also be programs on PATH, outside Python."""


def run(context: Context) -> str | None:
    missing = lacking()
    context.results |= {"missing": missing, "steps": {}}
    context.write()
    if missing and not context.dry_run:
        raise MissingError(f"the build needs {', '.join(missing)}")
    failed = []
    for name, chosen in STEPS.items():
        settings = SETTINGS | chosen | (_architectures(context) if name == "cuda" else {})
        print(shlex.join([*(f"{k}={v}" for k, v in settings.items()), *COMMAND]), flush=True)
        if context.dry_run:
            continue
        start = time.monotonic()
        done = subprocess.run(COMMAND, cwd=ROOT, env=os.environ | settings, check=False)
        seconds = round(time.monotonic() - start, 1)
        context.results["steps"][name] = {"exit_status": done.returncode, "seconds": seconds}
        context.write()
        # The CPU's library stays usable where the CUDA step fails.
        if done.returncode:
            failed.append(f"the {name} step ended with exit status {done.returncode}")
    # A process of its own: this one has loaded none of the libraries, and needs no torch.
    code = "import dsnet_kernels, json; print(json.dumps(dsnet_kernels.info()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    context.results |= {key: facts[key] for key in ("build", "libraries", "operations")}
    print(json.dumps(context.results, indent=1))
    if context.dry_run:
        return None
    reasons = [f"{name}: {why}" for name, why in facts["libraries"].items() if why is not None]
    return "; ".join(failed + reasons) or None


def _architectures(context: Context) -> dict[str, str]:
    """For the GPUs that nvidia-smi lists; without that program for the one that torch sees."""
    if context.dry_run or shutil.which("nvidia-smi"):
        return {"TORCH_CUDA_ARCH_LIST": ""}
    code = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    return {"TORCH_CUDA_ARCH_LIST": done.stdout.strip()}


def lacking() -> list[str]:
    """Build requirements that are absent or too old, each with what was found."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)[1]
    found = []
    for name, least in re.findall(r'"([\w-]+)(?:>=([\d.]+))?"', requires):
        version = _version(name)
        if version is None:
            found.append(f"{name}, not found here")
        elif least and _numbers(version) < _numbers(least):
            found.append(f"{name} >= {least}, found {version}")
    if nvcc.find_nvcc() is None:
        found.append("nvcc, not found here")
    return found


def _version(name: str) -> str | None:
    if name in PROGRAMS:
        path = shutil.which(name)
        if path is None:
            return None
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"\d+(\.\d+)+", text)
        return match[0] if match else None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])

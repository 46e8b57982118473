"""Machine, GPU, versions, commit and date of a run."""

import subprocess
from importlib import metadata

import torch

from dsnet.bench import report

from ..compile_gates import nvcc
from .program import Context


def run(context: Context) -> None:
    facts = report.environment(command="")
    versions = facts["versions"]
    versions["nvcc"] = _nvcc()
    for package in ("triton", "numpy"):
        versions[package] = _version(package)
    if not context.dry_run:
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    machine = {key: value for key, value in facts["machine"].items() if key != "gpu"}
    context.results = {
        "machine": machine,
        "gpu": None if context.dry_run else _gpu(),
        "versions": versions,
        "commit": facts["commit"],
    }


def _nvcc() -> str | None:
    found = nvcc.find_nvcc()
    return None if found is None else nvcc.nvcc_version(found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": _driver(),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip()

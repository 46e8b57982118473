"""Machine, GPU, versions and commit of a run."""

from importlib import metadata

from dsnet.bench import cuda, report

from ..compile_gates import nvcc
from .program import Context


def run(context: Context) -> None:
    facts = report.environment(command="")
    versions = facts["versions"]
    versions["nvcc"] = _nvcc()
    for package in ("triton", "numpy"):
        versions[package] = _version(package)
    if not context.dry_run:
        versions |= cuda.versions()
    machine = {key: value for key, value in facts["machine"].items() if key != "gpu"}
    context.results = {
        "machine": machine,
        "gpu": None if context.dry_run else cuda.properties(),
        "versions": versions,
        "commit": facts["commit"],
    }


def _nvcc() -> str | None:
    found = nvcc.find_nvcc()
    try:
        return None if found is None else nvcc.nvcc_version(found)
    except (OSError, nvcc.GateError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

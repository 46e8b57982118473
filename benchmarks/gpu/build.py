"""Builds the native libraries in place for the visible GPU, and sees whether they load."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys

from ..compile_gates import nvcc
from .phases import ROOT
from .program import Context, MissingError

COMMAND = [sys.executable, "setup.py", "build_ext", "--inplace"]
# The toolkit is required; its architectures are those of the GPUs that nvidia-smi lists.
SETTINGS = {"DSNET_CUDA": "1", "DSNET_NATIVE": "1", "TORCH_CUDA_ARCH_LIST": ""}


def run(context: Context) -> str | None:
    missing = _missing()
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    print(shlex.join([*settings, *COMMAND]), flush=True)
    context.results["missing"] = missing
    if not context.dry_run:
        if missing:
            raise MissingError(f"the build needs {', '.join(missing)}, not found here")
        subprocess.run(COMMAND, cwd=ROOT, env=os.environ | SETTINGS, check=True)
    # A process of its own: this one may have loaded the libraries that were there before.
    code = "import dsnet_kernels, json; print(json.dumps(dsnet_kernels.info()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    context.results |= {key: facts[key] for key in ("build", "libraries", "operations")}
    print(json.dumps(context.results, indent=1))
    reasons = [f"{name}: {why}" for name, why in facts["libraries"].items() if why is not None]
    return None if context.dry_run else "; ".join(reasons) or None


def _missing() -> list[str]:
    modules = [name for name in ("setuptools", "pybind11") if not importlib.util.find_spec(name)]
    tools = [name for name in ("cmake", "ninja") if shutil.which(name) is None]
    return modules + tools + (["nvcc"] if nvcc.find_nvcc() is None else [])

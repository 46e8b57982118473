"""The tests of operations once more with Triton's interpreter in place of a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES

import dsnet_kernels

TESTS = Path(__file__).parent
PACKAGES = str(Path(dsnet_kernels.__file__).parents[1])


def files() -> list[Path]:
    """Those that know variants, and what an operation has of its own for the interpreter."""
    own = [TESTS / f"test_{case.name}.py" for case in CASES]
    interpreted = sorted((TESTS / "interpreter").glob("[a-z]*.py"))
    shared = [TESTS / "test_operations.py", TESTS / "test_operations_torch.py"]
    return [*shared, *(path for path in own if path.exists()), *interpreted]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_operations_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files())],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            # The package under test first: the repository is on the path too.
            "PYTHONPATH": os.pathsep.join([PACKAGES, *(path for path in sys.path if path)]),
            "OMP_NUM_THREADS": "1",
        },
        # Not the repository: its sources must not hide an installed package.
        cwd=TESTS,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 100
    # What only compiled kernels can show, such as a thousand repeats, has no variant to run on.
    skipped = re.findall(r"^SKIPPED.*", done.stdout, re.MULTILINE)
    assert all("got empty parameter set" in line for line in skipped), skipped

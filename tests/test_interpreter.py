"""The layers of proof once more with Triton's interpreter in place of a GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cases import CASES

import dsnet_kernels
from dsnet_kernels.backends import OPERATIONS

TESTS = Path(__file__).parent
PACKAGES = str(Path(dsnet_kernels.__file__).parents[1])
NAMES = [case.name for case in CASES if "triton" in OPERATIONS[case.name].present]


def files(name: str) -> list[Path]:
    """Those that know variants, and what the operation has of its own."""
    shared = [TESTS / "test_operations.py", TESTS / "test_operations_torch.py"]
    own = [TESTS / f"test_{name}.py", TESTS / "interpreter" / f"{name}.py"]
    return [*shared, *(path for path in own if path.exists())]


# An operation at a time, so that several processes can share them.
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_operation_in_the_interpreter(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", name, *files(name)],
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
    assert int(passed[1]) > 50
    # What only compiled kernels can show, such as a thousand repeats, has no variant to run on.
    skipped = re.findall(r"^SKIPPED.*", done.stdout, re.MULTILINE)
    assert all("got empty parameter set" in line for line in skipped), skipped


def test_every_file_for_the_interpreter_belongs_to_an_operation():
    names = {path.stem for path in (TESTS / "interpreter").glob("[a-z]*.py")} - {"conftest"}
    assert names <= set(NAMES)

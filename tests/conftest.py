"""What every test session does: finds ``benchmarks``, and skips tests that need a GPU."""

import sys
from pathlib import Path

import pytest
import torch

# Behind the installed packages, which are under test.
sys.path.append(str(Path(__file__).resolve().parents[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

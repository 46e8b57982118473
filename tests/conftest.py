"""What every session does: finds ``benchmarks``, skips what needs a GPU; and shared fixtures."""

import sys
from pathlib import Path

import pytest
import torch

# Behind the installed packages, which are under test.
sys.path.append(str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def quick(monkeypatch):
    """Benchmarks with as few and as short samples as there can be."""
    from dsnet.bench import models, ops, roofs, suite, timing

    monkeypatch.setattr(ops, "BUDGET", 0.0)
    monkeypatch.setattr(suite, "DETECTION_BUDGET", 0.0)
    monkeypatch.setattr(roofs, "BUDGET", 0.0)
    monkeypatch.setattr(roofs, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(roofs, "YARDSTICK_ROUNDS", 1)
    monkeypatch.setattr(models, "BUDGET", {"inference": 0.0, "training": 0.0})
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)


@pytest.fixture(autouse=True)
def asked_anew():
    """What was asked of a GPU or a library in one test is asked again in the next."""
    from dsnet_kernels import native

    for cached in (native.gpu_capability, native._library_refusal, native.cuda_versions):
        cached.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

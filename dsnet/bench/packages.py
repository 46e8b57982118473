"""Our network as a package for torch's own loaders: contenders of inference."""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from dsnet.export import FORMATS

from .networks import Outputs, Problem, named
from .row import Contender

PACKAGES = {"torch.export": "torch", "aoti": "aoti"}
"""Formats of :func:`dsnet.export_model` by the names they have in a report."""


def refusal(name: str, dtype: torch.dtype) -> str | None:
    """Why the package ``name`` takes no part in a row, or None."""
    known = FORMATS[PACKAGES[name]].dtypes
    if dtype in known:
        return None
    listed = " and ".join(str(each).removeprefix("torch.") for each in known)
    return f"it computes in {listed}, not in {str(dtype).removeprefix('torch.')}"


def contender(name: str, problem: Problem, chosen: dict[str, str]) -> Contender:
    """Inference by the package ``name``, written and loaded by the first call.

    It takes contiguous images of one shape, as they arrive.
    """

    @cache
    def run() -> Callable[[Tensor], Sequence[Tensor]]:
        with (
            TemporaryDirectory() as folder,
            torch.inference_mode(False),
            torch.no_grad(),
            warnings.catch_warnings(),
        ):
            # The exporter's about functions of its own.
            warnings.simplefilter("ignore")
            images = torch.zeros(problem.images.shape, dtype=problem.images.dtype)
            path = Path(folder) / "network.pt2"
            return FORMATS[PACKAGES[name]].write(problem.network("auto"), path, images, False)

    def infer() -> Outputs:
        outputs = run()(problem.images)
        return outputs[0] if len(outputs) == 1 else outputs

    return Contender(
        f"auto, {name}", "ours", infer, lambda: named(infer()), compiles=True, chosen=chosen
    )

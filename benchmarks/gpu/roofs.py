"""The limits of the GPU: rates of a copy, of a matrix product, and of exponentials."""

import dataclasses
from typing import Any

import torch

from dsnet.bench.device import Device
from dsnet.bench.report import Roof
from dsnet.bench.roofs import measure_roofs

from . import exponentials
from .devices import device_of
from .program import Context

DTYPES = (torch.bfloat16, torch.float32)


def run(context: Context) -> None:
    context.results |= measured(device_of(context), context.dry_run)
    for roof in context.results["roofs"]:
        print(roof)


def measured(device: Device, dry_run: bool) -> dict[str, list[dict[str, Any]]]:
    """The roofs, for the results of a phase: each command measures those that it is compared with.

    On the CPU there is no kernel of exponentials.
    """
    found: list[Roof] = list(measure_roofs(DTYPES, device=device))
    if not dry_run:
        roof = exponentials.roof(device)
        found += [] if roof is None else [roof]
    return {"roofs": [dataclasses.asdict(roof) for roof in found]}

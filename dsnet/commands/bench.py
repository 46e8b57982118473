"""``dsnet bench``: fused against reference, on this machine."""

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..variants import list_models
from . import at_least, image_size, seconds

if TYPE_CHECKING:
    from ..bench.device import Device
    from ..bench.suite import Settings, Task

NAME = "bench"
HELP = "time the fused operations and the networks against the reference"

MODES = ("all", "ops", "inference", "training", "detection")
DTYPES = ("float32", "bfloat16", "float16")
BASELINES = {
    "nchw": "eager_nchw",
    "channels_last": "eager_channels_last",
    "compile": "compile",
    "sdpa": "sdpa",
    "amp": "eager_amp",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}
BACKENDS = {"cpu": ("cpu", "sdpa", "reference"), "cuda": ("cuda", "triton", "sdpa", "reference")}
"""Backends that take tensors of each device."""

DEVICES = ("auto", "cpu", "cuda")

BUDGET = 110.0
"""Seconds of wall-clock time of a whole run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Every contender is checked against float64 before it is timed. Exit status: 0; 1 if one of"
        " ours failed its check or could not run; 2 after any other error. Where other programs use"
        " the cores, threads wait passively (OMP_WAIT_POLICY=PASSIVE) unless the variable is set."
    )
    parser.add_argument(
        "model",
        nargs="?",
        default="dsnet_tiny",
        choices=list_models(),
        metavar="MODEL",
        help=f"{', '.join(list_models())} (default dsnet_tiny)",
    )
    add_measurement(parser, budget=BUDGET)
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="all",
        help="the operations alone, a network's inference or training step, or all of these"
        " (default); or detection: the first stage's operations on a large image, with peak memory,"
        " which takes minutes and gigabytes",
    )


def add_measurement(
    parser: argparse.ArgumentParser,
    baselines: Sequence[str] = ("--baselines",),
    budget: float = math.inf,
) -> None:
    """Adds what every command that measures takes: device, inputs, contenders, results.

    Args:
        parser: takes the arguments.
        baselines: how the option that names them is called.
        budget: the default of ``--budget``.
    """
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="auto",
        help="auto (default) is the GPU where torch sees one, else the CPU",
    )
    parser.add_argument(
        "--budget",
        type=seconds,
        default=budget,
        metavar="SECONDS",
        help="wall-clock time of the run, shared among its rows; rows left out are named"
        f" (default {'none' if math.isinf(budget) else f'{budget:g}'})",
    )
    parser.add_argument(
        "--batch",
        type=at_least(1),
        nargs="+",
        metavar="N",
        help="images per call (default: operations and training 8, inference 1 and 8, detection 1;"
        " on a GPU: operations 128, training 64, inference 1, 8, 32, 128 and 512)",
    )
    parser.add_argument(
        "--size",
        type=image_size,
        nargs="+",
        metavar="S",
        help="of the images: 224, or 800x1333 for rows x columns (default 224; detection 800x1333)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        help="(default float32; on a GPU bfloat16, then float32)",
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="default: PyTorch's")
    parser.add_argument(
        "--backends",
        choices=("auto", *dict.fromkeys(name for names in BACKENDS.values() for name in names)),
        nargs="+",
        default=["auto"],
        help="ours (default auto): cpu on the CPU, cuda and triton on a GPU; in a network,"
        " operations without a kernel of a named backend run as the reference",
    )
    parser.add_argument(
        *baselines,
        dest="baselines",
        choices=[*BASELINES, "all"],
        nargs="+",
        help="the reference in these forms, each where it applies (default: the eager ones, compile"
        " for the operations with an affine, sdpa for attention; for networks on a GPU"
        " channels_last, amp, sdpa and, in rows of its own, compile with max-autotune);"
        " onnxruntime and openvino, for a network's inference, need the extra peers",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results; - prints them instead")


def run(args: argparse.Namespace) -> int:
    from ..bench.contention import wait_passively_on_shared_cores
    from ..bench.suite import tasks

    wait_passively_on_shared_cores(args.argv)
    command = shlex.join(["dsnet", *args.argv])
    return measure(
        args, command, lambda common: tasks(replace(common, model=args.model, mode=args.mode))
    )


def measure(
    args: argparse.Namespace, command: str, choose: Callable[["Settings"], Sequence["Task"]]
) -> int:
    """Runs the tasks chosen for the arguments of :func:`add_measurement` and delivers the report.

    Returns:
        The exit status.
    """
    from ..bench import device as devices
    from ..bench.session import check_target, deliver, take

    device = devices.find(args.device)
    refuse_absent(args.backends, device)
    check_target(args.json)
    chosen = settings(args, device)
    report = take(
        command,
        choose(chosen),
        threads=args.threads,
        dtypes=chosen.every_dtype(),
        baselines=chosen.baselines or (),
        device=device,
        budget=args.budget,
    )
    return deliver(report, args.json)


def settings(args: argparse.Namespace, device: "Device | None" = None) -> "Settings":
    """Of the arguments of :func:`add_measurement`: all but the network and the mode."""
    import torch

    from ..bench import device as devices
    from ..bench.suite import Settings

    return Settings(
        sizes=args.size,
        dtypes=None if args.dtype is None else [getattr(torch, name) for name in args.dtype],
        backends=list(dict.fromkeys(args.backends)),
        batches=args.batch,
        baselines=_baselines(args.baselines),
        device=device or devices.CPU,
    )


def refuse_absent(backends: list[str], device: "Device") -> None:
    """Refuses backends that do not run here.

    Raises:
        ValueError: for a backend that takes no tensors of the device, or has no kernel here.
    """
    import dsnet_kernels

    for name in backends:
        if name != "auto" and name not in BACKENDS[device.name]:
            kind = "CPU" if device.name == "cpu" else "GPU"
            raise ValueError(
                f"--backends: {name} takes no {kind} tensors; expected auto or one of"
                f" {', '.join(BACKENDS[device.name])} with --device {device.name}"
            )
        if name == "auto" or name in dsnet_kernels.available_backends():
            continue
        states = dsnet_kernels.info()["operations"].items()
        reasons = dict.fromkeys(state[name] for _, state in states)
        raise ValueError(f"--backends: {name} cannot run here: {'; '.join(reasons)}")


def _baselines(names: list[str] | None) -> list[str] | None:
    """Their names in a report; None for the defaults."""
    if names is None:
        return None
    return [BASELINES[name] for name in (BASELINES if "all" in names else names)]

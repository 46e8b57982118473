"""``python -m benchmarks models``: whole networks against other ways to run them."""

import argparse
import shlex
from dataclasses import replace

from dsnet.bench.packages import PACKAGES
from dsnet.bench.suite import Settings, Task, tasks
from dsnet.commands.bench import add_measurement, measure
from dsnet.variants import list_models

NAME = "models"
HELP = "time a network's inference, training step and backbone against other runtimes"

WORK = ("inference", "training", "backbone")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=list_models(), nargs="+", default=["dsnet_tiny"])
    parser.add_argument(
        "--work",
        choices=WORK,
        nargs="+",
        default=["inference", "training"],
        help="inference of 1 and of 8 images, a training step of 8, or inference up to the stages'"
        " maps on one 800×1333 image with peak memory (default: the first two)",
    )
    parser.add_argument(
        "--packages",
        choices=PACKAGES,
        nargs="+",
        default=[],
        help="ours exported too, in inference, as dsnet export writes it (default: none)",
    )
    add_measurement(parser, baselines=("--peers", "--baselines"))


def run(args: argparse.Namespace) -> int:
    command = shlex.join(["python", "-m", "benchmarks", *args.argv])
    return measure(args, command, lambda common: chosen(args, common))


def chosen(args: argparse.Namespace, common: Settings) -> list[Task]:
    """The rows, network by network."""
    return [
        task
        for model in dict.fromkeys(args.model)
        for work in dict.fromkeys(args.work)
        for task in tasks(replace(common, model=model, mode=work, exported=args.packages))
    ]

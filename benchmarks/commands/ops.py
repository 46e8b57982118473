"""``python -m benchmarks ops``: every operation at the stages of a network."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from dsnet.bench.cases import CASES, stages
from dsnet.bench.suite import SIZES, Settings, Task, tasks
from dsnet.commands.bench import add_measurement, measure
from dsnet.variants import list_models

NAME = "ops"
HELP = "time every operation at the stages of a network, against every baseline"

BATCHES = (1, 8)
"""A single image, and enough to keep two cores busy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", choices=list_models(), nargs="+", default=["dsnet_tiny"], help="whose stages"
    )
    names = list(dict.fromkeys(case.operation for case in CASES))
    parser.add_argument("--op", choices=names, nargs="+", help="(default: all)")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3, 4), nargs="+", default=[1, 2, 3, 4], metavar="N"
    )
    add_measurement(parser)
    parser.set_defaults(batch=list(BATCHES), baselines=["all"])


def run(args: argparse.Namespace) -> int:
    command = shlex.join(["python", "-m", "benchmarks", *args.argv])
    return measure(args, command, lambda common: chosen(args, common))


def chosen(args: argparse.Namespace, common: Settings) -> Sequence[Task]:
    """The rows; networks whose stages are alike share theirs."""
    found: list[Task] = []
    measured: dict[tuple, str] = {}
    for model in dict.fromkeys(args.model):
        of = tuple(stages(model, 1, (common.sizes or SIZES)[0]))
        if of in measured:
            message = f"{model}: its stages are those of {measured[of]}, measured once"
            print(message, file=sys.stderr)
            continue
        measured[of] = model
        found += tasks(
            replace(common, model=model, mode="ops", operations=args.op, stages=args.stage)
        )
    return found

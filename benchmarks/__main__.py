"""Command line of the benchmarks; see ``python -m benchmarks --help``."""

import argparse
import sys
from collections.abc import Sequence

from dsnet.cli import EXPECTED, INTERRUPTED, one_line

from .commands import compare, models, ops, report, scaling

COMMANDS = (ops, models, scaling, report, compare)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 for a failed check or a regression; 2 for an error; 130 if interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.argv = argv
    try:
        return args.run(args)
    except EXPECTED as error:
        print(f"{args.prog}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures into records, and makes tables and pictures of them. For a GPU:"
        " python -m benchmarks.gpu.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.HELP,
            description=f"{command.HELP[:1].upper()}{command.HELP[1:]}.",
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, prog=subparser.prog)
    return parser


if __name__ == "__main__":
    sys.exit(main())

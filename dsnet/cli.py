"""The ``dsnet`` command: arguments, errors and exit statuses; the work is in ``dsnet.commands``."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from dsnet_kernels.version import __version__

from . import commands
from .checkpoint import CheckpointError

EXPECTED = (CheckpointError, ImportError, OSError, RuntimeError, TypeError, ValueError)
"""What a user can cause: told in one line, unlike an error of ours."""

INTERRUPTED = 130
CLOSED_PIPE = 141
"""128 + the signal's number, as shells report it."""


class _UsageError(ValueError):
    def __init__(self, prog: str, message: str) -> None:
        super().__init__(f"{message} (see {prog} --help)")
        self.prog = prog


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(self.prog, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``dsnet`` with ``argv``, by default the process's arguments.

    Returns:
        The exit status: 0; the command's own, such as 1 where ``classify`` could not read an image;
        2 after an error, told in one line ``dsnet COMMAND: message`` on stderr, or as a traceback
        with ``--debug``; 130 after an interrupt; 141 where stdout was closed.
    """
    if hasattr(sys.stdout, "reconfigure"):
        # Any file name can be printed, whatever the locale.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Else the interpreter would complain when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    prog, debug = "dsnet", "--debug" in argv
    try:
        args = _parser().parse_args(argv)
        args.argv = argv
        prog, debug = args.prog, args.debug
        return args.run(args)
    except BrokenPipeError:
        raise
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    except EXPECTED as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"{getattr(error, 'prog', prog)}: {one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dsnet",
        description="The Dual-stream Network (DS-Net) on fused kernels.",
        epilog="Errors are one line on stderr and exit status 2.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsnet {__version__}")
    parser.add_argument("--debug", action="store_true", help="show an error's traceback")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in commands.load():
        subparser = subparsers.add_parser(
            command.NAME,
            help=command.HELP,
            description=f"{command.HELP[:1].upper()}{command.HELP[1:]}.",
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
        # Suppressed, so that it does not undo a --debug in front of the command.
        subparser.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show an error's traceback",
        )
        subparser.set_defaults(run=command.run, prog=subparser.prog)
    return parser


def one_line(error: Exception) -> str:
    """What a user reads of an expected error."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__

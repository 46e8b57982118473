"""The commands of ``dsnet``: every module of this package is one.

A command module has ``NAME`` and ``HELP`` strings, ``add_arguments(parser)`` and
``run(args) -> int``, the exit status. It imports heavy modules inside ``run``, writes results to
stdout and everything else to stderr, and raises on errors.
"""

import argparse
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

SMALLEST_IMAGE = 32


def load() -> list[ModuleType]:
    """All command modules, sorted by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [importlib.import_module(f"{__name__}.{name}") for name in names]


def at_least(minimum: int) -> Callable[[str], int]:
    """An argument type: integers from ``minimum`` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(
                f"expected an integer of at least {minimum}, got {text!r}"
            )
        return value

    return parse


def seconds(text: str) -> float:
    """An argument type: a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return value


def image_size(text: str) -> tuple[int, int]:
    """An argument type: ``224`` or ``800x1333`` as (rows, columns)."""
    parts = text.lower().replace("×", "x").split("x")
    try:
        lengths = tuple(int(part) for part in parts)
    except ValueError:
        lengths = ()
    if len(lengths) not in (1, 2) or min(lengths) < SMALLEST_IMAGE:
        raise argparse.ArgumentTypeError(
            f"expected N or ROWSxCOLUMNS of at least {SMALLEST_IMAGE} pixels, got {text!r}"
        )
    return lengths if len(lengths) == 2 else lengths * 2

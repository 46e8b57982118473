"""The error of everything that goes wrong with a checkpoint file."""

from collections.abc import Iterable
from os import PathLike, fspath

SHOWN = 5
"""Names that an error lists before it counts the rest."""


class CheckpointError(Exception):
    """A checkpoint cannot be read, or does not fit the model; the message begins with the file.

    Attributes:
        path: the file.
        problem: the message without the file; it names a few tensors and counts the others.
        missing: all tensors that the file lacks.
        unexpected: all tensors that the model has no place for.
        misshapen: all tensors of another shape, as ``name (expected shape, got shape)``.
    """

    def __init__(
        self,
        path: str | PathLike,
        problem: str,
        *,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        misshapen: Iterable[str] = (),
    ) -> None:
        super().__init__(fspath(path), problem)
        self.path, self.problem = self.args
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        self.misshapen = tuple(misshapen)

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


def shown(text: str, limit: int = 100) -> str:
    """Text from a file for a one-line message: bounded, and escaped unless printable."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text if text.isprintable() else ascii(text)


def listing(names: Iterable[str]) -> str:
    """``3 (a, b, c)``, or ``9 (a, b, c, d, e and 4 more)``."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(map(shown, names[:SHOWN]))}{more})"

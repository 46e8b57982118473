"""The work of a phase, counted in a dry run and held to bounds."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Count:
    """An amount of work on a GPU, with the bounds that the limit of its phase was chosen for.

    Args:
        name: the unit of work, in the plural.
        value: the number planned.
        most: a larger one fails the dry run.
        least: so does a smaller one.
    """

    name: str
    value: int
    most: int
    least: int = 0

    @property
    def problem(self) -> str | None:
        if self.least <= self.value <= self.most:
            return None
        return f"{self.name}: expected {self.least} to {self.most}, got {self.value}"


def tabled(counts: tuple[Count, ...]) -> list[dict[str, Any]]:
    """For a record."""
    return [asdict(count) for count in counts]


def problems(counts: tuple[Count, ...]) -> str | None:
    """All that are out of bounds; None if none is."""
    return "; ".join(count.problem for count in counts if count.problem) or None

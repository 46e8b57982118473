"""The schema of a profile: dataclasses, to JSON and back."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .steps import AROUND, BLOCK_STEPS, FUSED

SCHEMA = "dsnet-profile"
VERSION = 1


@dataclass(frozen=True)
class Part:
    """One step of one side.

    Args:
        operation: one of ``steps.BLOCK_STEPS`` or ``steps.AROUND``.
        stage, block: where; 0 outside of all stages, or of the blocks of a stage.
        seconds: its share of the side's seconds.
        backward_seconds: of which in the backward.
        bytes: of the tensors that its operators read and write.
        macs: done.
        launches: in the profile's unit.
        published_macs: by the paper's equations, the same on both sides.
    """

    operation: str
    stage: int = 0
    block: int = 0
    seconds: float = 0.0
    backward_seconds: float = 0.0
    bytes: int = 0
    macs: int = 0
    launches: int = 0
    published_macs: int = 0

    @property
    def place(self) -> tuple[int, int]:
        """(stage, block)."""
        return self.stage, self.block

    @property
    def fused(self) -> bool:
        """Whether it is an operation of ``dsnet_kernels``."""
        return self.operation in FUSED


@dataclass(frozen=True)
class Side:
    """Before or after.

    Args:
        name: ``"before"`` or ``"after"``.
        what: what ran, in words.
        seconds: median of a call without instrumentation, which the parts add up to.
        quartiles: first and third, of the rounds.
        rounds: samples taken, each the mean of ``repeats`` calls.
        repeats: calls per sample.
        watched_seconds: median of a call with instrumentation.
        chosen: the backend behind each operation.
        error: the worst error over what the check allows; None where there is none.
        problem: why the times do not count; None if all is well.
        parts: in the order in which they first ended.
    """

    name: str
    what: str
    seconds: float
    quartiles: tuple[float, float]
    rounds: int
    repeats: int
    watched_seconds: float
    chosen: dict[str, str]
    error: float | None
    problem: str | None
    parts: tuple[Part, ...]

    def total(self, operation: str) -> Part:
        """All steps of one operation as one part."""
        return self.sum((each for each in self.parts if each.operation == operation), operation)

    def fused(self) -> Part:
        """All operations of ``dsnet_kernels`` as one part."""
        return self.sum((each for each in self.parts if each.fused), "fused")

    def sum(self, parts: Iterable[Part], operation: str = "") -> Part:
        """Parts added up, under one name and of no place."""
        parts = tuple(parts)
        names = [field.name for field in dataclasses.fields(Part)][3:]
        return Part(operation, 0, 0, *(sum(getattr(p, name) for p in parts) for name in names))

    def fused_share(self) -> float:
        """What the operations of ``dsnet_kernels`` take, over the whole."""
        return self.fused().seconds / self.seconds

    def bound(self, seconds: float) -> float:
        """Amdahl: how many times faster without these seconds, total / (total − seconds)."""
        rest = self.seconds - seconds
        return self.seconds / rest if rest > 0 else float("inf")


@dataclass(frozen=True)
class Profile:
    """A run of ``dsnet profile``; ``launch_unit`` says what its launches are."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    date: str
    command: str
    seconds: float
    model: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    training: bool
    launch_unit: str
    before: Side
    after: Side
    ratio: float | None
    ratio_interval: tuple[float, float] | None
    schema: str = SCHEMA
    version: int = VERSION

    def operations(self) -> list[str]:
        """Those that occur, in the order of the network."""
        found = {part.operation for side in self.sides() for part in side.parts}
        return [name for name in (*BLOCK_STEPS, *AROUND) if name in found]

    def blocks(self) -> list[tuple[int, int]]:
        """(stage, block) of each block."""
        found = {part.place for part in self.before.parts if part.block}
        return sorted(found)

    def sides(self) -> tuple[Side, Side]:
        return self.before, self.after

    def failed(self) -> bool:
        return any(side.problem is not None for side in self.sides())

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Profile":
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: for text that is no profile of this version.
        """
        fields = json.loads(text)
        found = (fields.get("schema"), fields.get("version")) if isinstance(fields, dict) else None
        if found != (SCHEMA, VERSION):
            raise ValueError(f"profile: expected {SCHEMA} version {VERSION}, got {found}")
        for name in ("before", "after"):
            side = fields[name]
            side["parts"] = tuple(Part(**part) for part in side["parts"])
            side["quartiles"] = tuple(side["quartiles"])
            fields[name] = Side(**side)
        fields["shape"] = tuple(fields["shape"])
        if fields["ratio_interval"] is not None:
            fields["ratio_interval"] = tuple(fields["ratio_interval"])
        return cls(**fields)

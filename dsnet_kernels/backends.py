"""Which backend runs an operation: selection, and the reasons against.

The choice is made per call, in this order: the call's ``backend=`` argument, the innermost
:class:`backend` in force, the environment variable ``DSNET_BACKEND``, ``"auto"``. A named backend
runs or raises :class:`BackendUnavailable` with the reason; a list of names means the first of them
that can run; ``"auto"`` means the first of :data:`PREFERENCE` that can run and is not known to lose
to the reference on that input.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import devices

BACKENDS = ("reference", "sdpa", "cpu", "triton", "cuda")
"""Every backend there is; ``"sdpa"`` is torch's scaled_dot_product_attention."""

PREFERENCE = ("cuda", "triton", "cpu", "sdpa", "reference")
"""The order in which ``"auto"`` tries them."""

Check = Callable[..., str | None]
"""Returns a reason against, or None; takes nothing, or leading tensors and options."""


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""


@dataclass(frozen=True)
class Operation:
    """What selection knows of one operation.

    ``tensors`` names the leading arguments that checks look at; further ones that they look at, the
    options, come by keyword and may be missing. ``present`` maps each backend that
    has a kernel to a check that it is built and loaded, ``can_run`` to a check that it takes the
    tensors; the reference needs neither. ``loses`` maps a backend to a check that returns why the
    reference is the faster choice, which ``"auto"`` respects and a named backend does not.
    """

    name: str
    tensors: tuple[str, ...]
    present: dict[str, Check] = field(default_factory=dict)
    can_run: dict[str, Check] = field(default_factory=dict)
    loses: dict[str, Check] = field(default_factory=dict)

    def presence(self, backend: str) -> str | None:
        """Why ``backend`` has no usable kernel of this operation here, or None if it has."""
        if backend == "reference":
            return None
        if backend not in self.present:
            return f"{self.name} has no {backend} kernel"
        return self.present[backend]()

    def reason_against(self, backend: str, *tensors: Tensor, **options: Any) -> str | None:
        """Why ``backend`` cannot run this operation on ``tensors``, or None if it can."""
        reason = self.presence(backend)
        if reason is None and backend in self.can_run:
            reason = self.can_run[backend](*tensors, **options)
        return reason

    def reason_to_avoid(self, backend: str, *tensors: Tensor, **options: Any) -> str | None:
        """Why ``"auto"`` passes over a ``backend`` that could run, or None."""
        return self.loses[backend](*tensors, **options) if backend in self.loses else None


OPERATIONS: dict[str, Operation] = {}


def register(operation: Operation) -> Operation:
    """Makes an operation known to ``explain`` and ``info``."""
    OPERATIONS[operation.name] = operation
    return operation


def _normalise(names: str | Sequence[str], source: str) -> tuple[str, ...]:
    chosen = (names,) if isinstance(names, str) else tuple(names)
    known = ("auto", *BACKENDS)
    if not chosen or any(name not in known for name in chosen):
        raise ValueError(f"{source}: expected one or more of {', '.join(known)}, got {names!r}")
    return chosen


def _from_environment() -> tuple[str, ...]:
    value = os.environ.get("DSNET_BACKEND", "").strip()
    if not value:
        return ("auto",)
    try:
        return _normalise([name.strip() for name in value.split(",")], "DSNET_BACKEND")
    except ValueError as error:
        # An import must not fail for a mistyped variable, nor may it pass in silence.
        warnings.warn(f"{error}; using auto", RuntimeWarning, stacklevel=2)
        return ("auto",)


AUTO_DEVICE = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
"""Where ``"auto"`` tries a backend at all; the reference runs anywhere."""


def _expand(names: tuple[str, ...]) -> tuple[tuple[str, bool], ...]:
    """(backend, chosen by auto) in the order of trial."""
    expanded: list[tuple[str, bool]] = []
    for name in names:
        if name == "auto":
            expanded.extend((candidate, True) for candidate in PREFERENCE)
        else:
            expanded.append((name, False))
    return tuple(expanded)


_current: tuple[str, ...] = _from_environment()
_current_candidates = _expand(_current)


class backend:  # noqa: N801 - reads as a function at its place of use
    """``backend(name_or_list)`` sets the backend; used with ``with``, only inside the block.

    An object may be kept and its block entered again, also within itself.

    The setting is process-wide, as that of :func:`torch.nn.attention.sdpa_kernel` is, so that
    autograd and data-loading threads see the same choice.

    Args:
        names: ``"auto"``, ``"reference"``, ``"sdpa"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or a
            list of them in order of preference.

    Raises:
        ValueError: for an unknown name, or an empty list.

    Example::

        dsnet_kernels.backend("reference")            # from here on
        with dsnet_kernels.backend(["cpu", "auto"]):  # in this block
            model(images)
    """

    def __init__(self, names: str | Sequence[str]) -> None:
        self._names = _normalise(names, "backend")
        self._before: tuple[str, ...] | None = _current
        self._restored: list[tuple[str, ...]] = []
        _set_current(self._names)

    def __enter__(self) -> "backend":
        # The first block also ends what the constructor began, if that is still in force.
        first = self._before is not None and _current is self._names
        self._restored.append(self._before if first else _current)
        self._before = None
        _set_current(self._names)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _set_current(self._restored.pop())


def _set_current(names: tuple[str, ...]) -> None:
    global _current, _current_candidates
    _current, _current_candidates = names, _expand(names)


def current_backend() -> tuple[str, ...]:
    """The names in force where a call gives none."""
    return _current


def _candidates(names: str | Sequence[str] | None) -> tuple[tuple[str, bool], ...]:
    return _current_candidates if names is None else _expand(_normalise(names, "backend"))


def select(
    operation: Operation, names: str | Sequence[str] | None, *tensors: Tensor, **options: Any
) -> str:
    """The backend that runs ``operation`` on ``tensors``.

    Raises:
        BackendUnavailable: if none of the named backends can; the message gives each reason.
    """
    candidates = _candidates(names)
    device = tensors[0].device.type
    for name, by_auto in candidates:
        if by_auto and AUTO_DEVICE.get(name, device) != device:
            continue
        if operation.reason_against(name, *tensors, **options) is not None:
            continue
        if by_auto and operation.reason_to_avoid(name, *tensors, **options) is not None:
            continue
        return name
    reasons = "; ".join(
        f"{name}: {operation.reason_against(name, *tensors, **options)}" for name, _ in candidates
    )
    raise BackendUnavailable(f"{operation.name}: no requested backend can run: {reasons}")


def kernel_backends(names: str | Sequence[str] | None, device: str) -> tuple[str, ...]:
    """What ``names`` stands for on a type of device, without the reference; None: those in force.

    Raises:
        ValueError: for an unknown name, or an empty list.
    """
    found = (
        name
        for name, by_auto in _candidates(names)
        if name != "reference" and not (by_auto and AUTO_DEVICE.get(name, device) != device)
    )
    return tuple(dict.fromkeys(found))


def leading(names: str | Sequence[str] | None, device: str) -> str:
    """The first backend that ``names`` stands for on a type of device; None: those in force."""
    return next(
        name
        for name, by_auto in _candidates(names)
        if not (by_auto and AUTO_DEVICE.get(name, device) != device)
    )


def available_backends(
    operation: str | None = None, *, device: str | torch.device | None = None
) -> tuple[str, ...]:
    """Backends with code for a device of this machine, for one operation or for any.

    Whether a backend runs on a given tensor is for :func:`explain` to say.

    Args:
        operation: its name; None asks for those that any operation has.
        device: a type of device, such as ``"cuda"``, whose backends are wanted; None asks for
            those of all devices of this machine.

    Returns:
        In the order of :data:`BACKENDS`; empty where the machine has no such device.

    Raises:
        ValueError: for an unknown operation or type of device.
    """
    chosen = OPERATIONS.values() if operation is None else (_operation(operation),)
    kind = None if device is None else str(device).partition(":")[0]
    if kind is not None and not devices.is_present(kind):
        return ()
    return tuple(
        name
        for name in BACKENDS
        if any(op.presence(name) is None for op in chosen) and devices.refusal(name, kind) is None
    )


def _operation(name: str) -> Operation:
    if name not in OPERATIONS:
        known = ", ".join(sorted(OPERATIONS))
        raise ValueError(f"operation: expected one of {known}, got {name!r}")
    return OPERATIONS[name]


@dataclass(frozen=True)
class Explanation:
    """What would run, and why not the others; ``print`` it."""

    operation: str
    requested: tuple[str, ...]
    chosen: str | None
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.operation}: {self.chosen or 'nothing can run'}"
            f" (requested: {', '.join(self.requested)})"
        ]
        lines += [f"  not {name}: {reason}" for name, reason in self.refusals.items()]
        return "\n".join(lines)


def explain(
    operation: str,
    *tensors: Tensor,
    backend: str | Sequence[str] | None = None,
    **options: Any,
) -> Explanation:
    """Names the backend that a call would use and each refusal's reason.

    Args:
        operation: an operation's name, such as ``"depthwise_conv3x3"``.
        tensors: the operation's leading tensors (further arguments are ignored).
        backend: as in the operation itself.
        options: further arguments that bear on the choice, such as ``num_heads``.

    Raises:
        ValueError: for an unknown operation or backend, or too few tensors.
    """
    op = _operation(operation)
    leading = tensors[: len(op.tensors)]
    if len(leading) < len(op.tensors) or not all(isinstance(t, Tensor) for t in leading):
        raise ValueError(f"{operation}: expected the tensors {', '.join(op.tensors)}")
    candidates = _candidates(backend)
    try:
        chosen = select(op, backend, *leading, **options)
    except BackendUnavailable:
        chosen = None
    by_auto = any(auto for _, auto in candidates)
    named = {name for name, _ in candidates}
    refusals = {}
    for name in BACKENDS:
        if name == "sdpa" and name not in op.present and (by_auto or name not in named):
            continue
        reason = op.reason_against(name, *leading, **options)
        if reason is None and by_auto:
            reason = op.reason_to_avoid(name, *leading, **options)
        if reason is not None:
            refusals[name] = reason
    requested = tuple(_current if backend is None else _normalise(backend, "backend"))
    return Explanation(operation, requested, chosen, refusals)

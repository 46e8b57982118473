"""Whether a contender computes what it is timed for, against an oracle in float64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Values = Mapping[str, Tensor]
"""Outputs and gradients by name."""

DIRECTION = 0.01
"""How far from 1 a cosine may fall: a gradient of zeros cannot hide in a tolerance."""


@dataclass(frozen=True)
class Check:
    """Verdict on one contender: the worst error over what is allowed, and what failed."""

    passed: bool
    worst: float
    failures: tuple[str, ...] = ()


def check_errors(
    got: Values, references: Sequence[Values], oracle: Values, slack: float = 2.0
) -> Check:
    """err(got) ≤ slack·(err(reference) + eps·size(oracle)) for each value, as RMS.

    err is the distance to the oracle, size the oracle's own RMS, eps that of got's dtype; of
    several references, which have the same dtype, the largest error counts. The same holds of
    maxima with a quarter more: the largest error of few draws is a matter of chance.
    """
    return _check(got, references, oracle, partial(_error_excess, slack=slack))


def check_directions(got: Values, references: Sequence[Values], oracle: Values) -> Check:
    """1 − cos(got, oracle) ≤ 2·(1 − cos(reference, oracle)) + 0.01 for each value.

    Zeros have cosine 0 to anything but zeros.
    """
    return _check(got, references, oracle, _direction_excess)


def both(first: Check, second: Check) -> Check:
    """Passes if both pass."""
    return Check(
        first.passed and second.passed,
        max(first.worst, second.worst),
        first.failures + second.failures,
    )


def _check(got: Values, references: Sequence[Values], oracle: Values, excess) -> Check:
    worst, failures = 0.0, []
    for name, truth in oracle.items():
        value = got.get(name)
        if value is None or value.shape != truth.shape:
            shape = "nothing" if value is None else tuple(value.shape)
            failures.append(f"{name}: expected shape {tuple(truth.shape)}, got {shape}")
            worst = math.inf
            continue
        for what, error, limit in excess(value, [r[name] for r in references], truth):
            # Written so that NaN fails.
            if not error <= limit:
                failures.append(f"{name}: {what} {error:.3g}, allowed {limit:.3g}")
            share = error / limit if limit else (0.0 if error == 0 else math.inf)
            worst = max(worst, math.inf if math.isnan(share) else share)
    return Check(not failures, worst, tuple(failures))


def _error_excess(value: Tensor, references: Sequence[Tensor], truth: Tensor, slack: float):
    eps = torch.finfo(value.dtype).eps
    for what, norm, factor in (
        ("maximum error", _maximum, 1.25 * slack),
        ("RMS error", _rms, slack),
    ):
        allowed = max(norm(reference.double() - truth) for reference in references)
        yield what, norm(value.double() - truth), factor * (allowed + eps * norm(truth))


def _direction_excess(value: Tensor, references: Sequence[Tensor], truth: Tensor):
    allowed = max(1 - _cosine(reference.double(), truth) for reference in references)
    yield "1 - cosine", 1 - _cosine(value.double(), truth), 2 * allowed + DIRECTION


def _maximum(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _cosine(a: Tensor, b: Tensor) -> float:
    scale = a.norm().item() * b.norm().item()
    if scale == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return (a * b).sum().item() / scale

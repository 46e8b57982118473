"""The kernel of :mod:`.exponentials`."""

import triton
import triton.language as tl


@triton.jit
def chained(out, rounds, BLOCK: tl.constexpr):  # noqa: N803
    """``rounds`` exponentials per value, each of the one before, which stays between 0.5 and 1."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = offsets.to(tl.float32) * 1e-9
    for _ in range(rounds):
        values = tl.exp2(-values)
    tl.store(out + offsets, values)

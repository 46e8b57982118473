"""How many exponentials a GPU computes per second, and how many an attention needs."""

from dsnet.bench.cases import Stage
from dsnet.bench.device import Device
from dsnet.bench.report import Roof

EXPONENTIALS = "exponentials"
BUDGET = 0.5
"""Seconds of timing."""

BLOCK, BLOCKS, ROUNDS = 1024, 2112, 512
"""Values per block; blocks; exponentials per value, one after the other."""


def roof(device: Device) -> Roof | None:
    """The rate of exp2 in float32, from registers; None without Triton."""
    try:
        from .exponential_kernel import chained
    except ImportError:
        return None
    import torch

    out = torch.empty(BLOCK * BLOCKS, device=device.name)

    def call() -> None:
        chained[(BLOCKS,)](out, ROUNDS, BLOCK=BLOCK)

    timing = device.timer({EXPONENTIALS: call}, budget=BUDGET)[EXPONENTIALS]
    work = BLOCK * BLOCKS * ROUNDS
    return Roof(EXPONENTIALS, "float32", work, timing.median, timing.quartiles)


def needed(operation: str, stage: Stage) -> int:
    """Exponentials of the forward's softmaxes: one per score."""
    tokens = stage.batch * stage.global_grid[0] * stage.global_grid[1] * stage.num_heads
    if operation == "global_attention":
        return tokens * stage.global_grid[0] * stage.global_grid[1]
    if operation in ("co_attention", "alignment"):
        return 2 * tokens * stage.grid[0] * stage.grid[1]
    return 0

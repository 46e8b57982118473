"""The device of a phase: the GPU, or in a dry run the CPU as its stand-in."""

from dsnet.bench.device import Device, find, stand_in

from .program import Context


def device_of(context: Context) -> Device:
    """Where the phase's rows run."""
    return stand_in() if context.dry_run else find("cuda")

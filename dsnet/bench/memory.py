"""Peak memory of a call, as the operating system counts it: kernels' own buffers included."""

import ctypes
from collections.abc import Callable
from pathlib import Path

PROCESS = Path("/proc/self")


def peak_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which ``call`` raises this process's resident memory at most, outputs included.

    What earlier calls keep, such as a kernel's working memory, is not counted. None where the
    system cannot tell: it takes Linux and glibc.
    """
    try:
        # Freed memory goes back first: a call that reuses it would seem to need none.
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return 1024 * int(value.split()[0])
    raise RuntimeError(f"{PROCESS / 'status'}: expected a line {field}, found none")

"""Builds libdsnet_kernels_cuda.so: one compilation per operation, named as it starts."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cuda_toolkit import Toolkit, ToolkitError

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ("-std=c++17", "-O3", "-lineinfo", f"-I{SOURCES}")
"""nvcc's, for the library and for the gate of registers and spills."""
HIDDEN = ("-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
BINDINGS = ("-std=c++20", "-O3", *HIDDEN, "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020A000000000000")
WARNINGS = ("-Wall", "-Wextra", "-Wshadow")
LONGEST = ("co_attention", "co_attention_backward_keys", "pointwise_mlp_backward_fused")
"""Units to start first."""

# torch's CUDA library is linked to; a CPU torch to build against does not have it.
STAND_IN = """\
extern "C" __attribute__((visibility("default"))) int aoti_torch_get_current_cuda_stream(
    int, void**) { return 1; }
"""


class Host(NamedTuple):
    """What the host code is compiled with."""

    compiler: str
    torch: Path
    warnings_are_errors: bool


class Unit(NamedTuple):
    """One compilation."""

    title: str
    command: tuple[str, ...]
    output: Path


class Done(NamedTuple):
    """What a command printed, and the CPU seconds that it and its children took."""

    output: str
    seconds: float


def kernel_units() -> list[Path]:
    """The sources that nvcc compiles, those that take longest first."""
    order = {name: i for i, name in enumerate(LONGEST)}
    found = sorted((SOURCES / "cuda").glob("*.cu"))
    return sorted(found, key=lambda path: order.get(path.stem, len(order)))


def build(toolkit: Toolkit, host: Host, folder: Path, jobs: int) -> Path:
    """The library, written into ``folder``; what is newer than its sources is not built again.

    Raises:
        ToolkitError: if a command fails; its output is printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    units = [_kernels(path, toolkit, host, folder) for path in kernel_units()]
    bindings = sorted((SOURCES / "bindings" / "cuda").glob("*.cpp"))
    units += [_binding(path, toolkit, host, folder) for path in bindings]
    in_parallel(lambda unit: _compile(unit), units, jobs)
    stand_in = folder / "stand_in" / "libtorch_cuda.so"
    stand_in.parent.mkdir(exist_ok=True)
    source = folder / "torch_cuda.cpp"
    source.write_text(STAND_IN)
    shared = ("-shared", "-fPIC", f"-Wl,-soname,{stand_in.name}")
    run([host.compiler, *shared, str(source), "-o", str(stand_in)], stand_in.name)
    library = folder / "libdsnet_kernels_cuda.so"
    command = [str(toolkit.nvcc), "-ccbin", host.compiler, "-shared", *toolkit.flags]
    command += [str(unit.output) for unit in units]
    command += [str(stand_in), str(host.torch / "lib" / "libtorch_cpu.so")]
    print(f"link {library.name}", flush=True)
    run([*command, "-Xlinker", "-rpath,$ORIGIN", "-o", str(library)], library.name)
    return library


def _kernels(path: Path, toolkit: Toolkit, host: Host, folder: Path) -> Unit:
    output = folder / f"{path.stem}.o"
    command = [str(toolkit.nvcc), "-ccbin", host.compiler, *FLAGS, *toolkit.flags]
    command += ["-Xcompiler", ",".join(HIDDEN), *dependencies(output)]
    command += ["-Werror=all-warnings"] if host.warnings_are_errors else []
    numbers = " ".join(map(str, toolkit.architectures))
    title = f"nvcc {path.stem} for {numbers}"
    return Unit(title, (*command, "-c", str(path), "-o", str(output)), output)


def _binding(path: Path, toolkit: Toolkit, host: Host, folder: Path) -> Unit:
    output = folder / f"bindings_{path.stem}.o"
    warnings = [*WARNINGS, *(["-Werror"] if host.warnings_are_errors else [])]
    command = [host.compiler, *BINDINGS, *warnings, f"-I{SOURCES}", *dependencies(output)]
    command += ["-isystem", str(host.torch / "include")]
    title = f"bindings of {path.stem}"
    return Unit(title, (*command, "-c", str(path), "-o", str(output)), output)


def dependencies(output: Path) -> list[str]:
    """Options that write the headers that ``output`` came from."""
    return ["-MD", "-MF", str(output.with_suffix(".d"))]


def _compile(unit: Unit) -> None:
    stamp = unit.output.with_suffix(".json")
    text = json.dumps(unit.command)
    if stamp.exists() and stamp.read_text() == text and _is_newer(unit.output):
        return
    stamp.unlink(missing_ok=True)
    print(unit.title, flush=True)
    done = run(unit.command, unit.title)
    print(f"{done.output}{unit.title}: {done.seconds:.0f} CPU s", flush=True)
    stamp.write_text(text)


def _is_newer(output: Path) -> bool:
    """Whether every file that ``output`` came from is older."""
    try:
        built = output.stat().st_mtime
        rule = output.with_suffix(".d").read_text().replace("\\\n", " ")
        return all(Path(name).stat().st_mtime <= built for name in rule.split(":", 1)[1].split())
    except (OSError, IndexError):
        return False


def run(command: Sequence[str], title: str) -> Done:
    """Runs a command.

    Raises:
        ToolkitError: if it fails; its output is printed before.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise ToolkitError(f"{title}: {error}") from None
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        print(" ".join(command), text, sep="\n", flush=True)
        raise ToolkitError(f"{title}: {_reason(text, process.returncode)}")
    return Done(text, usage.ru_utime + usage.ru_stime)


def _reason(text: str, status: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line or "fatal" in line]
    return (errors or lines or [f"exit status {status}"])[0]


def in_parallel(function: Callable, items: Sequence, jobs: int) -> list:
    """``function`` of every item, in their order; after a failure no more are begun."""
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(function, item) for item in items]
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)

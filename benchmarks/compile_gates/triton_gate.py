"""Compiles the Triton kernels without a GPU and holds their resources to ``triton.json``.

    python -m benchmarks.compile_gates.triton_gate [--update]

Registers and shared memory may not exceed the table; a spill or a stack frame always fails. With
versions of Triton or ptxas other than the table's, more registers are reported and do not fail.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dsnet_kernels.triton import co_attention_launches as co_attention
from dsnet_kernels.triton import depthwise_conv3x3 as depthwise
from dsnet_kernels.triton import global_attention as attention
from dsnet_kernels.triton import norm_linear, products
from dsnet_kernels.triton import pointwise_mlp as mlp
from dsnet_kernels.triton import upsample_concat as upsample
from dsnet_kernels.triton.launch import Launch

TABLE = Path(__file__).with_name("triton.json")
ARCHITECTURES = (80, 90, 100)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
RESOURCES = {"registers": "REG", "shared": "SHARED", "stack": "STACK", "local": "LOCAL"}

SIZES = {"tokens", "threshold", "rows", "slots", "pixels", "height", "width"}
SIZES |= {"coarse_height", "coarse_width", "size", "coarse", "inner", "images", "splits"}
SIZES |= {
    "global_tokens",
    "heads",
    "channels",
    "local_width",
    "weight_stride",
    "outputs",
    "groups",
    "m_stride",
    "m_group",
}
SIZES |= {f"{of}_{what}" for of in ("x", "y", "out") for what in ("stride", "group")}
FLOATS = ("eps", "scale", "keep_scale", "factor")

Resources = dict[str, int]
Report = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One variant of a kernel as a call compiles it.

    An argument is a pointer, a constant, one of FLOATS, or else a 32-bit integer. Pointers are
    aligned to 16 bytes, as torch allocates, but those in ``unaligned``.
    """

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    unaligned: tuple[str, ...] = ()


def cases() -> Iterator[Case]:
    """Every kernel: each dtype, with channels that divide by 8, by 4 and by nothing."""
    for dtype, kind in TYPES.items():
        for channels in (64, 20, 17):
            yield from _depthwise(dtype, kind, channels)
        yield from _depthwise(dtype, kind, 64, unaligned=True)
    yield from _depthwise(torch.bfloat16, "bf16", 64, affine=False)
    launch = depthwise.sum_slots_launch(12 * 64)
    pointers = {"partials": "fp32", "sums": "fp32"}
    constants = launch.constants
    yield Case(launch.kernel.fn.__name__, launch.kernel, pointers, constants, launch.options)
    for dtype, kind in TYPES.items():
        yield from _attention(dtype, kind, heads=8)
    for heads in (1, 5):
        yield from _attention(torch.bfloat16, "bf16", heads, only="attention_few")
    yield from _attention(torch.bfloat16, "bf16", heads=2, dropout=True, only="attention_many")
    for dtype, kind in TYPES.items():
        for width in (64, 17):
            yield from _upsample(dtype, kind, width)
        yield from _co_attention(dtype, kind, 3136, 1, absorbed=True)
        yield from _co_attention(dtype, kind, 784, 2, absorbed=True)
        yield from _co_attention(dtype, kind, 196, 5, absorbed=False)
        for rows, width in ((200_704, 64), (12_544, 320)):
            yield from _mlp(dtype, kind, rows, width)
    for rows, width in ((50_176, 128), (784, 128), (12_544, 512), (49, 512), (50_176, 17)):
        yield from _mlp(torch.bfloat16, "bf16", rows, width)
    yield from _co_attention(torch.bfloat16, "bf16", 3136, 1, absorbed=True, dropout=True)
    yield from _co_attention(torch.bfloat16, "bf16", 196, 8, absorbed=True)
    yield from _co_attention(
        torch.bfloat16, "bf16", 196, 3, absorbed=True, width=17, global_tokens=9
    )


def _attention(
    dtype: torch.dtype,
    kind: str,
    heads: int,
    dropout: bool = False,
    only: str = "",
) -> Iterator[Case]:
    """What 64 images of 49 tokens take, and two of 1025, with heads of 32 channels.

    ``only`` is part of the names of the kernels.
    """
    width = 32 * heads
    few, many = (
        attention.Problem(batch, tokens, width, heads, dtype)
        for batch, tokens in ((64, 49), (2, 1025))
    )
    grad_weight, slots = norm_linear.grad_weight_launch(few.projection)
    launches = [
        attention.few_launch(few, attention.global_attention_few),
        attention.few_launch(few, attention.global_attention_few_grad),
        norm_linear.forward_launch(many.projection),
        *attention.many_launches(many).values(),
        norm_linear.grad_x_launch(few.projection),
        grad_weight,
        norm_linear.sum_slots_launch(few.projection, slots)[0],
    ]
    pointers = dict.fromkeys(("grad", "x", "out", "y", "qkv", "grad_qkv", "grad_x", "grad_y"), kind)
    pointers |= {"seed": "i64"} if dropout else {}
    for launch in launches:
        if only in launch.kernel.fn.__name__:
            suffix = f"{kind} C={width}{' dropout' if dropout else ''}"
            yield _launched(launch, suffix, pointers, () if dropout else ("seed",))


def _launched(
    launch: Launch, suffix: str, pointers: dict[str, str], absent: tuple[str, ...] = ()
) -> Case:
    """A launch as compiled; pointers are to float32 but those in ``pointers``."""
    names = launch.kernel.arg_names
    constants = dict.fromkeys((name for name in absent if name in names), None) | launch.constants
    others = set(names) - constants.keys() - (set(FLOATS) - pointers.keys()) - SIZES
    return Case(
        f"{launch.kernel.fn.__name__} {suffix}",
        launch.kernel,
        {name: pointers.get(name, "fp32") for name in others},
        constants,
        launch.options,
    )


def _upsample(dtype: torch.dtype, kind: str, width: int) -> Iterator[Case]:
    """What 64 images of 28×28 pixels with as many local as global channels take."""
    p = upsample.Problem(64, (28, 28), (7, 7), width, width, 2 * width, dtype)
    local, mixed = (width, width, 0), (2 * width, 2 * width, 0)
    suffix = f"{kind} C={2 * width}"
    streams = dict.fromkeys(("local", "residual", "out"), kind)
    yield _launched(upsample.forward_launch(p), suffix, streams)
    for x in dict.fromkeys((kind, "fp32")):
        yield _launched(
            upsample.adjoint_launch(p.pixels, p.channels), f"{suffix} from {x}", {"x": x}
        )
    absent = ("bias", "weights", "residual")
    launch = products.rows_launch(p.pixels, 1, mixed, (1, 2 * width, 0), local, dtype)
    yield _launched(launch, suffix, {"x": kind, "out": kind}, absent)
    launch, _ = products.transposed_launch(64 * 49, 1, mixed, local, 0, dtype)
    yield _launched(launch, suffix, {"y": kind})


def _co_attention(
    dtype: torch.dtype,
    kind: str,
    tokens: int,
    heads: int,
    absorbed: bool,
    width: int = 0,
    global_tokens: int = 49,
    dropout: bool = False,
) -> Iterator[Case]:
    """What 64 images take whose local stream has ``width`` channels, by default dim = 32·heads."""
    width = width or 32 * heads
    p = co_attention.Problem(64, tokens, global_tokens, width, width, heads, 32, dtype, absorbed)
    form = "absorbed" if absorbed else "projected"
    suffix = f"{kind} C={width} {form}{' dropout' if dropout else ''}"
    streams = ("queries", "keys", "values", "residual", "out", "grad", "grad_heads", "local_keys")
    streams += ("local_values", "global_queries", "grad_global", "attended")
    pointers = dict.fromkeys(streams, kind) | {"seed": "i64"}
    absent = () if dropout else ("seed",)
    absent += ("attended",) if absorbed else ("local_scale", "local_shift", "key_bias", "residual")
    absent += () if absorbed else ("bias", "grad", "constant", "partial_sums")
    for launch in (
        co_attention.to_local_launch(p),
        co_attention.to_global_launch(p)[0],
        co_attention.global_sums_launch(p)[0],
        co_attention.grad_local_launch(p),
        co_attention.grad_global_launch(p)[0],
    ):
        yield _launched(launch, suffix, pointers, absent)
    combine = co_attention.combine_launch(p)
    yield _launched(combine, suffix, {})


def _mlp(dtype: torch.dtype, kind: str, rows: int, width: int) -> Iterator[Case]:
    """What so many rows take, with four hidden channels for each one."""
    p = mlp.Problem(rows, rows, width, 4 * width, dtype)
    names = "x grad grad_branch grad_x out hidden activated grad_hidden residual matrix"
    pointers = dict.fromkeys((*names.split(), "fc1_weight", "fc2_weight"), kind) | {"scale": "fp32"}
    suffix = f"{kind} C={width} T={rows}"
    if p.fused:
        for launch in (mlp.forward_launch(p), mlp.grad_x_launch(p), mlp.grad_weights_launch(p)[0]):
            yield _launched(launch, suffix, pointers, ("hidden",))
        return
    for launch in (mlp.hidden_launch(p), mlp.grad_hidden_launch(p)):
        yield _launched(launch, suffix, pointers)
    forward, transposed = (
        mlp.residual_launch(p, strides) for strides in ((p.hidden, 1), (1, width))
    )
    yield _launched(forward, suffix, pointers, ("column_scale",))
    yield _launched(transposed, f"{suffix} transposed", pointers, ("bias", "branch_scale"))


def _depthwise(
    dtype: torch.dtype, kind: str, channels: int, affine: bool = True, unaligned: bool = False
) -> Iterator[Case]:
    shape = torch.Size((64, channels, 56, 56))
    suffix = f"{kind} C={channels}{'' if affine else ' plain'}{' unaligned' if unaligned else ''}"
    parameters = ("bias", "scale", "shift")
    absent = {} if affine else dict.fromkeys(parameters)
    present = dict.fromkeys(parameters if affine else (), "fp32") | {"weight": "fp32"}
    pack = depthwise.pack_of(channels)
    stride_pack = 1 if unaligned else pack
    folds = depthwise.folds(dtype, "shift" if affine else None)
    for flags, tiles, activations in (
        (
            {"RESIDUAL": True, "FOLD": folds},
            depthwise.forward_launch(shape, dtype),
            ("x", "out"),
        ),
        ({"RESIDUAL": True}, depthwise.backward_launch(shape), ("x", "grad", "grad_x")),
    ):
        launch = depthwise.kernel_launch(tiles, pack, stride_pack, **flags)
        names = set(launch.kernel.arg_names)
        pointers = present | dict.fromkeys(activations, kind) | {"partials": "fp32"}
        yield Case(
            f"{launch.kernel.fn.__name__} {suffix}",
            launch.kernel,
            {name: value for name, value in pointers.items() if name in names},
            {name: value for name, value in absent.items() if name in names} | launch.constants,
            launch.options,
            ("x", "grad") if unaligned else (),
        )


def compile_case(case: Case, architecture: int) -> CompiledKernel:
    """The kernel for sm_<architecture>."""
    signature = {
        name: "constexpr"
        if name in case.constants
        else f"*{case.pointers[name]}"
        if name in case.pointers
        else "fp32"
        if name in FLOATS
        else "i32"
        for name in case.kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(case.kernel.arg_names)
        if name in case.pointers and name not in case.unaligned
    }
    source = ASTSource(case.kernel, signature, case.constants, aligned)
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options)
    )


def parse_resources(text: str) -> Resources:
    """What ``cuobjdump --dump-resource-usage`` says of one kernel.

    Raises:
        ValueError: if a figure is missing.
    """
    found = {}
    for name, key in RESOURCES.items():
        match = re.search(rf"\b{key}:(\d+)", text)
        if match is None:
            raise ValueError(f"cuobjdump: expected {key}:<number> in its output, got {text!r}")
        found[name] = int(match[1])
    return found


def measure(case: Case, architecture: int) -> Resources:
    """Compiles a case and reads its resources; shared memory includes what a launch asks for."""
    kernel = compile_case(case, architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = parse_resources(text)
    return found | {"shared": found["shared"] + kernel.metadata.shared}


def versions() -> dict[str, str]:
    """Triton and the assembler it brings."""
    command = [TOOLS / "ptxas", "--version"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"triton": triton.__version__, "ptxas": re.search(r"V([\d.]+)", text)[1]}


def _measure_one(i_case: int, architecture: int) -> Resources:
    """Of the case with this place in ``cases``: kernels do not travel between processes."""
    return measure(list(cases())[i_case], architecture)


def measure_all() -> Report:
    """``versions`` and ``kernels``: name → architecture → resources; two compilers at a time."""
    names = [case.name for case in cases()]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = {
            name: {f"sm_{arch}": pool.submit(_measure_one, i, arch) for arch in ARCHITECTURES}
            for i, name in enumerate(names)
        }
        kernels = {
            name: {arch: future.result() for arch, future in by_architecture.items()}
            for name, by_architecture in found.items()
        }
    return {"versions": versions(), "kernels": kernels}


def compare(table: Report, found: Report) -> tuple[list[str], list[str]]:
    """(failures, remarks) of ``found`` against the checked-in ``table``."""
    failures, remarks = [], []
    same = table["versions"] == found["versions"]
    if not same:
        remarks.append(f"versions: the table has {table['versions']}, here {found['versions']}")
    for name in sorted(table["kernels"].keys() - found["kernels"].keys()):
        failures.append(f"{name}: in the table and no longer compiled; rerun with --update")
    for name, by_architecture in found["kernels"].items():
        for arch, resources in by_architecture.items():
            where = f"{name}, {arch}"
            for kind in ("stack", "local"):
                if resources[kind]:
                    failures.append(f"{where}: spills: {kind} memory of {resources[kind]} bytes")
            allowed = table["kernels"].get(name, {}).get(arch)
            if allowed is None:
                failures.append(f"{where}: not in the table; rerun with --update")
                continue
            for kind in ("registers", "shared"):
                if resources[kind] > allowed[kind]:
                    text = f"{where}: {kind} {resources[kind]}, the table allows {allowed[kind]}"
                    (failures if same else remarks).append(text)
    return failures, remarks


def render(report: Report) -> str:
    """The table as text."""
    lines = [f"{'kernel':<47} {'target':<7}" + "".join(f"{kind:>10}" for kind in RESOURCES)]
    for name, by_architecture in report["kernels"].items():
        for arch, resources in by_architecture.items():
            figures = "".join(f"{resources[kind]:>10}" for kind in RESOURCES)
            lines.append(f"{name:<47} {arch:<7}{figures}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="rewrite the table")
    update = parser.parse_args().update
    found = measure_all()
    print(render(found))
    table = found if update else json.loads(TABLE.read_text())
    failures, remarks = compare(table, found)
    for line in (*remarks, *failures):
        print(line, file=sys.stderr)
    if update and not failures:
        TABLE.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Other runtimes as baselines of a network's inference, made from the ONNX export of the reference.

They take the images as the others do, have as many threads as torch, and compute in the row's
dtype, which they are told: left to themselves some round to bfloat16 wherever the processor can.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from dsnet.export import onnx_bytes, require

from .networks import Outputs, Problem, named
from .row import Contender

EXPORT_PACKAGES = ("onnx", "onnxscript")

Network = Callable[[Tensor], Sequence[Tensor]]
"""From float32 images to float32 logits, or to a backbone's maps."""


@dataclass(frozen=True)
class Peer:
    """Another runtime.

    Args:
        package: what it is imported as, and the name of its distribution.
        dtypes: that it computes in.
        load: makes the network from (a float32 ONNX model, the dtype to compute in, threads).
    """

    package: str
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[bytes, torch.dtype, int], Network]


def refusal(name: str, dtype: torch.dtype, device: str) -> str | None:
    """Why the peer ``name`` takes no part in a row, or None."""
    peer = PEERS[name]
    if torch.device(device).type != "cpu":
        return f"it runs on the CPU, not on {device}"
    if dtype not in peer.dtypes:
        known = " and ".join(_short(each) for each in peer.dtypes)
        return f"it computes in {known} here, not in {_short(dtype)}"
    try:
        require((*EXPORT_PACKAGES, peer.package), "peers", "it")
    except ImportError as error:
        return str(error)
    return None


def contender(name: str, onnx: Callable[[], bytes], images: Tensor) -> Contender:
    """Inference by the peer ``name`` of ``images``, whose conversion is part of the time.

    The first call compiles, and exports unless another one has called ``onnx``.
    """

    @cache
    def network() -> Network:
        return PEERS[name].load(onnx(), images.dtype, torch.get_num_threads())

    def infer() -> Outputs:
        outputs = [each.to(images.dtype) for each in network()(images.contiguous().float())]
        return outputs[0] if len(outputs) == 1 else outputs

    return Contender(name, "baseline", infer, lambda: named(infer()), compiles=True)


def reference_onnx(problem: Problem) -> bytes:
    """The reference network in float32 with the rounded weights, for images of one shape."""
    with torch.inference_mode(False):
        model = problem.network("reference", torch.float32)
        return onnx_bytes(model, torch.zeros(problem.images.shape))


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of the installed ones of these baselines."""
    found = {}
    for package in (PEERS[name].package for name in names if name in PEERS):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _onnxruntime(model: bytes, dtype: torch.dtype, threads: int) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin after a call would take the next contender's cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]

    return run


def _openvino(model: bytes, dtype: torch.dtype, threads: int) -> Network:
    import openvino

    core = openvino.Core()
    precision = {torch.float32: openvino.Type.f32, torch.bfloat16: openvino.Type.bf16}[dtype]
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(model), "CPU", settings)
    # A hint: processors without bfloat16 instructions compute in float32.
    chosen = compiled.get_property("INFERENCE_PRECISION_HINT")
    if chosen != precision:
        raise RuntimeError(f"computes in {chosen}, not in {precision}, on this processor")

    def run(images: Tensor) -> list[Tensor]:
        results = compiled(images.numpy())
        return [torch.from_numpy(results[i]) for i in range(len(compiled.outputs))]

    return run


PEERS = {
    "onnxruntime": Peer("onnxruntime", (torch.float32,), _onnxruntime),
    "openvino": Peer("openvino", (torch.float32, torch.bfloat16), _openvino),
}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

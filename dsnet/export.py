"""Networks as files for other runtimes: ONNX, torch.export, AOTInductor.

A file is written under another name beside its own, read back, compared with eager PyTorch and only
then put in place.
"""

import contextlib
import copy
import importlib
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from .model import REDUCTIONS, DSNet, DSNetFeatures
from .optimize import optimize

SLACK = 16.0
"""Times the error of eager PyTorch: another runtime rounds elsewhere, a wrong file is far off."""

TRACED_BATCH = 2
"""Of a file for any batch: PyTorch would take 0 and 1 for constants."""

CHECKED_BATCHES = (1, 3)
"""Of a file for any batch: others than the traced one."""

Outputs = Sequence[Tensor]
Run = Callable[[Tensor], Outputs]
Write = Callable[[DSNet, Path, Tensor, bool], Run]
"""Writes (network, path, images, any batch) and returns what runs the file."""


class ExportError(RuntimeError):
    """A network that could not be exported, or a file that computes something else."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        suffix: of its name.
        dtypes: that its readers compute in.
        packages: that writing and checking import, all in the extra ``export``.
        write: see :data:`Write`.
    """

    suffix: str
    dtypes: tuple[torch.dtype, ...]
    packages: tuple[str, ...]
    write: Write


def export_model(
    model: DSNet,
    path: str | PathLike,
    *,
    format: str | None = None,  # noqa: A002
    size: tuple[int, int] = (224, 224),
    batch: int | None = None,
    overwrite: bool = False,
) -> float:
    """Writes ``model`` for inference in another runtime; the file appears checked or not at all.

    - ``onnx``: the reference path, in standard operators. Input ``images``; output ``logits``,
      without a classifier ``features``, of a backbone ``map0``, ``map1``, ….
    - ``torch``: what :func:`dsnet.optimize` makes of ``model``, for ``torch.export.load``, after
      ``import dsnet_kernels``, which defines the operators in it.
    - ``aoti``: the same compiled by AOTInductor, for ``torch._inductor.aoti_load_package``, after
      the same import. It reads other images than contiguous ones of this size and dtype wrongly,
      unless the environment has ``AOTI_RUNTIME_CHECK_INPUTS=1``, with which it refuses them.

    The last two call the kernels that ``auto``, or the backend in force, chooses here and now: they
    run on machines that have those kernels, and on the device that ``model`` is on.

    Args:
        model: left as it is.
        path: ``.onnx`` or ``.pt2``.
        format: default by the suffix: ``onnx``, or ``torch`` for ``.pt2``.
        size: of the images, (rows, columns). They are contiguous (B, C, H, W) in the dtype of
            ``model``.
        batch: images per call; None takes any number.
        overwrite: replace the file if it exists.

    Returns:
        The error of the file over what was allowed, at most 1. With err the distance to the
        reference in float64, allowed is 16·(err(reference) + eps·size(outputs)), in maximum and as
        RMS.

    Raises:
        ExportError: where the format cannot express the network, or the file's outputs are wrong.
        FileExistsError: if the file exists, unless ``overwrite``.
        ImportError: without the packages of a format.
        TypeError: for a model that is no DSNet, or a dtype that the format has not.
        ValueError: for an unknown format or suffix, a size below 32, or a batch below 1.
    """
    path = Path(path)
    name, kind = _format(format, path)
    _check_arguments(model, name, kind, size, batch)
    _check_target(path, overwrite)
    require(kind.packages, "export", f"format {name}")
    like = model.stages[0].embed.weight
    shape = (TRACED_BATCH if batch is None else batch, model.in_chans, *size)
    images = _random_images(shape, like)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        with torch.inference_mode(False), torch.no_grad(), _quiet():
            network = copy.deepcopy(model).eval()
            try:
                run = kind.write(network, temporary, images, batch is None)
            except Exception as error:
                raise ExportError(f"{path}: no {name} export: {_first_line(error)}") from error
            batches = CHECKED_BATCHES if batch is None else (batch,)
            worst = max(
                _check(path, run, network, _random_images((count, *shape[1:]), like))
                for count in batches
            )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _check_target(path, overwrite)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return worst


def onnx_bytes(network: DSNet, images: Tensor, any_batch: bool = False) -> bytes:
    """The reference path of ``network``, which is in evaluation, as a serialised ONNX model."""
    with torch.inference_mode(False), torch.no_grad(), _quiet():
        network = _with_reference(network)
        program = torch.onnx.export(
            network,
            (images,),
            dynamo=True,
            dynamic_shapes=_dynamic_batch() if any_batch else None,
            input_names=["images"],
            output_names=_output_names(network),
            verbose=False,
        )
    return program.model_proto.SerializeToString()


def require(packages: Sequence[str], extra: str, purpose: str) -> None:
    """Raises ImportError, naming the extra, where one of ``packages`` cannot be imported."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"{purpose} needs {package} ({error}): pip install 'dsnet-kernels[{extra}]'"
            ) from error


def _write_onnx(network: DSNet, path: Path, images: Tensor, any_batch: bool) -> Run:
    import onnxruntime

    path.write_bytes(onnx_bytes(network, images, any_batch))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        return [
            torch.from_numpy(out) for out in session.run(None, {"images": images.cpu().numpy()})
        ]

    return run


def _write_torch(network: DSNet, path: Path, images: Tensor, any_batch: bool) -> Run:
    program = _optimized_program(network, images, any_batch)
    torch.export.save(program, str(path))
    loaded = torch.export.load(str(path)).module()
    return lambda images: _listed(loaded(images))


def _write_aoti(network: DSNet, path: Path, images: Tensor, any_batch: bool) -> Run:
    program = _optimized_program(network, images, any_batch)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    loaded = torch._inductor.aoti_load_package(str(path))
    return lambda images: _listed(loaded(images))


FORMATS = {
    "onnx": Format(
        ".onnx", (torch.float32, torch.float16), ("onnx", "onnxscript", "onnxruntime"), _write_onnx
    ),
    "torch": Format(".pt2", (torch.float32, torch.bfloat16, torch.float64), (), _write_torch),
    "aoti": Format(".pt2", (torch.float32, torch.bfloat16, torch.float64), (), _write_aoti),
}


def _optimized_program(
    network: DSNet, images: Tensor, any_batch: bool
) -> torch.export.ExportedProgram:
    shapes = _dynamic_batch() if any_batch else None
    return torch.export.export(optimize(network), (images,), dynamic_shapes=shapes)


def _dynamic_batch() -> tuple[dict[int, torch.export.Dim]]:
    return ({0: torch.export.Dim("batch", min=1)},)


def _with_reference(network: DSNet) -> DSNet:
    """A copy whose every operation is the reference."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return network


def _check(path: Path, run: Run, network: DSNet, images: Tensor) -> float:
    """The error of ``run`` over what is allowed."""
    from .bench.check import check_errors

    reference = _with_reference(network)
    eager = _named(network, _listed(reference(images)))
    oracle = _named(network, _listed(reference.double()(images.double())))
    try:
        got = _named(network, run(images))
    except Exception as error:
        raise ExportError(
            f"{path}: not written: the file fails on {len(images)} images: {_first_line(error)}"
        ) from error
    check = check_errors(got, [eager], oracle, SLACK)
    if not check.passed:
        problems = "; ".join(check.failures)
        raise ExportError(
            f"{path}: not written: the file computes something else than the network on"
            f" {len(images)} images: {problems}"
        )
    return check.worst


def _listed(outputs: Tensor | Sequence[Tensor]) -> Outputs:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _named(network: DSNet, outputs: Outputs) -> dict[str, Tensor]:
    return {name: out.cpu() for name, out in zip(_output_names(network), outputs, strict=True)}


def _output_names(network: DSNet) -> list[str]:
    if isinstance(network, DSNetFeatures):
        return [f"map{i}" for i in range(len(network.out_indices))]
    return ["logits" if network.num_classes else "features"]


def _random_images(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def _format(name: str | None, path: Path) -> tuple[str, Format]:
    suffix = path.suffix.lower()
    if name is None:
        name = next((name for name, kind in FORMATS.items() if kind.suffix == suffix), None)
        if name is None:
            raise ValueError(f"path: expected a name ending in .onnx or .pt2, got {str(path)!r}")
    if name not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {name!r}")
    if FORMATS[name].suffix != suffix:
        expected = FORMATS[name].suffix
        raise ValueError(
            f"path: expected a name ending in {expected} for format {name}, got {str(path)!r}"
        )
    return name, FORMATS[name]


def _check_arguments(
    model: DSNet, name: str, kind: Format, size: tuple[int, int], batch: int | None
) -> None:
    if not isinstance(model, DSNet):
        raise TypeError(f"model: expected a DSNet, got {type(model).__name__}")
    dtype = model.stages[0].embed.weight.dtype
    if dtype not in kind.dtypes:
        known = ", ".join(str(each).removeprefix("torch.") for each in kind.dtypes)
        raise TypeError(f"model: expected {known} for format {name}, got {dtype}")
    if len(size) != 2 or min(size) < REDUCTIONS[-1]:
        raise ValueError(f"size: expected (rows, columns) of at least 32, got {size}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected at least 1 or None, got {batch}")


def _check_target(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, got a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already, and replacing it was not asked for")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: expected an existing folder to write to")


def _first_line(error: Exception) -> str:
    """The innermost reason: exporters wrap it into pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings about packages and functions of their own."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""Reading a checkpoint, checking it against a model, loading it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import STAGES, DSNet, create_model
from ..variants import PUBLIC_REDUCTION, VARIANTS
from .errors import CheckpointError, listing, shown
from .formats import PADDLE, read_file
from .layout import Architecture, add_batch_counts, from_public, is_public, per_stage

FORMAT_VERSION = "1"
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
_COUNT = ".num_batches_tracked"
# What Paddle adds to a state dict.
_NOT_WEIGHTS = "StructuredToParameterName@@"


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, renamed to ours; checked to be dense, finite numbers.

    Attributes:
        path: the file.
        format: ``"PyTorch"``, ``"legacy PyTorch"``, ``"Paddle"`` or ``"safetensors"``.
        layout: ``"public"`` or ``"dsnet"``, whose names the file has.
        tensors: by our names, in the file's dtypes.
        architecture: what the shapes tell of the network.
        global_reduction: r of each stage; None if the file does not tell.
        num_heads: of each stage; None if the file does not tell.
    """

    path: Path
    format: str
    layout: str
    tensors: Mapping[str, Tensor]
    architecture: Architecture
    global_reduction: tuple[int, ...] | None
    num_heads: tuple[int, ...] | None

    @property
    def variant(self) -> str | None:
        """Name of the published network that the file holds, None for another one."""
        name = self.architecture.variant
        heads = None if name is None else VARIANTS[name].num_heads
        return name if self.num_heads in (None, heads) else None

    def expect_variant(self, name: str) -> None:
        """Raises CheckpointError unless the file holds the network ``name``."""
        if self.variant != name:
            raise self._other_network(name)

    def expect_complete(self) -> None:
        """Raises CheckpointError unless the file holds all of the network its shapes describe."""
        self._match(self._described(), head=True)

    def build(self, name: str, *, head: bool = True, **kwargs: Any) -> DSNet:
        """``create_model(name)`` as the file describes it, with its weights; kwargs override.

        Without ``head`` the network gets no classifier unless ``num_classes`` is given.
        """
        self.expect_variant(name)
        # Shapes are compared before anything is allocated: a small file may claim large sizes.
        described = self._described().state_dict()
        self._refuse(misshapen=_misshapen(self.tensors, described))
        arguments = self.architecture.arguments()
        if self.global_reduction is not None:
            arguments["global_reduction"] = self.global_reduction
        if not head:
            arguments["num_classes"] = 0
        if kwargs.get("features_only"):
            arguments.pop("num_classes", None)
        model = create_model(name, **(arguments | kwargs))
        self.load_into(model, head=head)
        return model

    def load_into(self, model: DSNet, *, head: bool = True) -> None:
        """Copies the weights into ``model``, which keeps its dtype and device; all or none.

        Parts that the model has not, such as the classifier with ``num_classes=0``, are left out.

        Args:
            model: the network; its ``global_reduction`` stays.
            head: False leaves the classifier as it is.

        Raises:
            CheckpointError: if a tensor is missing, unexpected or misshapen, or does not fit into
                the model's dtype.
            ValueError: if the model is on the meta device.
        """
        target = model.state_dict()
        if any(tensor.is_meta for tensor in target.values()):
            raise ValueError("model: expected a model with memory, got one on the meta device")
        converted = {
            name: tensor.to(target[name].dtype) for name, tensor in self._match(model, head).items()
        }
        overflow = [name for name, tensor in converted.items() if not tensor.isfinite().all()]
        if overflow:
            dtype = target[overflow[0]].dtype
            raise CheckpointError(self.path, f"overflows {dtype} in {listing(overflow)}")
        with torch.no_grad():
            for name, tensor in converted.items():
                target[name].copy_(tensor)

    def _other_network(self, expected: str) -> CheckpointError:
        depths = ", ".join(map(str, self.architecture.depths))
        got = self.variant or "another network"
        problem = f"expected {expected}, got {got} with {depths} blocks per stage"
        return CheckpointError(self.path, problem)

    def _described(self) -> DSNet:
        """The network that the shapes describe, without memory."""
        name = self.architecture.variant
        if name is None:
            raise self._other_network(" or ".join(VARIANTS))
        try:
            return create_model(name, device="meta", **self.architecture.arguments())
        except (ValueError, RuntimeError) as error:
            problem = f"describes no possible network: {shown(str(error))}"
            raise CheckpointError(self.path, problem) from error

    def _match(self, model: DSNet, head: bool) -> dict[str, Tensor]:
        """The tensors for ``model``, which are then exactly those of its state dict."""
        self._expect_heads(model)
        expected = model.state_dict()
        parts = ["norm", "head", *(f"stages.{i}" for i in range(STAGES))]
        absent = [f"{part}." for part in parts if not _under(expected, f"{part}.")]
        skipped = tuple(absent if head else [*absent, "head."])
        tensors = {k: v for k, v in self.tensors.items() if not k.startswith(skipped)}
        expected = {k: v for k, v in expected.items() if not k.startswith(skipped)}
        missing = [name for name in expected if name not in tensors]
        misshapen = _misshapen(tensors, expected)
        hints = self.architecture.differences(Architecture.of(model.state_dict()))
        if "head.weight" in missing or any(text.startswith("head.weight") for text in misshapen):
            hints += "; load_checkpoint(..., head=False) loads all but the classifier"
        self._refuse(
            missing=missing,
            unexpected=[name for name in tensors if name not in expected],
            misshapen=misshapen,
            hints=hints,
        )
        return tensors

    def _refuse(self, hints: str = "", **problems: list[str]) -> None:
        found = [f"{kind}: {listing(names)}" for kind, names in problems.items() if names]
        if found:
            hints = f"; {hints.removeprefix('; ')}" if hints else ""
            problem = f"does not fit the network; {'; '.join(found)}{hints}"
            raise CheckpointError(self.path, problem, **problems)

    def _expect_heads(self, model: DSNet) -> None:
        """Heads leave no trace in the shapes, but change what the weights mean."""
        heads = self.num_heads
        if heads is None and self.variant is not None:
            heads = VARIANTS[self.variant].num_heads
        if heads is not None and heads != tuple(model.variant.num_heads):
            raise CheckpointError(
                self.path, f"expected a network of {model.variant.num_heads} heads, got {heads}"
            )
        if self.variant is not None and model.variant in VARIANTS.values():
            names = {variant: name for name, variant in VARIANTS.items()}
            self.expect_variant(names[model.variant])


def read_checkpoint(path: str | PathLike, *, model_ema: bool = False) -> Checkpoint:
    """Reads a checkpoint of any known format, see :func:`load_checkpoint`.

    Raises:
        CheckpointError: for a file that is missing, foreign, damaged, no DS-Net, or holds more
            than data.
    """
    path = Path(path)
    format_, content, metadata = read_file(path)
    state = _checked(path, _state_dict(path, content, model_ema))
    public = is_public(state)
    if format_ == PADDLE and not public:
        raise CheckpointError(path, "expected the public names in a Paddle checkpoint")
    try:
        tensors = from_public(state, paddle=format_ == PADDLE) if public else dict(state)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
    if not _under(tensors, "stages."):
        raise CheckpointError(path, f"expected a DS-Net, got other tensors: {listing(state)}")
    add_batch_counts(tensors)
    if public:
        global_reduction, num_heads = PUBLIC_REDUCTION, None
    else:
        global_reduction = _recorded(path, metadata, "global_reduction")
        num_heads = _recorded(path, metadata, "num_heads")
    return Checkpoint(
        path=path,
        format=format_,
        layout="public" if public else "dsnet",
        tensors=tensors,
        architecture=Architecture.of(tensors),
        global_reduction=global_reduction,
        num_heads=num_heads,
    )


def load_checkpoint(
    model_or_name: DSNet | str,
    path: str | PathLike,
    *,
    model_ema: bool = False,
    head: bool = True,
    global_reduction: Sequence[int] | None = None,
    **kwargs: Any,
) -> DSNet:
    """Loads weights from the public PyTorch or Paddle layout, or from our safetensors.

    The format is read off the content, and nothing in the file can run. Either all of the file
    is loaded or nothing changes. The public checkpoints were trained with
    ``global_reduction=(8, 4, 2, 2)``, ours record their own: the network takes it over.

    Args:
        model_or_name: a network, which keeps its dtype and device, or the name of one to build as
            the file describes it.
        path: the file.
        model_ema: take the averaged weights of a training checkpoint.
        head: False leaves out the classifier, to load weights for other classes: a given network
            keeps its own, a built one has none, or a new one with ``num_classes``.
        global_reduction: of the network, in place of the file's.
        kwargs: with a name, further arguments of :func:`dsnet.create_model`.

    Returns:
        The network.

    Raises:
        CheckpointError: if the file cannot be read or does not fit; names what is missing,
            unexpected or misshapen.
        TypeError, ValueError: for a bad argument.
    """
    if isinstance(model_or_name, str) and model_or_name not in VARIANTS:
        raise ValueError(f"name: expected one of {', '.join(VARIANTS)}, got {model_or_name!r}")
    if not isinstance(model_or_name, (str, DSNet)):
        got = type(model_or_name).__name__
        raise TypeError(f"model_or_name: expected a DSNet or a name, got {got}")
    if global_reduction is not None:
        global_reduction = per_stage("global_reduction", global_reduction)

    if isinstance(model_or_name, str):
        if global_reduction is not None:
            kwargs["global_reduction"] = global_reduction
        file = read_checkpoint(path, model_ema=model_ema)
        return file.build(model_or_name, head=head, **kwargs)

    if kwargs:
        raise TypeError(f"{', '.join(kwargs)}: only with a name, got a network")
    file = read_checkpoint(path, model_ema=model_ema)
    file.load_into(model_or_name, head=head)
    _set_global_reduction(model_or_name, global_reduction or file.global_reduction)
    return model_or_name


def _set_global_reduction(model: DSNet, global_reduction: tuple[int, ...] | None) -> None:
    if global_reduction is None:
        return
    model.global_reduction = global_reduction
    # A backbone may have fewer stages.
    for stage, reduction in zip(model.stages, global_reduction, strict=False):
        for block in stage.blocks:
            block.global_reduction = reduction


def _state_dict(path: Path, content: Any, model_ema: bool) -> dict[str, Any]:
    """The state dict in a file's content: under "model" or "model_ema", or all of it."""
    if not isinstance(content, dict):
        got = type(content).__name__
        raise CheckpointError(path, f"expected a dict of tensors, got {got}")
    if model_ema and not isinstance(content.get("model_ema"), dict):
        keys = listing(map(str, content))
        raise CheckpointError(path, f"expected averaged weights under 'model_ema', got keys {keys}")
    state = content["model_ema"] if model_ema else content.get("model", content)
    if not isinstance(state, dict) or not all(type(name) is str for name in state):
        raise CheckpointError(path, "expected a dict of tensors by name under 'model'")
    state = {name: value for name, value in state.items() if name != _NOT_WEIGHTS}
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _checked(path: Path, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, once they are known to be what a network can hold."""
    tensors = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            problem = f"expected a tensor, got {type(value).__name__}"
        elif not _is_dense(value):
            problem = "expected a dense tensor of own memory"
        elif name.endswith(_COUNT):
            problem = (
                None
                if value.dtype in FLOATING + INTEGERS
                else f"expected a number, got {value.dtype}"
            )
        elif value.dtype not in FLOATING:
            problem = f"expected floating-point numbers, got {value.dtype}"
        elif not value.isfinite().all():
            problem = "expected finite numbers, got inf or nan"
        elif name.endswith(("running_var", "._variance")) and (value < 0).any():
            problem = "expected variances, got a negative number"
        else:
            problem = None
        if problem:
            raise CheckpointError(path, f"{shown(name)}: {problem}")
        value = value.detach()
        # A count that was cast to half precision may be infinite.
        tensors[name] = value.nan_to_num(0, 0, 0).long() if name.endswith(_COUNT) else value
    return tensors


def _is_dense(tensor: Tensor) -> bool:
    """Each element has its own place in memory, with no gaps: what a small file cannot inflate."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_nested:
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.numel():
        return False
    places = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != places:
            return False
        places *= size
    return True


def _recorded(path: Path, metadata: Mapping[str, str], name: str) -> tuple[int, ...] | None:
    """An entry of our metadata with one number per stage; None if it is absent."""
    version = metadata.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        problem = f"expected format_version {FORMAT_VERSION}, got {shown(version)}"
        raise CheckpointError(path, problem)
    if name not in metadata:
        return None
    try:
        return per_stage(name, json.loads(metadata[name]))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"metadata: {shown(str(error))}") from error


def _under(tensors: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _misshapen(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """``name (expected shape, got shape)`` where both have the name."""
    return [
        f"{name} (expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)})"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]

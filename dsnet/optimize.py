"""Networks for inference: norms folded, kernels chosen, CUDA graphs."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsnet_kernels import backends

from .block import DSBlock
from .model import DSNet, DSNetFeatures
from .optimized import Optimized, OptimizedBlock, OptimizedDSNet, PatchEmbedding
from .optimized.fold import ChannelAffine, constant_affine, rounded, wide
from .optimized.network import folded_classifier


def optimize(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    backend: str | Sequence[str] | None = None,
    strict: bool = False,
    graphs: int = 8,
) -> Optimized:
    """``model`` for inference: the same call, the same results but for rounding.

    With BN(x) = s·x + t, s = weight / √(var + eps) and t = bias − mean·s, formed in float64:

    - before the split and before the MLP: W·BN(x) + b = (W·diag(s))·x + (b + W·t);
    - before the local depthwise convolution and co-attention: s and t are constants of the
      operation, which applies them before its zero padding;
    - before the classifier: W·mean(BN(x)) + b = (W·diag(s))·mean(x) + (b + W·t).

    In bfloat16 and float16 a folded layer rounds at the size of s·x, as x itself is rounded, not at
    that of s·x + t, which is smaller where a mean is far above the deviation. The rounding of
    folded weights at the mean, (W·diag(s) − W')·mean, is added to the bias.

    Args:
        model: a DSNet, or any module that holds DSBlocks; it is left as it is. Outside the blocks,
            and the last norm of a DSNet, the copy of it only changes its dtype.
        dtype: of the parameters and of the images that it then takes: float32, float64, bfloat16,
            or float16 on a GPU. None keeps them.
        backend: of every operation, name or list of names; None follows
            :class:`dsnet_kernels.backend`.
        strict: raise where an operation would run on the reference on the parameters' device. Each
            block is tried at once on its smallest input; what depends on other shapes raises in the
            call. The backends are then those of now, whatever is in force later.
        graphs: CUDA graphs that each DSNet in the model keeps at most; 0 turns them off.

    Returns:
        A module in evaluation mode for good, without gradients of parameters; copies and pickles
        as any other. ``original_state_dict()`` is that of ``model``, a copy kept on the CPU. The
        ``forward`` of a DSNet, alone or within another module, runs on a GPU through CUDA graphs
        under ``torch.no_grad`` or ``torch.inference_mode``, outside autocast and compilation. The
        second call with a shape captures, ``warm_up(shapes)`` does so before; the last used ones
        are kept. Hooks on blocks do not fire, nor, within a graph, do others.

    Raises:
        TypeError: for a model that is no module, a norm that is no BatchNorm, a block with a
            forward of its own, or a wrong dtype.
        ValueError: for a model without DSBlocks, without data or without running statistics, for
            an unknown backend or a negative ``graphs``.
        dsnet_kernels.BackendUnavailable: with ``strict``, naming block, operation and reasons.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("model: expected parameters with data, got some on the meta device")
    if not any(isinstance(module, DSBlock) for module in model.modules()):
        raise ValueError(
            f"model: expected a DSNet or another module with DSBlocks, got {type(model).__name__}"
        )
    if dtype is not None:
        _check_dtype(dtype, {tensor.device.type for tensor in tensors})
    if backend is not None:
        backends._normalise(backend, "backend")
    if not isinstance(graphs, int) or graphs < 0:
        raise ValueError(f"graphs: expected a count, 0 for none, got {graphs!r}")
    # Outside inference mode, whose tensors autograd would refuse later.
    with torch.inference_mode(False), torch.no_grad():
        source = copy.deepcopy(model).eval()
        blocks = _optimized_blocks(source, dtype, backend, strict)
        original = _host_copy(model.state_dict())
        # Before their norms go.
        classifiers = {
            name: folded_classifier(network, dtype) for name, network in _networks(source)
        }
        module = _replaced(source, dtype, blocks, backend)
        if isinstance(module, DSNet):
            kept = graphs if "" in classifiers else 0
            return OptimizedDSNet(module, original, classifiers.get(""), kept)
        made: dict[nn.Module, OptimizedDSNet] = {}
        # All before the first is replaced: two names may lead through one container.
        networks = {name: module.get_submodule(name) for name in classifiers}
        for name, network in networks.items():
            if network not in made:
                state = _below(name, original)
                made[network] = OptimizedDSNet(network, state, classifiers[name], graphs)
            module.set_submodule(name, made[network])
        return Optimized(module, original)


def _networks(source: nn.Module) -> list[tuple[str, DSNet]]:
    """The DSNets in ``source``, by every name, whose forward is our own: image to tensors."""
    return [
        (name, network)
        for name, network in source.named_modules(remove_duplicate=False)
        if isinstance(network, DSNet)
        and type(network).forward in (DSNet.forward, DSNetFeatures.forward)
    ]


def _below(name: str, state: "OrderedDict[str, Any]") -> "OrderedDict[str, Any]":
    """The part of ``state`` that belongs to the module of that name."""
    prefix = f"{name}."
    return OrderedDict(
        (key.removeprefix(prefix), value) for key, value in state.items() if key.startswith(prefix)
    )


def _check_dtype(dtype: torch.dtype, devices: set[str]) -> None:
    known = [torch.float32, torch.float64, torch.bfloat16]
    if "cpu" not in devices:
        known.append(torch.float16)
    if dtype not in known:
        names = ", ".join(str(each).removeprefix("torch.") for each in known)
        raise TypeError(f"dtype: expected {names} or None on {'/'.join(devices)}, got {dtype}")


def _optimized_blocks(
    source: nn.Module,
    dtype: torch.dtype | None,
    backend: str | Sequence[str] | None,
    strict: bool,
) -> dict[str, OptimizedBlock]:
    """What stands for the DSBlocks of ``source``, by their names; one of two names stays one."""
    made: dict[DSBlock, OptimizedBlock] = {}
    found = {}
    for name, block in source.named_modules(remove_duplicate=False):
        if not isinstance(block, DSBlock):
            continue
        label = name or type(block).__name__
        if block not in made:
            _check_forward(block, label)
            chosen = _kernel_backends(backend, block) if strict else backend
            made[block] = OptimizedBlock(block, label, dtype=dtype, backend=chosen)
            if strict:
                _try(made[block])
        found[name] = made[block]
    return found


def _check_forward(block: DSBlock, name: str) -> None:
    for method in ("forward", "forward_streams"):
        if getattr(type(block), method) is not getattr(DSBlock, method):
            raise TypeError(
                f"model: expected DSBlock's own {method} in {name},"
                f" got that of {type(block).__name__}"
            )


def _kernel_backends(names: str | Sequence[str] | None, block: DSBlock) -> tuple[str, ...]:
    found = backends.kernel_backends(names, block.split.weight.device.type)
    if not found:
        raise ValueError(f"backend: expected one with kernels where strict, got {names!r}")
    return found


def _try(block: OptimizedBlock) -> None:
    """One run on the smallest input, on which every operation finds its backend or raises."""
    weight, side = block.fuse.weight, block.global_reduction
    block(torch.zeros(1, block.dim, side, side, dtype=weight.dtype, device=weight.device))


def _replaced(
    source: nn.Module,
    dtype: torch.dtype | None,
    blocks: dict[str, OptimizedBlock],
    backend: str | Sequence[str] | None,
) -> nn.Module:
    """``source`` in ``dtype`` with optimised blocks, and of DSNets the rest."""
    replacements: dict[str, nn.Module] = dict(blocks)
    for name, network in source.named_modules():
        if isinstance(network, DSNet):
            prefix = f"{name}.stages" if name else "stages"
            for index, stage in enumerate(network.stages):
                if PatchEmbedding.stands_for(stage.embed):
                    embedding = PatchEmbedding(stage.embed, backend)
                    replacements[f"{prefix}.{index}.embed"] = embedding
        if isinstance(network, DSNet) and not isinstance(network.norm, nn.Identity):
            name = f"{name}.norm" if name else "norm"
            affine = constant_affine(network.norm, name)
            weight = next(network.stages.parameters())
            width = wide(weight.dtype if dtype is None else dtype)
            replacements[name] = ChannelAffine(*(rounded(each, width, weight) for each in affine))
    if "" in replacements:
        return replacements[""]
    # In place, also of what the replacements share with it.
    source.to(dtype=dtype)
    for name, module in replacements.items():
        source.set_submodule(name, module)
    return source


def _host_copy(state: "OrderedDict[str, Any]") -> "OrderedDict[str, Any]":
    """``state``, changed in place so that it keeps its metadata, with copies in its values."""
    for name, value in state.items():
        is_tensor = isinstance(value, Tensor)
        state[name] = value.cpu().clone() if is_tensor else copy.deepcopy(value)
    return state

"""What is measured: each operation as the network uses it, with its FLOPs and bytes by formula.

One entry of :data:`CASES` adds an operation, or another use of one; the stages of the network and
the image size give its shapes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsnet.block import stream_widths
from dsnet.model import REDUCTIONS
from dsnet.variants import PAPER_REDUCTION, VARIANTS
from dsnet_kernels import available_backends
from dsnet_kernels.backends import OPERATIONS

from .row import BASELINES, EAGER_BASELINES, SDPA

_MLP_RATIO = 4

Shapes = Mapping[str, tuple[int, ...]]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Stage:
    """One stage of a network at one image size and batch."""

    number: int
    batch: int
    channels: int
    local_channels: int
    global_channels: int
    num_heads: int
    grid: tuple[int, int]
    global_grid: tuple[int, int]
    image: tuple[int, int]


def stages(model: str, batch: int, size: tuple[int, int]) -> list[Stage]:
    """The stages of the published network ``model`` for images of ``size`` (rows, columns)."""
    variant = VARIANTS[model]
    result = []
    for i, reduction in enumerate(REDUCTIONS):
        channels, heads = variant.embed_dims[i], variant.num_heads[i]
        local, global_ = stream_widths(channels, heads, 0.5)
        grid = tuple(n // reduction for n in size)
        coarse = tuple(max(1, n // PAPER_REDUCTION[i]) for n in grid)
        result.append(Stage(i + 1, batch, channels, local, global_, heads, grid, coarse, size))
    return result


@dataclass(frozen=True)
class Call:
    """What the choice of a backend looks at in one call.

    Args:
        operation: name in ``dsnet_kernels``.
        tensors: those that the operation is dispatched on.
        options: the other arguments that bear on the choice.
    """

    operation: str
    tensors: Sequence[Tensor]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One use of one operation, or of several in turn.

    Args:
        operation: name in ``dsnet_kernels``; of several operations, what they are together.
        use: what distinguishes this use, in a word.
        formula: what it computes.
        shapes: of the tensor arguments at a stage, by name.
        activations: those of them that are activations, the first one the largest; the others are
            parameters.
        constants: the other arguments at a stage.
        options: arguments that bear on the choice of a backend.
        flops: of the forward and of the backward; a multiplication and an addition are two.
        elements: read and written by the forward and by the backward, each activation once.
        baselines: compared with unless the user names others.
        offered: all that it can be compared with.
    """

    operation: str
    use: str
    formula: str
    shapes: Callable[[Stage], Shapes]
    flops: Callable[[Stage], tuple[int, int]]
    elements: Callable[[Stage], tuple[int, int]]
    activations: tuple[str, ...] = ("x",)
    constants: Callable[[Stage], Mapping[str, Any]] = lambda stage: {}
    options: tuple[str, ...] = ()
    baselines: tuple[str, ...] = BASELINES
    offered: tuple[str, ...] = BASELINES

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that :meth:`function` consists of."""
        return (self.operation,)

    def available_backends(self) -> list[str]:
        """Those that are here for each of its operations."""
        first, *others = map(available_backends, self.operations)
        return [name for name in first if all(name in found for found in others)]

    def function(self, find: Callable[[str], Function]) -> Function:
        """What is timed, with ``find`` giving an operation by its name."""
        return find(self.operation)

    def calls(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> Iterator[Call]:
        """The operations that :meth:`function` calls with these arguments."""
        arguments = {**tensors, **constants}
        yield Call(
            self.operation,
            [tensors[name] for name in OPERATIONS[self.operation].tensors],
            {name: arguments[name] for name in self.options},
        )

    def empty(self, stage: Stage, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """Arguments of the right shapes and layouts without values."""
        result = {}
        for name, shape in self.shapes(stage).items():
            is_image = len(shape) == 4 and name in self.activations
            layout = torch.channels_last if is_image else torch.contiguous_format
            result[name] = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
        return result

    def tensors(
        self, stage: Stage, dtype: torch.dtype, seed: int, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Random arguments rounded to ``dtype``, 4-D activations in ``channels_last``.

        They are drawn on ``device``, in float32.

        Parameters are of a network's size, so that softmaxes are not steep: of what a steep one
        has little of, the error is a matter of chance.
        """
        generator = torch.Generator(device).manual_seed(seed)
        result = {}
        for name, shape in self.shapes(stage).items():
            value = torch.randn(shape, generator=generator, device=device)
            if name not in self.activations:
                value *= 0.1 if len(shape) == 1 else value[0].numel() ** -0.5
                value += name.endswith(("scale", "norm_weight"))
            value = value.to(dtype)
            if value.dim() == 4 and name in self.activations:
                value = value.contiguous(memory_format=torch.channels_last)
            result[name] = value
        return result

    def work(self, stage: Stage, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
        """(FLOPs, bytes) of the forward, or of forward and backward together."""
        parts = 2 if backward else 1
        return sum(self.flops(stage)[:parts]), sum(self.elements(stage)[:parts]) * dtype.itemsize


@dataclass(frozen=True)
class Alignment(Case):
    """co_attention, then upsample_concat of both new streams, as in the block."""

    @property
    def operations(self) -> tuple[str, ...]:
        return "co_attention", "upsample_concat"

    def function(self, find: Callable[[str], Function]) -> Function:
        return partial(_align, *map(find, self.operations))

    def calls(self, tensors: Mapping[str, Tensor], constants: Mapping[str, Any]) -> Iterator[Call]:
        local, tokens = tensors["local"], tensors["global_"]
        arguments = {**tensors, **constants}
        options = {name: arguments[name] for name in self.options}
        yield Call("co_attention", (local, tokens), options)
        yield Call("upsample_concat", (local, _to_grid(tokens, constants["global_grid"])), {})


def _align(
    co_attention: Function,
    upsample_concat: Function,
    *,
    residual: Tensor,
    local: Tensor,
    global_: Tensor,
    weight: Tensor,
    bias: Tensor,
    global_grid: tuple[int, int],
    **attention: Any,
) -> Tensor:
    local, tokens = co_attention(local, global_, **attention)
    return upsample_concat(local, _to_grid(tokens, global_grid), weight, bias, residual)


def _to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, grid)


def _depthwise_shapes(batch: int, channels: int, grid: tuple[int, int], affine: bool) -> Shapes:
    parameters = {"weight": (channels, 1, 3, 3), "bias": (channels,)}
    if affine:
        parameters |= {"scale": (channels,), "shift": (channels,)}
    return {"x": (batch, channels, *grid), **parameters}


def _pixels(s: Stage) -> int:
    return s.batch * s.grid[0] * s.grid[1]


def _attention_shapes(s: Stage) -> Shapes:
    width = s.global_channels
    return {
        "x": (s.batch, _tokens(s), width),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "qkv_weight": (3 * width, width),
        "qkv_bias": (3 * width,),
    }


def _tokens(s: Stage) -> int:
    return s.global_grid[0] * s.global_grid[1]


def _attention_flops(s: Stage) -> int:
    """Of the forward's products: the projection to Q, K and V, the scores, the weighted sums."""
    tokens, width = _tokens(s), s.global_channels
    return s.batch * (6 * tokens * width**2 + 4 * tokens**2 * width)


def _co_attention_shapes(s: Stage) -> Shapes:
    dim, local, global_ = s.global_channels, s.local_channels, s.global_channels
    return {
        "local": (s.batch, local, *s.grid),
        "global_": (s.batch, _tokens(s), global_),
        "global_norm_weight": (global_,),
        "global_norm_bias": (global_,),
        "local_qkv_weight": (3 * dim, local),
        "local_qkv_bias": (3 * dim,),
        "global_qkv_weight": (3 * dim, global_),
        "global_qkv_bias": (3 * dim,),
        "local_proj_weight": (local, dim),
        "local_proj_bias": (local,),
        "global_proj_weight": (global_, dim),
        "global_proj_bias": (global_,),
        "local_scale": (local,),
        "local_shift": (local,),
    }


def _co_attention_flops(s: Stage) -> int:
    """Of the forward's products as the equations have them: projections, scores, weighted sums."""
    dim = s.global_channels
    scores = _pixels(s) * _tokens(s) * dim
    return 8 * dim * _streams(s) + 8 * scores


def _mixing_shapes(s: Stage) -> Shapes:
    return {
        "local": (s.batch, s.local_channels, *s.grid),
        "global_": (s.batch, s.global_channels, *s.global_grid),
        "weight": (s.channels, s.local_channels + s.global_channels),
        "bias": (s.channels,),
        "residual": (s.batch, s.channels, *s.grid),
    }


def _mixing_flops(s: Stage) -> int:
    """Of the forward's products: the local half on its grid, the global half on the coarse one."""
    return 2 * _streams(s) * s.channels


def _streams(s: Stage) -> int:
    """Elements of both streams."""
    return _pixels(s) * s.local_channels + s.batch * _tokens(s) * s.global_channels


def _alignment_shapes(s: Stage) -> Shapes:
    """The global stream as tokens, which co_attention takes and the block has."""
    mixing, attention = _mixing_shapes(s), _co_attention_shapes(s)
    return {name: mixing[name] for name in ("residual", "weight", "bias")} | attention


def _mlp_shapes(s: Stage) -> Shapes:
    hidden = _MLP_RATIO * s.channels
    return {
        "x": (s.batch, s.channels, *s.grid),
        "fc1_weight": (hidden, s.channels),
        "fc1_bias": (hidden,),
        "fc2_weight": (s.channels, hidden),
        "fc2_bias": (s.channels,),
        "scale": (s.channels,),
        "shift": (s.channels,),
    }


def _mlp_flops(s: Stage) -> int:
    """Of the forward's two products."""
    return 4 * _MLP_RATIO * _pixels(s) * s.channels**2


# Depthwise 3×3 per element: 9 MACs, bias included, + 2 of the affine + 1 of the residual; in the
# backward as many MACs for grad x and for grad weight each. Read x, write the output; backward:
# read the output's gradient and x, write x's gradient. Attention: products alone, twice as many in
# the backward (what it recomputes is its own affair); reads and writes as above. Co-attention: the
# same of both streams. Mixing: the same, the residual read in the forward, its gradient that of the
# output. The MLP: the same as attention. The alignment: the products of both operations, and what
# it has from outside, as in mixing; the streams between them count as never stored.
CASES: tuple[Case, ...] = (
    Case(
        operation="depthwise_conv3x3",
        use="local",
        formula="x + conv(scale·x + shift)",
        shapes=lambda s: _depthwise_shapes(s.batch, s.local_channels, s.grid, affine=True),
        constants=lambda s: {"residual": True},
        flops=lambda s: (21 * _pixels(s) * s.local_channels, 42 * _pixels(s) * s.local_channels),
        elements=lambda s: (2 * _pixels(s) * s.local_channels, 3 * _pixels(s) * s.local_channels),
    ),
    Case(
        operation="depthwise_conv3x3",
        use="position",
        formula="x + conv(x)",
        shapes=lambda s: _depthwise_shapes(s.batch, s.channels, s.grid, affine=False),
        constants=lambda s: {"residual": True},
        # Compiling takes longer than all timing: by default once per stage and direction, above.
        baselines=EAGER_BASELINES,
        flops=lambda s: (19 * _pixels(s) * s.channels, 38 * _pixels(s) * s.channels),
        elements=lambda s: (2 * _pixels(s) * s.channels, 3 * _pixels(s) * s.channels),
    ),
    Case(
        operation="global_attention",
        use="attention",
        formula="x + MHSA(LN(x))",
        shapes=_attention_shapes,
        constants=lambda s: {"num_heads": s.num_heads},
        options=("num_heads",),
        # Tokens have one layout. Compiling is left to those who ask: the time, as above.
        baselines=("eager_channels_last", SDPA),
        offered=("eager_channels_last", SDPA, "compile"),
        flops=lambda s: (_attention_flops(s), 2 * _attention_flops(s)),
        elements=lambda s: (
            2 * s.batch * _tokens(s) * s.global_channels,
            3 * s.batch * _tokens(s) * s.global_channels,
        ),
    ),
    Case(
        operation="co_attention",
        use="exchange",
        formula="both streams x: x + MHA(queries of x; keys and values of the other)",
        shapes=_co_attention_shapes,
        activations=("local", "global_"),
        constants=lambda s: {"num_heads": s.num_heads},
        options=("num_heads", "local_proj_weight"),
        baselines=(*EAGER_BASELINES, SDPA),
        offered=(*BASELINES, SDPA),
        flops=lambda s: (_co_attention_flops(s), 2 * _co_attention_flops(s)),
        elements=lambda s: (2 * _streams(s), 3 * _streams(s)),
    ),
    Case(
        operation="upsample_concat",
        use="mixing",
        formula="residual + conv1×1(concat[local, bilinear(global_)])",
        shapes=_mixing_shapes,
        activations=("residual", "local", "global_"),
        baselines=EAGER_BASELINES,
        flops=lambda s: (_mixing_flops(s), 2 * _mixing_flops(s)),
        elements=lambda s: (
            _streams(s) + 2 * _pixels(s) * s.channels,
            2 * _streams(s) + _pixels(s) * s.channels,
        ),
    ),
    Case(
        operation="pointwise_mlp",
        use="mlp",
        formula="x + conv1×1(GELU(conv1×1(scale·x + shift)))",
        shapes=_mlp_shapes,
        baselines=EAGER_BASELINES,
        flops=lambda s: (_mlp_flops(s), 2 * _mlp_flops(s)),
        elements=lambda s: (2 * _pixels(s) * s.channels, 3 * _pixels(s) * s.channels),
    ),
    Alignment(
        operation="alignment",
        use="both",
        formula="co_attention, then upsample_concat",
        shapes=_alignment_shapes,
        activations=("residual", "local", "global_"),
        constants=lambda s: {"num_heads": s.num_heads, "global_grid": s.global_grid},
        options=("num_heads", "local_proj_weight"),
        baselines=(*EAGER_BASELINES, SDPA),
        offered=(*BASELINES, SDPA),
        flops=lambda s: tuple(n * (_co_attention_flops(s) + _mixing_flops(s)) for n in (1, 2)),
        elements=lambda s: (
            _streams(s) + 2 * _pixels(s) * s.channels,
            2 * _streams(s) + _pixels(s) * s.channels,
        ),
    ),
)

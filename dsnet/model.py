"""The Dual-stream Network: stem, four stages of DS-Blocks, head."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsnet_kernels import checks

from .block import DSBlock
from .norm import batch_norm
from .variants import PAPER_REDUCTION, VARIANTS, Variant

STAGES = 4
NUM_CLASSES = 1000
REDUCTIONS = (4, 8, 16, 32)


class Stage(nn.Module):
    """Patch embedding (a convolution with kernel = stride, no norm), then DS-Blocks."""

    def __init__(self, in_dim: int, dim: int, stride: int, blocks: list[DSBlock]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(in_dim, dim, stride, stride)
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = self._run(block, x)
        return x

    def forward_streams(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stage's output, and the streams of its last block."""
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = self._run(block, x)
        return self._run(self.blocks[-1].forward_streams, x)

    def _run(self, block: Callable[[Tensor], Any], x: Tensor) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)


class DSNet(nn.Module):
    """Dual-stream Network, an image classifier and a backbone.

    Args:
        variant: depths, widths and heads of the stages.
        num_classes: outputs of the classifier; 0 leaves it out.
        in_chans: channels of the image.
        global_pool: ``"avg"``, or ``""`` for none, which needs ``num_classes=0``.
        alpha: share of the global stream's channels, 0 to 1.
        alignment: False leaves the co-attention out of every block.
        global_reduction: r of each stage; the paper's, or the public checkpoints' (8, 4, 2, 2).
        co_attention_dim: common width of the co-attention per stage; default half the stage's.
        mlp_ratio: hidden width of the MLPs.
        drop_path_rate: of the last block; it rises linearly from 0 over all blocks.
        attn_drop_rate: dropout on the softmax outputs while training.
        drop_rate: dropout before the classifier.
        backend: of every operation; None follows :class:`dsnet_kernels.backend`.

    Shape:
        (B, in_chans, H, W) with H, W ≥ 32 → (B, num_classes). Grids floor at each stride.

    Source: DS-Net (arXiv 2105.14734), section 3.4 and table 1.
    """

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = NUM_CLASSES,
        in_chans: int = 3,
        global_pool: str = "avg",
        alpha: float = 0.5,
        alignment: bool = True,
        global_reduction: Sequence[int] = PAPER_REDUCTION,
        co_attention_dim: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        backend: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        _check_per_stage("global_reduction", global_reduction)
        if co_attention_dim is not None:
            _check_per_stage("co_attention_dim", co_attention_dim)
        checks.probability("drop_path_rate", drop_path_rate)
        checks.probability("attn_drop_rate", attn_drop_rate)
        checks.probability("drop_rate", drop_rate)
        if in_chans < 1:
            raise ValueError(f"in_chans: expected at least 1, got {in_chans}")
        _check_head(num_classes, global_pool)
        self.variant = variant
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.global_reduction = tuple(global_reduction)
        self.num_features = self.head_hidden_size = variant.embed_dims[-1]
        self.drop_rate = drop_rate

        total = sum(variant.depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        stages = []
        for i in range(STAGES):
            dim = variant.embed_dims[i]
            blocks = [
                DSBlock(
                    dim,
                    variant.num_heads[i],
                    global_reduction[i],
                    alpha=alpha,
                    alignment=alignment,
                    co_attention_dim=None if co_attention_dim is None else co_attention_dim[i],
                    mlp_ratio=mlp_ratio,
                    drop_path=next(rates),
                    attn_drop=attn_drop_rate,
                    backend=backend,
                )
                for _ in range(variant.depths[i])
            ]
            in_dim = in_chans if i == 0 else variant.embed_dims[i - 1]
            stages.append(Stage(in_dim, dim, 4 if i == 0 else 2, blocks))
        self.stages = nn.ModuleList(stages)
        self.feature_info = [
            {"num_chs": variant.embed_dims[i], "reduction": REDUCTIONS[i], "module": f"stages.{i}"}
            for i in range(STAGES)
        ]
        self.norm = nn.BatchNorm2d(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(self.num_features, num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → (B, 512, ⌊H/32⌋, ⌊W/32⌋), normalised."""
        return batch_norm(self.norm, self.forward_stages(x))

    def forward_stages(self, x: Tensor) -> Tensor:
        """The features before their norm."""
        self._check_image(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Global average pooling, dropout, and the classifier unless ``pre_logits``."""
        x = self.head_drop(x.mean(dim=(2, 3)) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        streams: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Outputs of the chosen stages, beside the final features.

        Args:
            x: (B, in_chans, H, W).
            indices: stages to return, negative ones from the end; an int n means the last n; None
                means all.
            norm: apply the final norm to the last stage's intermediate.
            stop_early: do not run stages behind the last chosen one.
            output_fmt: ``"NCHW"`` is the only layout.
            intermediates_only: leave the final features out.
            streams: return (output, local, global) of each stage's last block, not the output
                alone; the streams are (B, Cl, H, W) and (B, Cg, Hg, Wg) as they enter the fusion.

        Returns:
            (features, intermediates), or the intermediates alone.

        Raises:
            ValueError: for an unknown layout or stage.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {output_fmt!r}")
        self._check_image(x)
        take = stage_indices(indices, len(self.stages))
        last = max(take) if stop_early and take else len(self.stages) - 1
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1]):
            x, local, global_ = stage.forward_streams(x)
            if i in take:
                out = batch_norm(self.norm, x) if norm and i == len(self.stages) - 1 else x
                intermediates.append((out, local, global_) if streams else out)
        if intermediates_only:
            return intermediates
        return (batch_norm(self.norm, x) if last == STAGES - 1 else x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes what the chosen intermediates do not need; returns their indices."""
        take = stage_indices(indices, len(self.stages))
        self.stages = self.stages[: max(take) + 1]
        if prune_norm or len(self.stages) < STAGES:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    def get_classifier(self) -> nn.Module:
        """The last linear layer, or Identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, freshly initialised classifier; 0 removes it. None keeps the pooling."""
        global_pool = self.global_pool if global_pool is None else global_pool
        _check_head(num_classes, global_pool)
        like = self.stages[0].embed.weight
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head = _classifier(self.num_features, num_classes).to(like.device, like.dtype)
        self.head.apply(_init_weights)
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations.

        As with any checkpointed BatchNorm, running statistics then take two updates per step.
        """
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beyond norms and biases: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates, as timm's optimizers read them."""
        stem = r"^stages\.0\.embed"
        if coarse:
            return {"stem": stem, "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        blocks = [
            (r"^stages\.(\d+)\.embed", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}

    def _check_image(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_chans or min(x.shape[2:]) < REDUCTIONS[-1]:
            raise ValueError(
                f"x: expected (B, {self.in_chans}, H, W) with H and W at least {REDUCTIONS[-1]},"
                f" got {tuple(x.shape)}"
            )


class FeatureInfo(list):
    """Channels and reduction of each returned map, in the interface of timm's object."""

    def channels(self) -> list[int]:
        return [info["num_chs"] for info in self]

    def reduction(self) -> list[int]:
        return [info["reduction"] for info in self]

    def module_name(self) -> list[str]:
        return [info["module"] for info in self]

    def get_dicts(self) -> list[dict[str, Any]]:
        return [dict(info) for info in self]


class DSNetFeatures(DSNet):
    """DSNet as a backbone: images to a list of maps, without norm and classifier.

    Args:
        out_indices: stages to return; negative ones count from the end.
        **kwargs: as DSNet's, without ``num_classes``.
    """

    def __init__(self, variant: Variant, *, out_indices: Sequence[int] | None = None, **kwargs):
        super().__init__(variant, num_classes=0, **kwargs)
        take = stage_indices(out_indices, STAGES, "out_indices")
        self.out_indices = self.prune_intermediate_layers(take, prune_norm=True)
        self.feature_info = FeatureInfo(self.feature_info[i] for i in self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.forward_intermediates(x, self.out_indices, intermediates_only=True)


def stage_indices(
    indices: int | Sequence[int] | None, stages: int, name: str = "indices"
) -> list[int]:
    """Sorted stage numbers: None is all, an int the last so many, negatives count from the end."""
    if indices is None:
        return list(range(stages))
    if isinstance(indices, int):
        if not 1 <= indices <= stages:
            raise ValueError(f"{name}: expected a count between 1 and {stages}, got {indices}")
        return list(range(stages - indices, stages))
    indices = list(indices)
    if not indices or any(not -stages <= i < stages for i in indices):
        raise ValueError(
            f"{name}: expected stages between -{stages} and {stages - 1}, got {indices}"
        )
    return sorted({i % stages for i in indices})


def create_model(
    name: str,
    *,
    weights: str | None = None,
    num_classes: int = NUM_CLASSES,
    in_chans: int = 3,
    alpha: float = 0.5,
    alignment: bool = True,
    global_reduction: Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | Sequence[str] | None = None,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    model_ema: bool = False,
    **kwargs: Any,
) -> DSNet:
    """Builds a published network, its convolutions in ``channels_last``.

    Args:
        name: one of :func:`dsnet.list_models`.
        weights: a checkpoint file, see :func:`dsnet.load_checkpoint`; None initialises at random.
        global_reduction: default the paper's (8, 4, 2, 1), or that of ``weights``.
        device: where to build it; ``"meta"`` allocates nothing.
        dtype: of parameters and buffers; default float32.
        features_only: return the stages' maps, not logits.
        out_indices: stages that ``features_only`` returns; default all.
        model_ema: take the averaged weights of a training checkpoint.
        kwargs: ``global_pool``, ``co_attention_dim`` and ``mlp_ratio``.

    The other arguments are :class:`DSNet`'s.

    Raises:
        ValueError: for an unknown name or argument value.
        dsnet.CheckpointError: if ``weights`` cannot be read or does not fit.
    """
    if name not in VARIANTS:
        raise ValueError(f"name: expected one of {', '.join(VARIANTS)}, got {name!r}")
    if out_indices is not None and not features_only:
        raise ValueError("out_indices: only with features_only=True")
    if features_only and num_classes != NUM_CLASSES:
        raise ValueError(f"num_classes: only without features_only=True, got {num_classes}")
    if model_ema and weights is None:
        raise ValueError("model_ema: only with weights")
    checkpoint_file = None
    if weights is not None:
        from .checkpoint import read_checkpoint

        checkpoint_file = read_checkpoint(weights, model_ema=model_ema)
        checkpoint_file.expect_variant(name)
        if global_reduction is None:
            global_reduction = checkpoint_file.global_reduction
    if global_reduction is None:
        global_reduction = PAPER_REDUCTION
    cls: Callable[..., DSNet] = DSNet
    if features_only:
        cls, kwargs["out_indices"] = DSNetFeatures, out_indices
    else:
        kwargs["num_classes"] = num_classes
    with torch.device(device or torch.get_default_device()):
        model = cls(
            VARIANTS[name],
            in_chans=in_chans,
            alpha=alpha,
            alignment=alignment,
            global_reduction=global_reduction,
            drop_path_rate=drop_path_rate,
            attn_drop_rate=attn_drop_rate,
            drop_rate=drop_rate,
            backend=backend,
            **kwargs,
        )
    model = model.to(dtype=dtype, memory_format=torch.channels_last)
    if checkpoint_file is not None:
        checkpoint_file.load_into(model)
    return model


def _check_per_stage(name: str, values: Sequence[int]) -> None:
    numbers = isinstance(values, Sequence) and all(type(v) is int and v >= 1 for v in values)
    if not numbers or len(values) != STAGES:
        raise ValueError(f"{name}: expected {STAGES} numbers of at least 1, got {values!r}")


def _check_head(num_classes: int, global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool: expected 'avg' or '', got {global_pool!r}")
    if num_classes < 0 or (num_classes > 0 and not global_pool):
        expected = "at least 0" if global_pool else "0 without global pooling"
        raise ValueError(f"num_classes: expected {expected}, got {num_classes}")


def _classifier(features: int, num_classes: int) -> nn.Module:
    return nn.Linear(features, num_classes) if num_classes else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    """Truncated normal, small wherever a residual goes around; zero biases.

    Patch embeddings have no residual and keep their input's scale. Position convolutions stand
    outside every norm: a larger deviation would grow the stream by a factor in every block.
    """
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return
    patch_embedding = isinstance(module, nn.Conv2d) and module.stride[0] > 1
    std = module.weight[0].numel() ** -0.5 if patch_embedding else 0.02
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(module.bias)

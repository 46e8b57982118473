"""What a row of a whole network computes, and the check of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsnet.model import create_model

from .check import Check, both, check_directions, check_errors
from .device import CPU, Device

LEARNING_RATE = 1e-4

Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class Problem:
    """The work of a row, the same for every contender.

    Args:
        name: a published network.
        state: its weights, unrounded.
        images: on the device and in the dtype of the row.
        labels: of the images, for the loss.
        training: forward, loss, backward and AdamW; else inference.
        features: the stages' maps, as a detector's backbone has them, not logits.
        judged: indices of the images whose outputs are checked; None for all.
    """

    name: str
    state: Mapping[str, Tensor]
    images: Tensor
    labels: Tensor
    training: bool
    features: bool
    judged: Tensor | None = None

    @classmethod
    def random(
        cls,
        name: str,
        *,
        batch: int,
        size: tuple[int, int],
        dtype: torch.dtype,
        training: bool = False,
        features: bool = False,
        device: Device = CPU,
    ) -> "Problem":
        """The same numbers for the same arguments on the same kind of device.

        Raises:
            ValueError: for a backbone in training, which has no loss here.
        """
        if training and features:
            raise ValueError("features: expected False in training, got True")
        generator = device.generator(0)
        state = {key: value.to(device.name) for key, value in _random_state(name, features).items()}
        options = {"generator": generator, "device": device.name}
        images = torch.randn((batch, 3, *size), **options).to(dtype)
        labels = torch.randint(1000, (batch,), **options)
        # Batch statistics make every gradient depend on every image.
        judged = None if training else device.judged(batch)
        return cls(name, state, images, labels, training, features, judged)

    @property
    def work(self) -> str:
        return "training" if self.training else "inference"

    def rounded(self) -> dict[str, Tensor]:
        """The weights as the contenders have them."""
        dtype = self.images.dtype
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.state.items()}

    def network(self, backend: str | Sequence[str], dtype: torch.dtype | None = None) -> nn.Module:
        """With the weights rounded, in another dtype if one is given."""
        # Without initial values, which would take longer than all else.
        model = create_model(
            self.name,
            device="meta",
            dtype=dtype or self.images.dtype,
            backend=backend,
            features_only=self.features,
        )
        model.to_empty(device=self.images.device)
        model.load_state_dict(self.rounded())
        return model.train(self.training)

    def oracle(self) -> dict[str, Tensor]:
        """The values of the reference in float64."""
        exact = self.network("reference", torch.float64)
        images = self.images if self.judged is None else self.images[self.judged]
        return values(exact, exact, images.double(), self.labels)

    def selected(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of the images that are checked."""
        if self.judged is None:
            return dict(outputs)
        return {name: value[self.judged] for name, value in outputs.items()}


def eager_values(problem: Problem) -> list[dict[str, Tensor]]:
    """Of the reference in either layout, whose errors are the yardstick."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = problem.network("reference").to(memory_format=layout)
        images = problem.images.contiguous(memory_format=layout)
        found.append(values(model, model, images, problem.labels))
    return found


def named(outputs: Outputs) -> dict[str, Tensor]:
    """``logits``, or ``map0``, ``map1``, … of a backbone."""
    if isinstance(outputs, Tensor):
        return {"logits": outputs}
    return {f"map{i}": output for i, output in enumerate(outputs)}


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return F.cross_entropy(logits.to(wide), labels)


def values(
    function: Callable[[Tensor], Outputs], model: nn.Module, images: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The outputs and, in training, every parameter's gradient; the model is left without any."""
    outputs = function(images)
    found = {name: output.detach() for name, output in named(outputs).items()}
    if model.training:
        loss(outputs, labels).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"grad {name}"] = parameter.grad
        model.zero_grad()
    return found


def judge(
    found: Mapping[str, Tensor],
    slack: float,
    references: Sequence[Mapping[str, Tensor]],
    oracle: Mapping[str, Tensor],
) -> Check:
    """Directions tensor by tensor, errors of each output and of all gradients together.

    Rounding errors of one small gradient are few and dependent, so that twice the reference's is
    exceeded by chance; those of all parameters together are not.
    """
    directions = check_directions(found, references, oracle)
    if not directions.passed:
        return directions
    pooled = [_pooled(each, oracle) for each in (found, *references, oracle)]
    return both(directions, check_errors(pooled[0], pooled[1:-1], pooled[-1], slack))


def _pooled(found: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    pooled = {name: found[name] for name in like if not name.startswith("grad ")}
    gradients = [found[name].flatten() for name in like if name.startswith("grad ")]
    return pooled | ({"all gradients": torch.cat(gradients)} if gradients else {})


@cache
def _random_state(name: str, features: bool) -> dict[str, Tensor]:
    """Initial weights, with norms and statistics that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = create_model(name, backend="reference", features_only=features).state_dict()
    for key, value in state.items():
        if value.dim() == 1 and value.is_floating_point():
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            value += noise.abs() if key.endswith("running_var") else noise
    return state

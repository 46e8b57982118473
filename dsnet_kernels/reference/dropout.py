"""The dropout of attention weights: a counter-based mask that every backend draws alike."""

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def new_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, () int64, without a transfer to the host."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Weights whose random word is below this are dropped."""
    return min(int(p * 2.0**32), _LOW)


def _multiply(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of unsigned 32-bit words, which are held in int64."""
    product = factor * x
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: Tensor, counter: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., 2011): four random words for a counter of four words.

    Args:
        seed: () int64, the key.
        counter: four words, tensors of int64 that broadcast, or numbers.

    Returns:
        Four int64 tensors of values 0 … 2³² − 1.
    """
    device = seed.device
    c0, c1, c2, c3 = (torch.as_tensor(word, device=device) for word in counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.broadcast_tensors(c0, c1, c2, c3)


def keep_mask(
    shape: tuple[int, int, int, int], p: float, seed: Tensor, first_head: int = 0
) -> Tensor:
    """Which attention weights stay: True with probability 1 − p, a function of place and seed.

    Word ``key % 4`` of philox(seed, (key // 4, query, first_head + head, batch)) is at
    least :func:`threshold`.

    Args:
        shape: (batch, heads, queries, keys).
        p: probability of dropping, 0 ≤ p < 1.
        seed: () int64.
        first_head: what heads are counted from, so that masks of one call are different ones.

    Returns:
        Boolean tensor of ``shape`` on the seed's device.
    """
    batch, heads, queries, keys = shape
    blocks, query, head, image = (
        torch.arange(size, device=seed.device) for size in (-(-keys // 4), queries, heads, batch)
    )
    words = philox(
        seed,
        (blocks, query[:, None], first_head + head[:, None, None], image[:, None, None, None]),
    )
    return torch.stack(words, dim=-1).flatten(-2)[..., :keys] >= threshold(p)

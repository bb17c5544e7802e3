"""Work on large tensors in pieces, so that no intermediate result exists for more than one of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Largest piece of a distribution tensor, in numbers: on a CPU small enough for its cache.
PIECE_NUMEL_CPU = 1 << 20
PIECE_NUMEL_GPU = 1 << 26


def pieces(count: int, numel_each: int, device: torch.device) -> Iterator[slice]:
    """Cuts `count` items of `numel_each` numbers into slices of at most PIECE_NUMEL_* numbers, or of one item."""
    numel = PIECE_NUMEL_CPU if device.type == "cpu" else PIECE_NUMEL_GPU
    size = max(1, numel // max(1, numel_each))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device."""
    return torch.autocast(x.device.type, enabled=False)

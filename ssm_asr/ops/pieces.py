"""These helpers cut work on large tensors into pieces, so that intermediate results exist for one piece at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

# The largest piece of a tensor of distributions, in elements. On a CPU a piece should fit into the cache.
PIECE_NUMEL_CPU = 1 << 20
PIECE_NUMEL_GPU = 1 << 26


def pieces(count: int, numel_each: int, device: torch.device) -> Iterator[slice]:
    """Cuts a range of items into slices small enough to be worked on at once.

    Args:
        count: number of items.
        numel_each: elements of one item.
        device: where the work is done.

    Returns:
        Consecutive slices of 0 … count. Each has at most PIECE_NUMEL_CPU or PIECE_NUMEL_GPU elements, or else one item.
    """
    numel = PIECE_NUMEL_CPU if device.type == "cpu" else PIECE_NUMEL_GPU
    size = max(1, numel // max(1, numel_each))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def full_precision(x: Tensor) -> torch.autocast:
    """Returns a context in which autocast is off on the tensor's device."""
    return torch.autocast(x.device.type, enabled=False)

"""Kernels in Triton for GPUs. Each does what a form in plain PyTorch does, which is its fallback and its oracle.

The environment variable SSM_ASR_KERNELS=0 turns all of them off.
"""

import functools
import importlib.util
import os

import torch

# GPUs are fastest at products of matrices whose rows are a multiple of this many numbers.
MEMORY_LINE = 64
# For an integer or address that is a multiple of 16 Triton compiles a kernel a second time, in a second or two.
# That pays where rows are so long, but these arguments point to a few numbers, or only count what a batch holds.
FEW_NUMBERS = tuple(f"{x}_ptr" for x in ("acts", "end", "even", "frame", "keep", "mask", "rate", "settings", "skip"))
_SLABS = ("slab_frames", "slab_pairs", "slab_rows", "slabs")
_COUNTS = ("M", "N", "S", "T", "chunks", "images", "num_cells", "pairs", *_SLABS)
ANY_COUNT = FEW_NUMBERS + _COUNTS


@functools.cache
def _wanted() -> bool:
    return os.environ.get("SSM_ASR_KERNELS") != "0" and importlib.util.find_spec("triton") is not None


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels can and may be used on a tensor."""
    return x.is_cuda and _wanted()

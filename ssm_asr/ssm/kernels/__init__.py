"""Kernels in Triton for GPUs. Each does what a form in plain PyTorch does, which is its fallback and its oracle.

The environment variable SSM_ASR_KERNELS=0 turns all of them off.
"""

import functools
import importlib.util
import os

import torch

# GPUs are fastest at products of matrices whose rows are a multiple of this many numbers.
MEMORY_LINE = 64


@functools.cache
def _wanted() -> bool:
    return os.environ.get("SSM_ASR_KERNELS") != "0" and importlib.util.find_spec("triton") is not None


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels can and may be used on a tensor."""
    return x.is_cuda and _wanted()

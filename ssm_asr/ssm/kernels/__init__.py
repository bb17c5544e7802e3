"""Kernels in Triton for GPUs. Each does what a form in plain PyTorch does, which is its fallback and its oracle.

The environment variable SSM_ASR_KERNELS=0 turns all of them off; SSM_ASR_KERNELS=all turns on also those that no GPU
has run yet, only Triton's interpreter.
"""

import functools
import importlib.util
import os

import torch


@functools.cache
def _wanted(on_trial: bool) -> bool:
    setting = os.environ.get("SSM_ASR_KERNELS", "1")
    return setting != "0" and (setting == "all" or not on_trial) and importlib.util.find_spec("triton") is not None


def usable(x: torch.Tensor, on_trial: bool = False) -> bool:
    """Whether the kernels can and may be used on a tensor.

    Args:
        on_trial: they have not run on a GPU yet.
    """
    return x.is_cuda and _wanted(on_trial)

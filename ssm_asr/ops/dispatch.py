"""Which form of an operation runs: the plain one in PyTorch, or the kernel in Triton that is tested equal to it.

Every operation of this package has its plain form and asks `use_kernels` in one place. Nothing outside it knows of
kernels. The environment variable SSM_ASR_KERNELS=0, or `set_kernels(False)`, turns all of them off.
"""

import functools
import importlib.util
import os

import torch

# A GPU multiplies matrices fastest when their rows are a multiple of this many numbers.
MEMORY_LINE = 64
# Triton compiles a kernel a second time, in one or two seconds, for an integer or an address that is a multiple of 16.
# This pays where rows are long. These arguments point to a few numbers, or only count what a batch holds.
FEW_NUMBERS = tuple(f"{x}_ptr" for x in ("acts", "end", "even", "frame", "keep", "mask", "rate", "settings", "skip"))
_SLABS = ("slab_frames", "slab_pairs", "slab_rows", "slabs")
_COUNTS = ("M", "N", "S", "T", "chunks", "images", "num_cells", "pairs", *_SLABS)
ANY_COUNT = FEW_NUMBERS + _COUNTS

_wanted = True


def set_kernels(wanted: bool) -> None:
    """Turns the kernels on or off for this process; they start on."""
    global _wanted
    _wanted = wanted


@functools.cache
def missing() -> str:
    """Why kernels cannot run in this process on any tensor, in a few words; empty if they can."""
    if os.environ.get("SSM_ASR_KERNELS") == "0":
        return "SSM_ASR_KERNELS is 0"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def use_kernels(x: torch.Tensor) -> bool:
    """Whether an operation on this tensor runs its kernel; the operation may have conditions of its own.

    Kernels compute in float32, so that float64 is left to the plain forms.
    """
    return x.is_cuda and x.dtype != torch.float64 and _wanted and not missing()

"""This module decides whether an operation runs its plain form in PyTorch or its Triton kernel.

Every operation of the package that has a kernel asks `use_kernels` in one place. Code outside the package does not know
about kernels. The environment variable SSM_ASR_KERNELS=0, or a call of `set_kernels(False)`, turns all kernels off.
"""

import functools
import importlib.util
import os

import torch

# A GPU multiplies matrices fastest when their rows have a multiple of this many elements.
MEMORY_LINE = 64
# Triton compiles another version of a kernel, in one or two seconds, for an integer or an address that is a multiple of
# 16. This version is faster if the argument is the address or the stride of long rows. It is not if the argument points
# to a few numbers (FEW_NUMBERS) or counts what a batch holds (_COUNTS), so kernels do not specialise for these.
FEW_NUMBERS = tuple(
    f"{x}_ptr" for x in ("acts", "chunk", "end", "even", "frame", "keep", "mask", "rate", "settings", "skip")
)
_SLABS = ("slab_frames", "slab_pairs", "slab_rows", "slabs")
_COUNTS = ("B", "M", "N", "S", "T", "images", "num_cells", "programs", *_SLABS)
ANY_COUNT = FEW_NUMBERS + _COUNTS

_wanted = True


def set_kernels(wanted: bool) -> None:
    """Turns all kernels on or off for this process. At the start they are on."""
    global _wanted
    _wanted = wanted


@functools.cache
def missing() -> str:
    """Returns in a few words why kernels cannot run in this process at all, or an empty string if they can."""
    if os.environ.get("SSM_ASR_KERNELS") == "0":
        return "SSM_ASR_KERNELS is 0"
    if not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return ""


def use_kernels(x: torch.Tensor) -> bool:
    """Returns whether an operation on this tensor should run its kernel; the operation may have further conditions.

    Kernels do not compute in float64, so tensors of this type are left to the plain forms.
    """
    return x.is_cuda and x.dtype != torch.float64 and _wanted and not missing()

"""These helpers choose the floating-point type in which an operation runs under autocast."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Returns x in float32 if it is in float16 or bfloat16, and x itself otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Returns the type in which a convolution takes x: autocast's if autocast is on, and the type of x otherwise."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

"""These types hold numbers that change with the batch: a random decision, a scheduled limit, the size of a chunk.

Either the host knows the numbers as floats, or they lie in a tensor on the device. A captured CUDA graph needs the
tensor: it reads the numbers anew whenever it is replayed.
"""

import torch
from torch import Tensor

from ssm_asr.ops.devices import to_device

Number = float | Tensor  # the tensor is a scalar
Numbers = tuple[float, ...] | Tensor  # the tensor has one dimension
Count = int | Tensor  # the tensor is a scalar of int32


def known_zero(number: Number) -> bool:
    """Returns whether the host knows that the number is 0, so that whatever the number switches on can be skipped."""
    return not isinstance(number, Tensor) and number == 0.0


def on_device(numbers: Number | Numbers, device: torch.device) -> Tensor:
    """Returns the numbers as a float32 tensor on the device, without waiting for what the device still has to do.

    A tensor is there already and is returned as it is.
    """
    return numbers if isinstance(numbers, Tensor) else to_device(torch.tensor(numbers, dtype=torch.float32), device)

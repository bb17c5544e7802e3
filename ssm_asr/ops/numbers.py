"""Numbers that differ from batch to batch, such as a probability's outcome or a limit that follows a schedule.

The host knows them as floats, or they lie on the device, where a captured graph reads them anew at every replay.
"""

import torch
from torch import Tensor

Number = float | Tensor  # a tensor has no dimensions
Numbers = tuple[float, ...] | Tensor  # a tensor has one dimension


def known_zero(number: Number) -> bool:
    """Whether the host knows the number to be 0, so that what the number switches on can be left out."""
    return not isinstance(number, Tensor) and number == 0.0


def on_device(numbers: Number | Numbers, device: torch.device) -> Tensor:
    """The numbers as a float32 tensor on the device."""
    return numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=torch.float32, device=device)

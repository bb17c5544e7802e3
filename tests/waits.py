"""What must not happen while a GPU captures a graph."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Refuse(TorchDispatchMode):
    """Stops at what reads numbers from the device, which cannot be captured, and stops the host in a plain step."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))

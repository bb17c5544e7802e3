"""A model's nested streaming state in one vector of floats, as runtimes carry it that know nothing of the model.

Shapes: N streams, D floats of each.
"""

from typing import Any

import torch
from torch import Tensor

from ssm_asr.encoder.state import leaves, rebuild
from ssm_asr.transducer.model import Transducer


class PackedState:
    """The order in which the tensors of a state lie in the vector: that of their declaration.

    Frame counters become floats. They stop at the left context, beyond which they make no difference, so that they stay
    exact, in half precision too, however long the stream.

    Attributes:
        size: D.

    Args:
        left_context: in frames of 20 ms.

    Raises:
        ValueError: if the state does not start at zero, where runtimes start it.
    """

    def __init__(self, model: Transducer, left_context: int) -> None:
        self._left_context, self._start = left_context, model.init_state(1, left_context)
        self._tensors = [tensor for _, tensor in leaves(self._start)]
        self.size = sum(tensor.numel() for tensor in self._tensors)
        for name, tensor in leaves(self._start):
            if tensor.any():
                raise ValueError(f"streaming state {name} does not start at zero, and runtimes start all states there")

    def pack(self, state: Any) -> Tensor:
        """A state of N streams -> (N, D)."""
        parts = []
        for like, (_, tensor) in zip(self._tensors, leaves(state), strict=True):
            if not like.is_floating_point():
                tensor = tensor.clamp(max=self._left_context).to(torch.float32)
            if like.numel():  # the exporter cannot reshape what is empty
                parts.append(tensor.reshape(-1, like.numel()))
        return torch.cat(parts, dim=1)

    def unpack(self, packed_ND: Tensor) -> Any:
        """The inverse of `pack`."""
        N = packed_ND.shape[0]
        parts = iter(packed_ND.split([like.numel() for like in self._tensors if like.numel()], dim=1))
        return rebuild(
            self._start,
            (
                next(parts).reshape(-1, *like.shape[1:]).to(like.dtype)
                if like.numel()
                else like.expand(N, *like.shape[1:])
                for like in self._tensors
            ),
        )

"""Packs a model's nested streaming state into one vector of floats, for runtimes that know nothing of the model.

Shapes: N streams, D floats of a stream.
"""

from typing import Any

import torch
from torch import Tensor

from ssm_asr.encoder.state import leaves, rebuild
from ssm_asr.transducer.model import Transducer


class PackedState:
    """Packs and unpacks the state of a model; the tensors lie in the vector in the order of their declaration.

    Frame counters become floats. They stop at the left context, because larger counts make no difference. In this way
    they stay exact in long streams, even in half precision.

    Attributes:
        size: D.

    Args:
        model: the transducer.
        left_context: in frames of 20 ms.

    Raises:
        ValueError: if the state of a new stream is not all zeros, as runtimes assume.
    """

    def __init__(self, model: Transducer, left_context: int) -> None:
        self._left_context, self._start = left_context, model.init_state(1, left_context)
        self._tensors = [tensor for _, tensor in leaves(self._start)]
        self.size = sum(tensor.numel() for tensor in self._tensors)
        for name, tensor in leaves(self._start):
            if tensor.any():
                raise ValueError(f"streaming state {name} does not start at zero, and runtimes start all states there")

    def pack(self, state: Any) -> Tensor:
        """Packs a state of N streams into (N, D)."""
        parts = []
        for like, (_, tensor) in zip(self._tensors, leaves(state), strict=True):
            if not like.is_floating_point():
                tensor = tensor.clamp(max=self._left_context).to(torch.float32)
            if like.numel():  # the exporter cannot reshape an empty tensor
                parts.append(tensor.reshape(-1, like.numel()))
        return torch.cat(parts, dim=1)

    def unpack(self, packed_ND: Tensor) -> Any:
        """Returns the state of N streams that `pack` put into (N, D)."""
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

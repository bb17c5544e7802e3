"""Long-range modules, which carry information over long stretches of time in a Zipformer layer, beside self-attention.

Each module has a name in LONG_RANGE. A layer holds its module under this name, so that the parameters have the names
that published checkpoints give them. Sammo is a Zipformer whose long-range module is `mamba2`.

Shapes: B batch, T frames, L left-context frames kept from earlier chunks, K = L + T keys, D channels, N hidden
channels.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ssm_asr.encoder.modules import Linear, scaled_linear
from ssm_asr.encoder.regularize import Balancer, Schedule, Scheduled, Whiten
from ssm_asr.ops.attention import Context
from ssm_asr.ops.gates import evenly_weighted, gated
from ssm_asr.ssm.mamba2 import Mamba2


class LongRange(Protocol):
    """The interface of a long-range module.

    `mix_stream`, called chunk by chunk, must return what `mix` returns for the whole sequence masked to these chunks.
    """

    @abstractmethod
    def init_long_range(self, batch_size: int, left_context: int, device: torch.device | None = None) -> Any:
        """Returns the state at the start of `batch_size` streams: a named tuple of zeros, batch first.

        Args:
            batch_size: B.
            left_context: L, in frames of the layer.
            device: where the tensors are made.
        """

    @abstractmethod
    def mix(self, x_BTD: Tensor, weights_BTK: Tensor, context: Context) -> Tensor:
        """Maps whole sequences (B, T, D) -> (B, T, D).

        Args:
            x_BTD: the frames.
            weights_BTK: attention weights of the layer's first head.
            context: which keys each query sees, and which frames are padding.
        """

    @abstractmethod
    def mix_stream(self, x_BTD: Tensor, weights_BTK: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps one chunk (B, T, D) -> (B, T, D), and returns it with the new state.

        Args:
            x_BTD: the frames.
            weights_BTK: attention weights of the layer's first head.
            state: the state that the previous chunk returned; it is not changed.
        """


class NonlinState(NamedTuple):
    """The state of nonlin attention: its gated inputs over the left context."""

    nonlin_BLN: Tensor


class NonlinAttention(Scheduled):
    """Computes x·tanh(s), mixes it over time by the weights of one head, and multiplies the result by y.

    s, x and y are projections of the input to N channels each; a last projection leads back to D channels.

    Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.2.

    Args:
        channels: D.
        hidden: N.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.in_proj = Linear(channels, 3 * hidden)
        self.balance_gate = Balancer(
            positive=(Schedule((0, 0.25), (20000, 0.05)), Schedule((0, 0.75), (20000, 0.95))), abs=(0.5, 5.0)
        )
        self.whiten_x = Whiten(Schedule((0, 5.0), (20000, 10.0)))
        self.out_proj = scaled_linear(hidden, channels, 0.05)
        self.whiten_out = Whiten(Schedule((0, 5.0), (20000, 15.0)))
        self.constant_rate = Schedule((0, 0.25), (4000, 0.025))

    def init_long_range(self, batch_size: int, left_context: int, device: torch.device | None = None) -> NonlinState:
        """See `LongRange.init_long_range`."""
        return NonlinState(torch.zeros(batch_size, left_context, self.hidden, device=device))

    def mix(self, x_BTD: Tensor, weights_BTK: Tensor, context: Context) -> Tensor:
        """See `LongRange.mix`; the weights are 0 at hidden keys, so that `context` is not needed."""
        return self(x_BTD, weights_BTK)[0]

    def mix_stream(self, x_BTD: Tensor, weights_BTK: Tensor, state: NonlinState) -> tuple[Tensor, NonlinState]:
        """See `LongRange.mix_stream`."""
        y_BTD, gated_BKN = self(x_BTD, weights_BTK, state.nonlin_BLN)
        return y_BTD, NonlinState(gated_BKN[:, x_BTD.shape[1] :])

    def forward(self, x_BTD: Tensor, weights_BTK: Tensor, gated_BLN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the output (B, T, D) and the gated inputs (B, K, N).

        Args:
            x_BTD: the frames.
            weights_BTK: attention weights of one head.
            gated_BLN: in streaming, the gated inputs of the left context, which come first among the K.
        """
        gate, x, y = self.in_proj(x_BTD).chunk(3, dim=-1)
        x = self.whiten_x(x)
        gated_BKN = gated((x, gate), "tanh", by=self.balance_gate.settings(gate))
        if gated_BLN is not None:
            gated_BKN = torch.cat([gated_BLN, gated_BKN], dim=1)
        mixed_BTN = evenly_weighted(weights_BTK, gated_BKN, self.chance(self.constant_rate))
        return self.whiten_out(self.out_proj(gated((mixed_BTN, y), "identity"))), gated_BKN


class LongRangeMamba2(Mamba2):
    """Runs Mamba-2 over the sequence from its first frame to its last.

    It is causal at every frame, and it uses neither attention weights nor left context.
    """

    def init_long_range(self, batch_size: int, left_context: int, device: torch.device | None = None) -> Any:
        """See `LongRange.init_long_range`; the state's size does not depend on the left context."""
        return self.init_state(batch_size, device)

    def mix(self, x_BTD: Tensor, weights_BTK: Tensor, context: Context) -> Tensor:
        """See `LongRange.mix`."""
        return self(x_BTD, context.padding_mask_BK)[0]

    def mix_stream(self, x_BTD: Tensor, weights_BTK: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See `LongRange.mix_stream`."""
        return self.stream(x_BTD, state)


# The name in the configuration and in checkpoints -> a function that makes the module from a ZipformerConfig and D.
LONG_RANGE: dict[str, Callable[[Any, int], nn.Module] | None] = {
    "nonlin_attention": lambda config, dim: NonlinAttention(dim, dim * 3 // 4),
    "mamba2": lambda config, dim: LongRangeMamba2(
        dim, dim * 3 // 4, config.mamba_states, config.mamba_heads, config.mamba_groups
    ),
    "none": None,
}

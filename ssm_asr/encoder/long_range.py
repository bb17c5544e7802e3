"""What carries information over long stretches of time in a Zipformer layer, beside self-attention.

A long-range module has a name in LONG_RANGE, under which a layer holds it, so that the parameters of published
checkpoints keep their names. Sammo is a Zipformer whose module is `mamba2`.

Shapes: B batch, T frames, L left-context frames kept from before, K = L + T keys, D channels, N hidden channels.
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
    """The contract: what `mix_stream` gives chunk by chunk equals what `mix` gives at once, masked to chunks."""

    @abstractmethod
    def init_long_range(self, batch_size: int, left_context: int, device: torch.device | None = None) -> Any:
        """The state at the start of a stream, a named tuple of zeros, batch first; left_context in frames."""

    @abstractmethod
    def mix(self, x_BTD: Tensor, weights_BTK: Tensor, context: Context) -> Tensor:
        """Whole sequences (B, T, D) -> (B, T, D), with the attention weights of the layer's first head."""

    @abstractmethod
    def mix_stream(self, x_BTD: Tensor, weights_BTK: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One chunk, and the new state."""


class NonlinState(NamedTuple):
    """What nonlin attention keeps: its gated inputs of the left context."""

    nonlin_BLN: Tensor


class NonlinAttention(Scheduled):
    """x·tanh(s), mixed over time by one head's weights, times y; s, x and y are projections of the input.

    Source: Yao et al. (arXiv 2310.11230), section 3.2.
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
        """The gated inputs before the first frame: zeros."""
        return NonlinState(torch.zeros(batch_size, left_context, self.hidden, device=device))

    def mix(self, x_BTD: Tensor, weights_BTK: Tensor, context: Context) -> Tensor:
        """As `LongRange.mix`; the weights say which frames are seen."""
        return self(x_BTD, weights_BTK)[0]

    def mix_stream(self, x_BTD: Tensor, weights_BTK: Tensor, state: NonlinState) -> tuple[Tensor, NonlinState]:
        """As `LongRange.mix_stream`."""
        y_BTD, gated_BKN = self(x_BTD, weights_BTK, state.nonlin_BLN)
        return y_BTD, NonlinState(gated_BKN[:, x_BTD.shape[1] :])

    def forward(self, x_BTD: Tensor, weights_BTK: Tensor, gated_BLN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output (B, T, D), and the gated inputs (B, K, N), those of the left context in front if there are any."""
        gate, x, y = self.in_proj(x_BTD).chunk(3, dim=-1)
        x = self.whiten_x(x)
        gated_BKN = gated((x, gate), "tanh", by=self.balance_gate.settings(gate))
        if gated_BLN is not None:
            gated_BKN = torch.cat([gated_BLN, gated_BKN], dim=1)
        mixed_BTN = evenly_weighted(weights_BTK, gated_BKN, self.chance(self.constant_rate))
        return self.whiten_out(self.out_proj(gated((mixed_BTN, y), "identity"))), gated_BKN


class LongRangeMamba2(Mamba2):
    """Mamba-2 from the first frame of a sequence to the last. It sees the past, and no attention weights."""

    def init_long_range(self, batch_size: int, left_context: int, device: torch.device | None = None) -> Any:
        """As `LongRange.init_long_range`; its size does not depend on the left context."""
        return self.init_state(batch_size, device)

    def mix(self, x_BTD: Tensor, weights_BTK: Tensor, context: Context) -> Tensor:
        """As `LongRange.mix`."""
        return self(x_BTD, context.padding_mask_BK)[0]

    def mix_stream(self, x_BTD: Tensor, weights_BTK: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As `LongRange.mix_stream`."""
        return self.stream(x_BTD, state)


# Name in the configuration and in checkpoints -> what makes the module for a ZipformerConfig and a width D.
LONG_RANGE: dict[str, Callable[[Any, int], nn.Module] | None] = {
    "nonlin_attention": lambda config, dim: NonlinAttention(dim, dim * 3 // 4),
    "mamba2": lambda config, dim: LongRangeMamba2(
        dim, dim * 3 // 4, config.mamba_states, config.mamba_heads, config.mamba_groups
    ),
    "none": None,
}

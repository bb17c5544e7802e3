"""Mixers, which mix frames in the convolution module of a Conformer: a convolution, a state-space model, or both.

All mixers are causal at every frame and treat each channel by itself.

Source: Shan et al., "Augmenting conformers with structured state-space sequence models for online speech recognition"
(arXiv 2309.08551), section 3.

Shapes: B batch, D channels, T frames, L taps, K = L - 1 cached frames, N real numbers of state per channel.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssm_asr.ssm.s4d import S4D, causal_convolution, convolve_inside


class ConvState(NamedTuple):
    """The state of a convolution: its last K inputs."""

    conv_BDK: Tensor


class SsmState(NamedTuple):
    """The state of a state-space model."""

    ssm_BDN: Tensor


class ConvSsmState(NamedTuple):
    """The state of a convolution and of the state-space model that follows it."""

    conv_BDK: Tensor
    ssm_BDN: Tensor


class Mixer(nn.Module, ABC):
    """The interface of a mixer. Its `forward` maps whole sequences (B, D, T) -> (B, D, T).

    `stream`, called chunk by chunk, must return what `forward` returns for the whole sequence.
    """

    @abstractmethod
    def init_state(self, batch_size: int, device: torch.device | None = None) -> Any:
        """Returns the state at the start of `batch_size` streams: a named tuple of zeros, batch first."""

    @abstractmethod
    def stream(self, x_BDT: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps a chunk of any length (B, D, T); returns the output (B, D, T) and the new state."""


class NoMixer(Mixer):
    """`none`: the identity, so that only attention connects the frames."""

    def init_state(self, batch_size: int, device: torch.device | None = None) -> tuple[()]:
        return ()

    def forward(self, x_BDT: Tensor) -> Tensor:
        return x_BDT

    def stream(self, x_BDT: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        return x_BDT, state


class FiniteMixer(Mixer):
    """A depthwise convolution: y_t = Σ_l taps_l·x_{t-l}."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.channels, self.length = channels, length

    @abstractmethod
    def taps(self) -> Tensor:
        """Returns the impulse response (D, L)."""

    def init_state(self, batch_size: int, device: torch.device | None = None) -> ConvState:
        return ConvState(torch.zeros(batch_size, self.channels, self.length - 1, device=device))

    def forward(self, x_BDT: Tensor) -> Tensor:
        return causal_convolution(x_BDT, self.taps())

    def stream(self, x_BDT: Tensor, state: ConvState) -> tuple[Tensor, ConvState]:
        x_BDT = torch.cat([state.conv_BDK, x_BDT], dim=2)
        return convolve_inside(x_BDT, self.taps()), ConvState(x_BDT[..., 1 - self.length :])


class ConvMixer(FiniteMixer):
    """`conv`: the taps are free parameters. A bias is not needed before batch norm or a state-space model."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, kernel)
        self.weight_DL = nn.Parameter(torch.empty(channels, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))

    def taps(self) -> Tensor:
        return self.weight_DL


class ReparameterizedMixer(FiniteMixer):
    """`rep`: the taps are the first L values of a state-space model's impulse response."""

    def __init__(self, channels: int, length: int, states: int, parameterisation: str) -> None:
        super().__init__(channels, length)
        self.ssm = S4D(channels, states, parameterisation)

    def taps(self) -> Tensor:
        return self.ssm.impulse_response(self.length)


class DropInMixer(Mixer):
    """`dir`: a state-space model takes the place of the convolution."""

    def __init__(self, channels: int, states: int, parameterisation: str) -> None:
        super().__init__()
        self.ssm = S4D(channels, states, parameterisation)

    def init_state(self, batch_size: int, device: torch.device | None = None) -> SsmState:
        return SsmState(self.ssm.init_state(batch_size, device))

    def forward(self, x_BDT: Tensor) -> Tensor:
        return self.ssm(x_BDT)

    def stream(self, x_BDT: Tensor, state: SsmState) -> tuple[Tensor, SsmState]:
        y_BDT, ssm_BDN = self.ssm.stream(x_BDT, state.ssm_BDN)
        return y_BDT, SsmState(ssm_BDN)


class StackedMixer(Mixer):
    """`com`: a state-space model follows a short convolution."""

    def __init__(self, channels: int, kernel: int, states: int, parameterisation: str) -> None:
        super().__init__()
        self.conv = ConvMixer(channels, kernel)
        self.ssm = S4D(channels, states, parameterisation)

    def init_state(self, batch_size: int, device: torch.device | None = None) -> ConvSsmState:
        return ConvSsmState(*self.conv.init_state(batch_size, device), self.ssm.init_state(batch_size, device))

    def forward(self, x_BDT: Tensor) -> Tensor:
        return self.ssm(self.conv(x_BDT))

    def stream(self, x_BDT: Tensor, state: ConvSsmState) -> tuple[Tensor, ConvSsmState]:
        x_BDT, conv_state = self.conv.stream(x_BDT, ConvState(state.conv_BDK))
        y_BDT, ssm_BDN = self.ssm.stream(x_BDT, state.ssm_BDN)
        return y_BDT, ConvSsmState(conv_state.conv_BDK, ssm_BDN)


# Name in the configuration -> what makes the mixer of a ConformerConfig; each uses only the settings that it needs.
MIXERS: dict[str, Callable[[Any], Mixer]] = {
    "none": lambda config: NoMixer(),
    "conv": lambda config: ConvMixer(config.dim, config.conv_kernel),
    "dir": lambda config: DropInMixer(config.dim, config.ssm_states, config.ssm_param),
    "com": lambda config: StackedMixer(config.dim, config.conv_kernel, config.ssm_states, config.ssm_param),
    "rep": lambda config: ReparameterizedMixer(config.dim, config.rep_length, config.ssm_states, config.ssm_param),
}

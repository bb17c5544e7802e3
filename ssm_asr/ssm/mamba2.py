"""This module holds the Mamba-2 block; ssm_asr.ops.ssd computes the selective state-space operation at its core.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 7. Parameters have the names that the package
mamba_ssm gives them.

Shapes: B batch, T frames, D model channels, I inner channels, H heads, P channels of a head (H·P = I), N state size,
G groups of heads that share B and C, C = I + 2·G·N convolved channels, K frames in the cache of the convolution, which
has K + 1 taps. As in the paper, dt, A, B, C and D also name inputs of the operation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops.mamba_block import causal_conv_silu, gated_norm
from ssm_asr.ops.ssd import SsdInputs, ssd, ssd_loop


class Mamba2State(NamedTuple):
    """Holds what a block keeps between chunks: the state of the operation, and the last K inputs of the convolution."""

    ssm_BHPN: Tensor
    conv_BCK: Tensor


class GatedRMSNorm(nn.Module):
    """Computes weight·v / rms(v) with v = y·SiLU(z), where each of `groups` equal parts of the channels has its rms."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """Returns (B, T, I); a kernel returns it in the type of z."""
        return gated_norm(y_BTI, z_BTI, self.weight, self.groups, self.eps)


class Mamba2(nn.Module):
    """Computes the Mamba-2 block (section 7).

    It projects the input, [z, x, B, C, dt] = in_proj(u), and applies a causal depthwise convolution and SiLU to
    [x, B, C]. The state-space operation follows with dt = softplus(dt + dt_bias) and A = -exp(A_log), then the gated
    norm, and a projection back to D channels. At the start of training A is uniform in [-16, -1], softplus(dt_bias) is
    log-uniform in [1e-3, 0.1], and D is 1.

    Under autocast only the projections and the convolution run in lower precision. The operation, its state and the
    norm stay in float32.

    Attributes:
        ssm_parameter_names: see ssm_asr.ssm.parameters.

    Args:
        d_model: D.
        d_inner: I.
        d_state: N.
        nheads: H.
        ngroups: G.
        d_conv: K + 1, the taps of the convolution.

    Raises:
        ValueError: if I is not a multiple of H, or H not a multiple of G.
    """

    ssm_parameter_names = ("dt_bias", "A_log", "D")

    def __init__(self, d_model: int, d_inner: int, d_state: int, nheads: int, ngroups: int, d_conv: int = 4) -> None:
        super().__init__()
        if d_inner % nheads:
            raise ValueError(f"Mamba-2 d_inner of {d_inner}: give a multiple of the {nheads} heads")
        if nheads % ngroups:
            raise ValueError(f"Mamba-2 with {nheads} heads: give a multiple of the {ngroups} groups")
        self.d_inner, self.d_state, self.nheads, self.ngroups = d_inner, d_state, nheads, ngroups
        self.cached = d_conv - 1
        self.conv_channels = d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, d_inner + self.conv_channels + nheads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_channels, self.conv_channels, d_conv, groups=self.conv_channels)
        dt_H = torch.empty(nheads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt_H + torch.log(-torch.expm1(-dt_H)))  # its softplus is dt
        self.A_log = nn.Parameter(torch.empty(nheads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(nheads))
        self.norm = GatedRMSNorm(d_inner, ngroups)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def init_state(self, batch_size: int, device: torch.device | None = None) -> Mamba2State:
        """Returns the state before the first frame: zeros in the precision of the parameters."""
        head_dim, dtype = self.d_inner // self.nheads, self.A_log.dtype
        return Mamba2State(
            torch.zeros(batch_size, self.nheads, head_dim, self.d_state, dtype=dtype, device=device),
            torch.zeros(batch_size, self.conv_channels, self.cached, dtype=dtype, device=device),
        )

    def forward(
        self, u_BTD: Tensor, padding_mask_BT: Tensor | None = None, state: Mamba2State | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Computes the outputs of sequences of any length, 0 included.

        Args:
            u_BTD: the inputs.
            padding_mask_BT: True at padding, which may only be at the ends of sequences. Outputs there mean nothing.
            state: the state before the first frame; it is not changed. None is a state of zeros.

        Returns:
            The outputs y_BTD in the type of u, and the state of each sequence after its last valid frame.
        """
        fresh = state is None
        if state is None:
            state = self.init_state(u_BTD.shape[0], u_BTD.device)
        if u_BTD.shape[1] == 0:
            return u_BTD, state
        z_BTI, xBC_BTC, dt_BTH = self.in_proj(u_BTD).split([self.d_inner, self.conv_channels, self.nheads], dim=-1)
        xBC_BTC, conv_BCK = causal_conv_silu(self.conv1d, xBC_BTC, padding_mask_BT, state.conv_BCK, fresh=fresh)
        with torch.autocast(u_BTD.device.type, enabled=False):
            y_BTI, ssm_BHPN = self._operate(xBC_BTC, dt_BTH, padding_mask_BT, state.ssm_BHPN)
            y_BTI = self.norm(y_BTI, z_BTI)
        return self.out_proj(y_BTI).to(u_BTD.dtype), Mamba2State(ssm_BHPN, conv_BCK)

    def stream(self, u_BTD: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """Computes the outputs (B, T, D) of a chunk of any length, and the new state."""
        return self(u_BTD, state=state)

    def _operate(
        self, xBC_BTC: Tensor, dt_BTH: Tensor, padding_mask_BT: Tensor | None, state_BHPN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes the state-space operation in the precision of its state: y (B, T, I) and the new state."""
        B, T, _ = xBC_BTC.shape
        dtype, bc = state_BHPN.dtype, self.ngroups * self.d_state
        x_BTI, B_BTF, C_BTF = xBC_BTC.to(dtype).split([self.d_inner, bc, bc], dim=-1)
        dt_BTH = functional.softplus(dt_BTH.to(dtype) + self.dt_bias)
        if padding_mask_BT is not None:
            dt_BTH = dt_BTH.masked_fill(padding_mask_BT[..., None], 0.0)
        # Whole sequences come with a mask. Chunks do not: in an exported model they have a fixed length.
        whole = padding_mask_BT is not None
        inputs = SsdInputs(
            x_BTI.reshape(B, T, self.nheads, -1),
            dt_BTH,
            -torch.exp(self.A_log),
            B_BTF.reshape(B, T, self.ngroups, -1),
            C_BTF.reshape(B, T, self.ngroups, -1),
            self.D,
            state_BHPN,
        )
        y_BTHP, state_BHPN = (ssd_loop if whole and torch.jit.is_tracing() else ssd)(inputs)
        return y_BTHP.flatten(2), state_BHPN

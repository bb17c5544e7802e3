"""Mamba-2: a selective state-space operation, step by step and in matrix form, and the block around it.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060): the operation is section 2 with one decay a head, the
matrix form section 6, the block section 7. Parameter names are those of the package mamba_ssm.

Shapes: B batch, T frames, D model channels, I inner channels, H heads, P channels a head (H·P = I), N state size,
G groups of heads that share B and C, R = H / G heads a group, C = I + 2·G·N convolved channels, K frames that the
convolution keeps (its taps - 1), M blocks of L frames, X = B·M·G groups of blocks, whose heads are one matrix of
Q = R·P rows where they meet their B or C. As in the paper, dt, A, B, C and D also name the operation's inputs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssm_asr.ops import dispatch
from ssm_asr.ops.depthwise import depthwise

# Longer blocks cost more inside, shorter ones between. On a CPU, for N = 16 to 128, forward and backward with blocks of
# 16 and 32 frames take the same time within 20 %, with 64 frames 1.5 times as long, with 128 twice.
BLOCK_FRAMES = 32
# exp(-40) is below the rounding of float64. Larger sums of dt·A would only cost digits in their differences.
LEAST_LOG_DECAY = -40.0
# The longest sequence for which single steps are faster than the matrix form.
RECURRENT_FRAMES = 4
# From this N on, a GPU takes the kernels with long blocks, which are faster where many heads share B and C.
WIDE_STATES = 64


def ssd(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """The state-space operation, in the form that is fastest for its length.

        S_t = exp(dt_t·A)·S_{t-1} + dt_t·x_t ⊗ B_t
        y_t = S_t·C_t + D·x_t

    A frame with dt = 0 leaves the state as it is. All inputs are of one floating-point type.

    Args:
        x_BTHP: inputs of any length, 0 included.
        dt_BTH: step sizes, not negative.
        A_H: decay rates, not positive.
        B_BTGN, C_BTGN: how inputs enter the state and how it is read, shared by the H / G heads of a group.
        D_H: weights of the input in the output.
        state_BHPN: S before the first frame.

    Returns:
        y_BTHP, and S after the last frame.
    """
    inputs = (x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN)
    if x_BTHP.shape[1] <= RECURRENT_FRAMES:
        return ssd_recurrent(*inputs)
    if dispatch.usable(x_BTHP) and x_BTHP.dtype == torch.float32:
        from ssm_asr.ops.ssd_kernel import ssd_kernel  # only where Triton is installed
        from ssm_asr.ops.ssd_wide_kernel import ssd_wide

        return (ssd_wide if B_BTGN.shape[3] >= WIDE_STATES else ssd_kernel)(*inputs, least_log_decay=LEAST_LOG_DECAY)
    return ssd_chunked(*inputs)


def ssd_recurrent(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """`ssd` frame by frame: the reference for the other forms."""
    heads_a_group = x_BTHP.shape[2] // B_BTGN.shape[2]
    B_BTHN = B_BTGN.repeat_interleave(heads_a_group, dim=2)
    C_BTHN = C_BTGN.repeat_interleave(heads_a_group, dim=2)
    decay_BTH = torch.exp(dt_BTH * A_H)
    dx_BTHP = dt_BTH[..., None] * x_BTHP
    ys = [x_BTHP[:, :0]]
    for t in range(x_BTHP.shape[1]):
        added_BHPN = dx_BTHP[:, t, :, :, None] * B_BTHN[:, t, :, None]
        state_BHPN = decay_BTH[:, t, :, None, None] * state_BHPN + added_BHPN
        ys.append((state_BHPN * C_BTHN[:, t, :, None]).sum(dim=-1)[:, None])
    return torch.cat(ys, dim=1) + D_H[:, None] * x_BTHP, state_BHPN


# In exported models a loop over all frames, however many an utterance has.
ssd_loop = torch.jit.script_if_tracing(ssd_recurrent)


def ssd_chunked(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    block_frames: int = BLOCK_FRAMES,
) -> tuple[Tensor, Tensor]:
    """`ssd` by matrix products inside blocks of frames, and a recurrence from block to block (section 6).

    With a_t the sum of dt·A from the block's start to frame t, and S the state at the block's start:

        y_t = Σ_{s≤t} exp(a_t - a_s)·(C_t·B_s)·dt_s·x_s + exp(a_t)·S·C_t + D·x_t
        S_next = exp(a_L)·S + Σ_s exp(a_L - a_s)·dt_s·x_s ⊗ B_s

    No exponent is positive, so nothing overflows. Products with B and C are made once a group, not once a head.
    """
    B, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    R, L = H // G, max(1, min(block_frames, T))
    x_XQL, dt_XRL, B_XNL, C_XNL = (_blocks(x, L, G) for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
    dx_XRPL = dt_XRL[:, :, None] * x_XQL.unflatten(1, (R, P))
    a_XRL = _blocks((dt_BTH * A_H).clamp(min=LEAST_LOG_DECAY), L, G).cumsum(dim=-1)

    # Row s, column t. Where t is before s the scores are 0, and the decay is kept from overflowing.
    scores_XLL = (B_XNL.transpose(1, 2) @ C_XNL).triu()
    # A negated copy, since the gradient of a subtraction would negate the whole matrix.
    decay_XRLL = (a_XRL[..., None, :] + (-a_XRL)[..., None]).clamp(max=0.0).exp()
    y_XRPL = dx_XRPL @ (scores_XLL[:, None] * decay_XRLL)

    decay_to_end = torch.exp(a_XRL[..., -1:] - a_XRL)
    added_XQN = (dx_XRPL * decay_to_end[:, :, None]).flatten(1, 2) @ B_XNL.transpose(1, 2)
    decay_XR1L = a_XRL.exp()[:, :, None]
    starts_BMHPN, state_BHPN = _across_blocks(
        added_XQN.reshape(B, -1, H, P, N), decay_XR1L[..., -1].reshape(B, -1, H, 1, 1), state_BHPN
    )
    read_XQL = starts_BMHPN.reshape(-1, R * P, N) @ C_XNL
    y_XRPL = torch.addcmul(y_XRPL, read_XQL.unflatten(1, (R, P)), decay_XR1L)
    y_BTHP = y_XRPL.reshape(B, -1, H, P, L).permute(0, 1, 4, 2, 3).reshape(B, -1, H, P)[:, :T]
    return torch.addcmul(y_BTHP, x_BTHP, D_H[:, None]), state_BHPN


def _blocks(x_BT: Tensor, L: int, G: int) -> Tensor:
    """(B, T, …) -> (X, …, L): at least one block, the last one filled up with zeros; the rest is split into groups."""
    B, T = x_BT.shape[:2]
    M = max(1, -(-T // L))
    if M * L > T:
        x_BT = functional.pad(x_BT.flatten(2), (0, 0, 0, M * L - T))
    return x_BT.reshape(B, M, L, G, -1).permute(0, 1, 3, 4, 2).flatten(0, 2)


def _across_blocks(added_BMHPN: Tensor, decay_BMH11: Tensor, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """The states at the start of every block, and the one after the last."""
    starts = []
    # Unbound beforehand: indexing in the loop would give a gradient of full size at every step.
    for added_BHPN, decay_BH11 in zip(added_BMHPN.unbind(1), decay_BMH11.unbind(1), strict=True):
        starts.append(state_BHPN)
        state_BHPN = torch.addcmul(added_BHPN, decay_BH11, state_BHPN)
    return torch.stack(starts, dim=1) if len(starts) > 1 else starts[0], state_BHPN


class Mamba2State(NamedTuple):
    """What a block keeps between chunks: the operation's state, and the last K inputs of the convolution."""

    ssm_BHPN: Tensor
    conv_BCK: Tensor


class GatedRMSNorm(nn.Module):
    """weight·v / rms(v) with v = y·SiLU(z), the rms over each of `groups` equal parts of the channels."""

    def __init__(self, channels: int, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y_BTI: Tensor, z_BTI: Tensor) -> Tensor:
        """(B, T, I), (B, T, I) -> (B, T, I), by a kernel in the type of z."""
        B, T, _ = y_BTI.shape
        if dispatch.usable(y_BTI) and y_BTI.dtype == torch.float32:
            from ssm_asr.ops.mamba_block_kernel import gated_norm  # only where Triton is installed

            return gated_norm(y_BTI, z_BTI, self.weight, self.groups, self.eps)
        gated = (y_BTI * functional.silu(z_BTI)).reshape(B, T, self.groups, -1)
        normed = gated * torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.flatten(2) * self.weight


class Mamba2(nn.Module):
    """The Mamba-2 block: projection, causal convolution, state-space operation, gated norm, projection (section 7).

    [z, x, B, C, dt] = in_proj(u); SiLU of a causal depthwise convolution on [x, B, C]; dt = softplus(dt + dt_bias);
    A = -exp(A_log). At the start A is uniform in [-16, -1], softplus(dt_bias) log-uniform in [1e-3, 0.1], D = 1.

    Under autocast the operation and its state are in float32, and only the projections and the convolution are not.

    Attributes:
        ssm_parameter_names: see ssm_asr.ssm.parameters.

    Args:
        d_model: D.
        d_inner: I.
        d_state: N.
        nheads: H.
        ngroups: G.
        d_conv: taps of the convolution.

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
        self.dt_bias = nn.Parameter(dt_H + torch.log(-torch.expm1(-dt_H)))  # softplus of it is dt
        self.A_log = nn.Parameter(torch.empty(nheads).uniform_(1.0, 16.0).log())
        self.D = nn.Parameter(torch.ones(nheads))
        self.norm = GatedRMSNorm(d_inner, ngroups)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def init_state(self, batch_size: int, device: torch.device | None = None) -> Mamba2State:
        """Zeros, in the precision of the parameters."""
        head_dim, dtype = self.d_inner // self.nheads, self.A_log.dtype
        return Mamba2State(
            torch.zeros(batch_size, self.nheads, head_dim, self.d_state, dtype=dtype, device=device),
            torch.zeros(batch_size, self.conv_channels, self.cached, dtype=dtype, device=device),
        )

    def forward(
        self, u_BTD: Tensor, padding_mask_BT: Tensor | None = None, state: Mamba2State | None = None
    ) -> tuple[Tensor, Mamba2State]:
        """Sequences of any length, 0 included, from the given state, or from zeros.

        Args:
            u_BTD: inputs.
            padding_mask_BT: True at padding, which only the ends of sequences may have. Outputs there mean nothing.
            state: of the frames before; it is not changed.

        Returns:
            y_BTD in the type of u, and for every sequence the state after its own last frame.
        """
        fresh = state is None
        if state is None:
            state = self.init_state(u_BTD.shape[0], u_BTD.device)
        if u_BTD.shape[1] == 0:
            return u_BTD, state
        z_BTI, xBC_BTC, dt_BTH = self.in_proj(u_BTD).split([self.d_inner, self.conv_channels, self.nheads], dim=-1)
        if fresh and dispatch.usable(u_BTD) and state.ssm_BHPN.dtype == torch.float32:
            from ssm_asr.ops.mamba_block_kernel import convolve  # only where Triton is installed

            assert self.conv1d.bias is not None
            conv_BCK = self._last_frames(xBC_BTC, padding_mask_BT).to(state.conv_BCK.dtype)
            xBC_BTC = convolve(xBC_BTC, self.conv1d.weight, self.conv1d.bias, padding_mask_BT)
        else:
            xBC_BCT, conv_BCK = self._convolve(xBC_BTC.transpose(1, 2), padding_mask_BT, state.conv_BCK)
            xBC_BTC = xBC_BCT.transpose(1, 2)
        with torch.autocast(u_BTD.device.type, enabled=False):
            y_BTI, ssm_BHPN = self._operate(xBC_BTC, dt_BTH, padding_mask_BT, state.ssm_BHPN)
            y_BTI = self.norm(y_BTI, z_BTI)
        return self.out_proj(y_BTI).to(u_BTD.dtype), Mamba2State(ssm_BHPN, conv_BCK)

    def stream(self, u_BTD: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """One chunk of any length."""
        return self(u_BTD, state=state)

    def _convolve(self, x_BCT: Tensor, padding_mask_BT: Tensor | None, cache_BCK: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU of the convolution with K frames from before, and the last K valid frames."""
        frames = x_BCT.shape[2]
        if padding_mask_BT is not None:
            x_BCT = x_BCT.masked_fill(padding_mask_BT[:, None], 0.0)
        x_padded = torch.cat([cache_BCK.to(x_BCT.dtype), x_BCT], dim=2)
        if padding_mask_BT is None:
            last_BCK = x_padded[..., frames:]
        else:
            # Behind the K cached frames, the valid frames of a sequence end where their count says.
            index_BK = (~padding_mask_BT).sum(dim=1, keepdim=True) + torch.arange(self.cached, device=x_BCT.device)
            last_BCK = x_padded.gather(2, index_BK[:, None].expand(-1, self.conv_channels, -1))
        return functional.silu(depthwise(self.conv1d, x_padded)), last_BCK.to(cache_BCK.dtype)

    def _last_frames(self, x_BTC: Tensor, padding_mask_BT: Tensor | None) -> Tensor:
        """The last K valid frames (B, C, K) of whole sequences, zeros before the first."""
        if padding_mask_BT is None:
            padding_mask_BT = torch.zeros(x_BTC.shape[:2], dtype=torch.bool, device=x_BTC.device)
        index_BK = (~padding_mask_BT).sum(dim=1, keepdim=True) + torch.arange(-self.cached, 0, device=x_BTC.device)
        last_BKC = x_BTC.gather(1, index_BK.clamp(min=0)[..., None].expand(-1, -1, self.conv_channels))
        return last_BKC.masked_fill((index_BK < 0)[..., None], 0.0).transpose(1, 2)

    def _operate(
        self, xBC_BTC: Tensor, dt_BTH: Tensor, padding_mask_BT: Tensor | None, state_BHPN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The operation in the precision of its state: y (B, T, I) and the new state."""
        B, T, _ = xBC_BTC.shape
        dtype, bc = state_BHPN.dtype, self.ngroups * self.d_state
        x_BTI, B_BTF, C_BTF = xBC_BTC.to(dtype).split([self.d_inner, bc, bc], dim=-1)
        dt_BTH = functional.softplus(dt_BTH.to(dtype) + self.dt_bias)
        if padding_mask_BT is not None:
            dt_BTH = dt_BTH.masked_fill(padding_mask_BT[..., None], 0.0)
        whole = padding_mask_BT is not None  # and not a chunk, which in an exported model has a fixed length
        y_BTHP, state_BHPN = (ssd_loop if whole and torch.jit.is_tracing() else ssd)(
            x_BTI.reshape(B, T, self.nheads, -1),
            dt_BTH,
            -torch.exp(self.A_log),
            B_BTF.reshape(B, T, self.ngroups, -1),
            C_BTF.reshape(B, T, self.ngroups, -1),
            self.D,
            state_BHPN,
        )
        return y_BTHP.flatten(2), state_BHPN

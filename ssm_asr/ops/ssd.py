"""This module computes Mamba-2's state-space operation: frame by frame, in matrix form, and by kernels.

Source: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060). Section 2 defines the operation, here with one decay per
head; section 6 gives the matrix form.

Shapes: B batch, T frames, H heads, P channels of a head, N state size, G groups of heads that share B and C, R = H / G
heads of a group, M blocks of L frames, X = B·M·G pairs of a block and a group, Q = R·P channels of a group, which are
the rows of one matrix in products with B or C. As in the paper, dt, A, B, C and D also name inputs of the operation.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ssm_asr.ops import dispatch

# Long blocks cost much time inside blocks, short ones between them. On a CPU with N = 16 to 128, forward and backward
# pass take as long with blocks of 16 frames as with 32 within 20 %, 1.5 times as long with 64, twice as long with 128.
BLOCK_FRAMES = 32
# dt·A is clamped to at least this. exp(-40) is below the rounding of float64, so lower values would change nothing, but
# would cost digits where sums of dt·A are subtracted.
LEAST_LOG_DECAY = -40.0
# The longest sequence, in frames, for which the recurrence is faster than the matrix form.
RECURRENT_FRAMES = 4
# From this N on, the kernels with long blocks run on a GPU. They are faster where many heads share large B and C.
WIDE_STATES = 64


class SsdInputs(NamedTuple):
    """Holds the inputs of the operation. All have one floating-point type.

    Attributes:
        x_BTHP: inputs of any length, 0 included.
        dt_BTH: step sizes, not negative. A frame with dt = 0 leaves the state as it is.
        A_H: decay rates, not positive.
        B_BTGN: how inputs enter the state, shared by the H / G heads of a group.
        C_BTGN: how outputs are read from the state, shared likewise.
        D_H: weights of the inputs in the outputs.
        state_BHPN: the state before the first frame.
    """

    x_BTHP: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    B_BTGN: Tensor
    C_BTGN: Tensor
    D_H: Tensor
    state_BHPN: Tensor


def ssd(inputs: SsdInputs) -> tuple[Tensor, Tensor]:
    """Computes the state-space operation, in the form that is fastest for its length and its device.

        S_t = exp(dt_t·A)·S_{t-1} + dt_t·x_t ⊗ B_t
        y_t = S_t·C_t + D·x_t

    Returns:
        The outputs y_BTHP, and the state S_BHPN after the last frame.
    """
    if inputs.x_BTHP.shape[1] <= RECURRENT_FRAMES:
        return ssd_recurrent(inputs)
    if dispatch.use_kernels(inputs.x_BTHP) and inputs.x_BTHP.dtype == torch.float32:
        from ssm_asr.ops.ssd_kernel import ssd_kernel  # only where Triton is installed
        from ssm_asr.ops.ssd_wide_kernel import ssd_wide

        return (ssd_wide if inputs.B_BTGN.shape[3] >= WIDE_STATES else ssd_kernel)(inputs, LEAST_LOG_DECAY)
    return ssd_chunked(inputs)


def ssd_recurrent(inputs: SsdInputs) -> tuple[Tensor, Tensor]:
    """Computes `ssd` frame by frame. The other forms are tested against this one."""
    return _recurrence(inputs)


def _recurrence(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],  # an SsdInputs, as TorchScript types it
) -> tuple[Tensor, Tensor]:
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN = inputs
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


# The recurrence for exported models. Scripting it keeps its loop, so that the model takes any number of frames.
ssd_loop = torch.jit.script_if_tracing(_recurrence)


def ssd_chunked(inputs: SsdInputs, block_frames: int = BLOCK_FRAMES) -> tuple[Tensor, Tensor]:
    """Computes `ssd` by matrix products inside blocks of frames and a recurrence from block to block (section 6).

    Let a_t be the sum of dt·A from the start of the block to frame t, and S the state at the start of the block:

        y_t = Σ_{s≤t} exp(a_t - a_s)·(C_t·B_s)·dt_s·x_s + exp(a_t)·S·C_t + D·x_t
        S_next = exp(a_L)·S + Σ_s exp(a_L - a_s)·dt_s·x_s ⊗ B_s

    No exponent is positive, so nothing overflows. Products of B and C are computed once per group, not per head.

    Args:
        inputs: the inputs.
        block_frames: L.
    """
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN = inputs
    B, T, H, P = x_BTHP.shape
    G, N = B_BTGN.shape[2:]
    R, L = H // G, max(1, min(block_frames, T))
    x_XQL, dt_XRL, B_XNL, C_XNL = (_blocks(x, L, G) for x in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
    dx_XRPL = dt_XRL[:, :, None] * x_XQL.unflatten(1, (R, P))
    a_XRL = _blocks((dt_BTH * A_H).clamp(min=LEAST_LOG_DECAY), L, G).cumsum(dim=-1)

    # Rows are s, columns are t. Where t is before s, scores are 0 and the clamp keeps the decay from overflowing.
    scores_XLL = (B_XNL.transpose(1, 2) @ C_XNL).triu()
    # Adding a negated copy is cheaper than subtracting: the gradient of a subtraction would negate the whole matrix.
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
    """Cuts (B, T, …) into (X, …, L). There is at least one block, and the last one is filled up with zeros."""
    B, T = x_BT.shape[:2]
    M = max(1, -(-T // L))
    if M * L > T:
        x_BT = functional.pad(x_BT.flatten(2), (0, 0, 0, M * L - T))
    return x_BT.reshape(B, M, L, G, -1).permute(0, 1, 3, 4, 2).flatten(0, 2)


def _across_blocks(added_BMHPN: Tensor, decay_BMH11: Tensor, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the states at the starts of all blocks, and the state after the last block."""
    starts = []
    # The tensors are unbound first, because indexing inside the loop would make a gradient of full size at every step.
    for added_BHPN, decay_BH11 in zip(added_BMHPN.unbind(1), decay_BMH11.unbind(1), strict=True):
        starts.append(state_BHPN)
        state_BHPN = torch.addcmul(added_BHPN, decay_BH11, state_BHPN)
    return torch.stack(starts, dim=1) if len(starts) > 1 else starts[0], state_BHPN

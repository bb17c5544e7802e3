"""This module sums the probabilities of all alignments in a transducer lattice, and finds how probable each arc is.

In a cell (s, t) of the lattice, s symbols have been emitted and frame t is being read. Two arcs leave it: the blank to
(s, t+1), and symbol s to (s+1, t) in a regular lattice, or to (s+1, t+1) if every symbol takes a frame.

Source: Kuang et al. 2022, "Pruned RNN-T" (arXiv 2206.13236).

Shapes: B utterances, T frames, S symbols, R neighbouring cells that are kept in each frame (S+1 if nothing is pruned),
K steps. The four columns of a boundary are s_begin, t_begin, s_end, t_end.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ssm_asr.ops import dispatch
from ssm_asr.ops.devices import to_device

RNNT_TYPES = ("regular", "modified", "constrained")

# An arc that is taken with at most this probability counts as never taken. In float32, products of smaller numbers
# would be denormal, and a CPU multiplies denormal numbers many times slower.
RAREST_ARC = 1e-20


class LatticeScore(NamedTuple):
    """Holds the score of each lattice and, for each arc, the probability that an alignment takes it."""

    score_B: Tensor
    symbol_occupation_BTR: Tensor
    blank_occupation_BTR: Tensor


def checked_boundary(boundary_B4: Tensor | None, num_frames: int, symbols_BS: Tensor, rnnt_type: str) -> Tensor:
    """Returns the boundary on the device of the symbols. If there is none, it is [0, 0, S, num_frames] for all.

    Args:
        boundary_B4: integers on any device, or None.
        num_frames: T, padding included.
        symbols_BS: the symbols, padding included.
        rnnt_type: one of RNNT_TYPES.

    Raises:
        ValueError: if the boundary has another shape, and as `check_boundary` does.
    """
    B, S = symbols_BS.shape
    if boundary_B4 is None:
        boundary_B4 = torch.tensor([0, 0, S, num_frames], device=symbols_BS.device).expand(B, 4)
    if boundary_B4.shape != (B, 4):
        raise ValueError(f"boundary of shape {tuple(boundary_B4.shape)} for {B} utterances: give ({B}, 4)")
    check_boundary(boundary_B4, num_frames, S, rnnt_type)
    return to_device(boundary_B4.long(), symbols_BS.device)


def check_boundary(boundary_B4: Tensor, num_frames: int, S: int, rnnt_type: str) -> None:
    """Checks that a boundary fits into its batch. This waits for the device unless the boundary is on the CPU.

    Args:
        boundary_B4: the boundary.
        num_frames: T, padding included.
        S: number of symbols, padding included.
        rnnt_type: one of RNNT_TYPES.

    Raises:
        ValueError: if the batch is empty, the type is unknown, a row does not lie within T frames and S symbols, or a
            row has fewer frames than symbols although every symbol takes a frame.
    """
    if rnnt_type not in RNNT_TYPES:
        raise ValueError(f"rnnt_type {rnnt_type!r}: give one of {', '.join(RNNT_TYPES)}")
    if len(boundary_B4) == 0 or num_frames == 0:
        raise ValueError(f"empty batch: {len(boundary_B4)} utterances of {num_frames} padded frames")
    for utterance, (s_begin, t_begin, s_end, t_end) in enumerate(boundary_B4.tolist()):
        if not (0 <= s_begin <= s_end <= S and 0 <= t_begin <= t_end <= num_frames):
            raise ValueError(
                f"utterance {utterance}: symbols {s_begin} to {s_end} and frames {t_begin} to {t_end} do not lie "
                f"in the {S} symbols and {num_frames} frames of the batch"
            )
        if rnnt_type != "regular" and t_end - t_begin < s_end - s_begin:
            raise ValueError(
                f"utterance {utterance}: {t_end - t_begin} frames are too few for {s_end - s_begin} symbols under "
                f"rnnt_type {rnnt_type}: drop the utterance or use regular"
            )


def lattice_score(
    symbol_BTR: Tensor,
    blank_BTR: Tensor,
    boundary_B4: Tensor,
    num_symbols: int,
    regular: bool,
    start_BT: Tensor | None = None,
) -> LatticeScore:
    """Computes the log of the summed probability of all alignments from (s_begin, t_begin) to (s_end, t_end).

    Sums run in float64 for inputs of any type; the results have the type of the inputs. The score is differentiable
    once in symbol_BTR and blank_BTR, and the occupations are its gradient. An utterance without an alignment has a
    score of -inf and occupations of 0, so its gradients are 0 too.

    Args:
        symbol_BTR: log-probability of the symbol arc that leaves the cell (start + r, t); -inf where s = S.
        blank_BTR: log-probability of the blank arc that leaves the cell.
        boundary_B4: int64, on the device of the log-probabilities.
        num_symbols: S.
        regular: whether a symbol stays in its frame. Otherwise it takes a frame, as a blank does.
        start_BT: s of the first of the R cells kept in each frame; it must not fall over time. Arcs to cells that are
            not kept are cut, except arcs to the end. None keeps all cells (R = S+1).
    """
    return LatticeScore(*_LatticeScore.apply(symbol_BTR, blank_BTR, boundary_B4, num_symbols, regular, start_BT))


class _LatticeScore(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        symbol_BTR: Tensor,
        blank_BTR: Tensor,
        boundary_B4: Tensor,
        num_symbols: int,
        regular: bool,
        start_BT: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (symbol_BTR, blank_BTR, boundary_B4, num_symbols, regular, start_BT)
        if dispatch.use_kernels(blank_BTR):
            from ssm_asr.ops import lattice_kernel  # only where Triton is installed

            score_B, *occupations = lattice_kernel.sums(*given, RAREST_ARC)
        else:
            score_B, *occupations = sums(*given)
        ctx.save_for_backward(*occupations)
        ctx.mark_non_differentiable(*occupations)
        return score_B, occupations[0], occupations[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_score_B: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        symbol_occupation, blank_occupation = ctx.saved_tensors
        d_score_B11 = d_score_B[:, None, None]
        return d_score_B11 * symbol_occupation, d_score_B11 * blank_occupation, None, None, None, None


def sums(
    symbol_BTR: Tensor,
    blank_BTR: Tensor,
    boundary_B4: Tensor,
    num_symbols: int,
    regular: bool,
    start_BT: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the fields of a `LatticeScore` in PyTorch; `lattice_score` explains the arguments."""
    pruned = start_BT is not None
    if start_BT is not None:
        symbol_BTR, blank_BTR = _cut_arcs(symbol_BTR, blank_BTR, boundary_B4, start_BT, regular)
    B, T, R = blank_BTR.shape
    steps = _step_order(boundary_B4, start_BT, (B, T, R), num_symbols, regular)
    arcs_K2BR = blank_BTR.new_full((steps.num_steps, 2, B, R), -torch.inf, dtype=torch.float64)
    blank_N, symbol_N = steps.blank_N, steps.blank_N + B * R
    arcs_K2BR.view(-1).index_copy_(0, blank_N, blank_BTR.double().flatten())
    arcs_K2BR.view(-1).index_copy_(0, symbol_N, symbol_BTR.double().flatten())

    state_KBR = _forward_states(arcs_K2BR, steps, pruned)
    score_B = state_KBR[steps.end_step_B, torch.arange(B, device=blank_BTR.device), steps.end_slot_B]
    occupation = _occupations(arcs_K2BR, state_KBR, steps, pruned).to(blank_BTR.dtype).flatten()
    symbol_occupation_BTR = occupation.index_select(0, symbol_N).view(B, T, R)
    blank_occupation_BTR = occupation.index_select(0, blank_N).view(B, T, R)
    return score_B.to(blank_BTR.dtype), symbol_occupation_BTR, blank_occupation_BTR


def _cut_arcs(
    symbol_BTR: Tensor, blank_BTR: Tensor, boundary_B4: Tensor, start_BT: Tensor, regular: bool
) -> tuple[Tensor, Tensor]:
    """Returns the arcs with -inf for each one that leads neither to a kept cell within the boundary nor to the end."""
    _, T, R = blank_BTR.shape
    _, _, s_end_B11, t_end_B11 = boundary_B4[:, :, None, None].unbind(1)
    frame_T1 = torch.arange(T, device=start_BT.device)[:, None]
    symbol_R = torch.arange(R, device=start_BT.device)
    s_BTR = start_BT[..., None] + symbol_R
    next_start_BT1 = functional.pad(start_BT[:, 1:], (0, 1))[..., None]

    def reaches_next_frame(s_BTR: Tensor) -> Tensor:
        kept = (s_BTR >= next_start_BT1) & (s_BTR < next_start_BT1 + R) & (s_BTR <= s_end_B11)
        at_end = (frame_T1 + 1 == t_end_B11) & (s_BTR == s_end_B11)
        return at_end | kept & (frame_T1 + 1 < t_end_B11)

    if regular:
        symbol_kept = (symbol_R + 1 < R) & (s_BTR < s_end_B11) & (frame_T1 < t_end_B11)
    else:
        symbol_kept = reaches_next_frame(s_BTR + 1)
    blank_kept = reaches_next_frame(s_BTR)
    return symbol_BTR.masked_fill(~symbol_kept, -torch.inf), blank_BTR.masked_fill(~blank_kept, -torch.inf)


class _StepOrder(NamedTuple):
    """Says where the cells lie once they are ordered by steps. Cells of one step do not depend on each other.

    In a regular lattice a step is an anti-diagonal, s + t; otherwise it is a frame. A cell lies in slot s mod R of its
    step. All kept cells of a step lie in different slots, because the kept s of a frame are neighbours and never fall
    over time. From one step to the next, a blank stays in its slot, and a symbol moves to the next slot, or from the
    last to the first.
    """

    num_steps: int
    blank_N: Tensor  # for each of the N = B·T·R cells, the index of its blank arc in the flattened (K, 2, B, R)
    start_slot_B: Tensor
    end_step_B: Tensor
    end_slot_B: Tensor


def _step_order(
    boundary_B4: Tensor,
    start_BT: Tensor | None,
    shape_BTR: tuple[int, int, int],
    num_symbols: int,
    regular: bool,
) -> _StepOrder:
    B, T, R = shape_BTR
    device = boundary_B4.device
    s_begin_B, t_begin_B, s_end_B, t_end_B = boundary_B4.unbind(1)
    num_steps = T + num_symbols if regular else T
    first_step_B = t_begin_B + s_begin_B if regular else t_begin_B
    end_step_B = (t_end_B + s_end_B if regular else t_end_B) - first_step_B

    s_BTR = torch.arange(R, device=device).expand(1, T, R)
    if start_BT is not None:
        s_BTR = start_BT[..., None] + s_BTR
    t_T1 = torch.arange(T, device=device)[:, None]
    step_BTR = s_BTR + t_T1 if regular else t_T1.expand(T, R)
    # Cells before the begin wrap round to the last steps, where no alignment goes through them either.
    step_BTR = (step_BTR - first_step_B[:, None, None]) % num_steps
    utterance_B11 = torch.arange(B, device=device)[:, None, None]
    blank_BTR = (step_BTR * 2 * B + utterance_B11) * R + s_BTR % R
    return _StepOrder(num_steps, blank_BTR.flatten(), s_begin_B % R, end_step_B, s_end_B % R)


def _forward_states(arcs_K2BR: Tensor, steps: _StepOrder, pruned: bool) -> Tensor:
    """Returns the log-probability of all ways from the begin to each cell, (K+1, B, R)."""
    K, _, B, R = arcs_K2BR.shape
    state_KBR = arcs_K2BR.new_full((K + 1, B, R), -torch.inf)
    state_KBR[0].scatter_(1, steps.start_slot_B[:, None], 0.0)
    _advance(arcs_K2BR, state_KBR, pruned)
    return state_KBR


def _occupations(arcs_K2BR: Tensor, state_KBR: Tensor, steps: _StepOrder, pruned: bool) -> Tensor:
    """Returns the probability that an alignment takes each arc, (K, 2, B, R). It overwrites the arcs."""
    K, _, B, R = arcs_K2BR.shape
    # The share of an arc is its part of the probability of all ways into a cell. A cell without ways in has no shares.
    total_KBR = state_KBR[1:].masked_fill(state_KBR[1:] == -torch.inf, 0.0)
    share_K2BR = arcs_K2BR.add_(state_KBR[:-1, None])
    share_K2BR[:, 0].sub_(total_KBR)
    share_K2BR[:, 1].sub_(total_KBR.roll(-1, dims=-1))
    share_K2BR.exp_()

    # The probability that an alignment goes through a cell. The first slot is repeated after the last, because a symbol
    # in the last slot leads to the first.
    visits_KBR = arcs_K2BR.new_zeros(K + 1, B, R + 1)
    ends = (steps.end_step_B, torch.arange(B, device=arcs_K2BR.device), steps.end_slot_B)
    visits_KBR[ends] = visits_KBR.new_ones(B)  # a Python number would first have to be copied to the device
    _retreat(share_K2BR, visits_KBR, pruned)
    visits_KBR[:, :, R] = visits_KBR[:, :, 0]
    share_K2BR[:, 0].mul_(visits_KBR[1:, :, :R])
    share_K2BR[:, 1].mul_(visits_KBR[1:, :, 1:])
    return functional.threshold(share_K2BR, RAREST_ARC, 0.0, inplace=True)


def _advance(arcs_K2BR: Tensor, state_KBR: Tensor, pruned: bool) -> None:
    """Fills in the states (K+1, B, R), starting from the first. Only with pruning do symbols wrap to the first slot."""
    _, _, B, R = arcs_K2BR.shape
    arrived = arcs_K2BR.new_full((2, B, R + 1), -torch.inf)  # the additional column is for symbols that wrap round
    leaving, by_blank, by_symbol = arrived[:, :, 1:], arrived[0, :, 1:], arrived[1, :, :R]
    last, first = arrived[1, :, R], arrived[1, :, 0]
    states = state_KBR.unbind(0)
    for k, arcs_2BR in enumerate(arcs_K2BR.unbind(0)):
        torch.add(states[k], arcs_2BR, out=leaving)
        if pruned:
            first.copy_(last)
        torch.logaddexp(by_blank, by_symbol, out=states[k + 1])


def _retreat(share_K2BR: Tensor, visits_KBR: Tensor, pruned: bool) -> None:
    """Fills in the visits (K+1, B, R+1) from the last to the first: each arc hands its share back to its first cell."""
    R = share_K2BR.shape[3]
    here, after = visits_KBR[:, :, :R].unbind(0), visits_KBR[:, :, 1:].unbind(0)
    first, again = visits_KBR[:, :, 0].unbind(0), visits_KBR[:, :, R].unbind(0)
    blank_share, symbol_share = share_K2BR[:, 0].unbind(0), share_K2BR[:, 1].unbind(0)
    for k in range(len(share_K2BR) - 1, -1, -1):
        if pruned:
            again[k + 1].copy_(first[k + 1])
        here[k].addcmul_(here[k + 1], blank_share[k])
        here[k].addcmul_(after[k + 1], symbol_share[k])

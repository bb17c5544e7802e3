"""Sum over all alignments of a transducer lattice, and how often each of its arcs is taken.

A cell (s, t) of the lattice means: s symbols are out and frame t is being read. Two arcs leave it: a blank to
(s, t+1), and symbol s to (s+1, t) in a regular lattice or to (s+1, t+1) where every symbol takes a frame.

Shapes: B utterances, T frames, S symbols, R neighbouring cells that are kept of each frame (S+1 when none is
pruned), K steps. The four columns of a boundary are s_begin, t_begin, s_end, t_end.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ssm_asr.ops import dispatch
from ssm_asr.ops.devices import to_device

RNNT_TYPES = ("regular", "modified", "constrained")

# Arcs taken less often than this count as never taken: in float32 their products with other small numbers would
# be denormal, which a CPU multiplies many times slower.
RAREST_ARC = 1e-20


class LatticeScore(NamedTuple):
    """What a lattice yields: its score and, for each arc, the probability that an alignment takes it."""

    score_B: Tensor
    symbol_occupation_BTR: Tensor
    blank_occupation_BTR: Tensor


def checked_boundary(boundary_B4: Tensor | None, num_frames: int, symbols_BS: Tensor, rnnt_type: str) -> Tensor:
    """The boundary on the device of the symbols, made where there is none: [0, 0, S, T].

    Raises:
        ValueError: as `check_boundary`.
    """
    B, S = symbols_BS.shape
    if boundary_B4 is None:
        boundary_B4 = torch.tensor([0, 0, S, num_frames], device=symbols_BS.device).expand(B, 4)
    if boundary_B4.shape != (B, 4):
        raise ValueError(f"boundary of shape {tuple(boundary_B4.shape)} for {B} utterances: give ({B}, 4)")
    check_boundary(boundary_B4, num_frames, S, rnnt_type)
    return to_device(boundary_B4.long(), symbols_BS.device)


def check_boundary(boundary_B4: Tensor, num_frames: int, S: int, rnnt_type: str) -> None:
    """Waits for the device unless the boundary is on the CPU.

    Raises:
        ValueError: for an empty batch, an unknown type, a row beyond the padded lengths or with fewer frames than
            symbols where each symbol takes one.
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
    """Log of the summed probability of all alignments from (s_begin, t_begin) to (s_end, t_end).

    Kuang et al. 2022 (arXiv 2206.13236). The sums run in float64 whatever the type of the inputs, in which the
    results come back. Differentiable once in symbol_BTR and blank_BTR: the occupations are the gradient of the
    score. An utterance without an alignment has the score -inf and occupations (hence gradients) of zero.

    Args:
        symbol_BTR: log-probability of the symbol arc that leaves cell (start + r, t); -inf where s = S.
        blank_BTR: likewise of its blank.
        boundary_B4: int64, on the device of the scores.
        num_symbols: S.
        regular: a symbol stays in its frame; else it takes a frame, as a blank does.
        start_BT: the s of the first of each frame's R cells, which must not fall over time; arcs to a cell that
            is not kept are not taken, save to the end. None: all cells are kept (R = S+1).
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
            from ssm_asr.ops import lattice_kernel as lattice_kernels  # only where Triton is installed

            score_B, *occupations = lattice_kernels.sums(*given, RAREST_ARC)
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
    """The fields of `lattice_score`, whose arguments these are."""
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
    """-inf for each arc that leads neither to a kept cell within the boundary nor to the end."""
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
    """Where the cells lie once they are ordered by step: the cells of one step do not depend on each other.

    In a regular lattice a step is an anti-diagonal, s + t; else it is a frame. Either way the kept cells of one
    step have different s mod R, their slots, since the kept s of a frame are neighbours that never fall over
    time. From a step to the next a blank keeps its slot and a symbol moves on by one, from the last to the first.
    """

    num_steps: int
    blank_N: Tensor  # of the N = B*T*R cells, the index of the blank arc in a flattened (K, 2, B, R)
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
    # Cells before the begin go round to the last steps: no alignment goes through them there either.
    step_BTR = (step_BTR - first_step_B[:, None, None]) % num_steps
    utterance_B11 = torch.arange(B, device=device)[:, None, None]
    blank_BTR = (step_BTR * 2 * B + utterance_B11) * R + s_BTR % R
    return _StepOrder(num_steps, blank_BTR.flatten(), s_begin_B % R, end_step_B, s_end_B % R)


def _forward_states(arcs_K2BR: Tensor, steps: _StepOrder, pruned: bool) -> Tensor:
    """(K+1, B, R): log-probability of all ways from the begin to each cell."""
    K, _, B, R = arcs_K2BR.shape
    state_KBR = arcs_K2BR.new_full((K + 1, B, R), -torch.inf)
    state_KBR[0].scatter_(1, steps.start_slot_B[:, None], 0.0)
    _advance(arcs_K2BR, state_KBR, pruned)
    return state_KBR


def _occupations(arcs_K2BR: Tensor, state_KBR: Tensor, steps: _StepOrder, pruned: bool) -> Tensor:
    """(K, 2, B, R): probability that an alignment takes each arc; overwrites the arcs."""
    K, _, B, R = arcs_K2BR.shape
    # Of the ways into a cell, the share that comes by this arc. A cell without any has none to share.
    total_KBR = state_KBR[1:].masked_fill(state_KBR[1:] == -torch.inf, 0.0)
    share_K2BR = arcs_K2BR.add_(state_KBR[:-1, None])
    share_K2BR[:, 0].sub_(total_KBR)
    share_K2BR[:, 1].sub_(total_KBR.roll(-1, dims=-1))
    share_K2BR.exp_()

    # Probability that an alignment goes through a cell. After the slots the first comes again, in which a symbol
    # of the last one ends.
    visits_KBR = arcs_K2BR.new_zeros(K + 1, B, R + 1)
    ends = (steps.end_step_B, torch.arange(B, device=arcs_K2BR.device), steps.end_slot_B)
    visits_KBR[ends] = visits_KBR.new_ones(B)  # a number of the host's would have to be brought to the device
    _retreat(share_K2BR, visits_KBR, pruned)
    visits_KBR[:, :, R] = visits_KBR[:, :, 0]
    share_K2BR[:, 0].mul_(visits_KBR[1:, :, :R])
    share_K2BR[:, 1].mul_(visits_KBR[1:, :, 1:])
    return functional.threshold(share_K2BR, RAREST_ARC, 0.0, inplace=True)


def _advance(arcs_K2BR: Tensor, state_KBR: Tensor, pruned: bool) -> None:
    """Fills the states (K+1, B, R) from the first; only where pruned do symbols go round to the first slot."""
    _, _, B, R = arcs_K2BR.shape
    arrived = arcs_K2BR.new_full((2, B, R + 1), -torch.inf)  # one column before the slots, for going round
    leaving, by_blank, by_symbol = arrived[:, :, 1:], arrived[0, :, 1:], arrived[1, :, :R]
    last, first = arrived[1, :, R], arrived[1, :, 0]
    states = state_KBR.unbind(0)
    for k, arcs_2BR in enumerate(arcs_K2BR.unbind(0)):
        torch.add(states[k], arcs_2BR, out=leaving)
        if pruned:
            first.copy_(last)
        torch.logaddexp(by_blank, by_symbol, out=states[k + 1])


def _retreat(share_K2BR: Tensor, visits_KBR: Tensor, pruned: bool) -> None:
    """Adds to the visits (K+1, B, R+1), from the last, what each arc hands back to the cell it leaves."""
    R = share_K2BR.shape[3]
    here, after = visits_KBR[:, :, :R].unbind(0), visits_KBR[:, :, 1:].unbind(0)
    first, again = visits_KBR[:, :, 0].unbind(0), visits_KBR[:, :, R].unbind(0)
    blank_share, symbol_share = share_K2BR[:, 0].unbind(0), share_K2BR[:, 1].unbind(0)
    for k in range(len(share_K2BR) - 1, -1, -1):
        if pruned:
            again[k + 1].copy_(first[k + 1])
        here[k].addcmul_(here[k + 1], blank_share[k])
        here[k].addcmul_(after[k + 1], symbol_share[k])

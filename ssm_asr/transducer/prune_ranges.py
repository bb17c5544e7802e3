"""Chooses the cells of the lattice that a pruned transducer loss keeps.

A frame has a column of S+1 cells, one for each number of symbols that have been emitted. Of each column a window of R
neighbouring cells is kept.

Source: Kuang et al. 2022 (arXiv 2206.13236).

Shapes: B utterances, T frames, S symbols, U = S+1 cells of a frame, R kept cells of a frame, W possible windows.
"""

import torch
from torch import Tensor

from ssm_asr.ops.lattice import checked_boundary


def get_rnnt_prune_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int) -> Tensor:
    """Returns the cells to keep (B, T, R), each as its number of emitted symbols.

    Of each frame it keeps the window that alignments visit most.

    Args:
        px_grad: occupations of the symbol arcs, from the simple or smoothed loss: (B, S, T+1) for a regular lattice,
            else (B, S, T).
        py_grad: occupations of the blank arcs, (B, S+1, T).
        boundary: (B, 4), see `rnnt_loss_smoothed`.
        s_range: R. A regular lattice gets a larger one if its windows would not reach the last symbol; R is never more
            than S+1.

    Raises:
        ValueError: as in `checked_boundary`; in a regular lattice also for an utterance without frames and for R < 2.
    """
    _, S, symbol_frames = px_grad.shape
    num_frames = py_grad.shape[2]
    regular = symbol_frames == num_frames + 1
    on_device_B4 = checked_boundary(boundary, num_frames, px_grad[:, :, 0], "regular" if regular else "modified")
    if regular:
        for utterance, frames in enumerate(boundary[:, 3].tolist()):
            if frames == 0:
                raise ValueError(f"utterance {utterance} has no frames to prune: drop it")
    length = window_length(boundary, S, s_range, regular)
    if regular and length < 2:
        raise ValueError(f"{length} cell a frame does not let symbols through a regular lattice: keep 2 or more")
    start_BT = window_starts(px_grad[:, :, :num_frames].mT, py_grad.mT, on_device_B4, length, regular)
    return start_BT[..., None] + torch.arange(length, device=start_BT.device)


def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Takes am (B, T, C) and lm (B, S+1, C) at the cells of the ranges (B, T, R); returns both as (B, T, R, C)."""
    utterance_B11 = torch.arange(len(ranges), device=ranges.device)[:, None, None]
    return am[:, :, None].expand(-1, -1, ranges.shape[2], -1), lm[utterance_B11, ranges]


def window_length(boundary_B4: Tensor, num_symbols: int, wanted: int, regular: bool) -> int:
    """Returns R: `wanted`, or more if a regular lattice's windows would not reach the last symbol; S+1 at most."""
    if regular:
        _, _, s_end_B, t_end_B = boundary_B4.unbind(1)
        needed_B = torch.div(s_end_B - 1, t_end_B, rounding_mode="trunc") + 2
        wanted = max(wanted, int(needed_B.max()))
    return min(wanted, num_symbols + 1)


def window_starts(
    symbol_occupation_BTS: Tensor,
    blank_occupation_BTU: Tensor,
    boundary_B4: Tensor,
    length: int,
    regular: bool,
) -> Tensor:
    """Returns the first kept cell (B, T) of each frame.

    It never falls from one frame to the next, and rises by at most R-1 in a regular lattice, by at most 1 in others, so
    that alignments can follow.

    Args:
        symbol_occupation_BTS: probability that an alignment takes each symbol arc.
        blank_occupation_BTU: probability that an alignment takes each blank arc.
        boundary_B4: see `rnnt_loss_smoothed`.
        length: R.
        regular: whether a symbol stays in its frame.
    """
    windows = blank_occupation_BTU.shape[2] - length + 1
    # The score of a window is the occupation of its blanks minus the occupation of the symbol arc that enters it from
    # the cell below. The R terms are summed directly, because differences of cumulative sums would lose the digits that
    # decide between windows.
    score_BTW = blank_occupation_BTU.unfold(2, length, 1).sum(-1)
    score_BTW[:, :, 1:].sub_(symbol_occupation_BTS[:, :, : windows - 1])
    best_BT = score_BTW.argmax(2)

    _, _, s_end_B1, t_end_B1 = boundary_B4[:, :, None].unbind(1)
    frame_T = torch.arange(best_BT.shape[1], device=best_BT.device)
    best_BT = torch.where(frame_T < t_end_B1 - 1, best_BT, (s_end_B1 - length + 1).clamp(min=0))
    return limit_rise(suffix_minimum(best_BT), length - 1 if regular else 1)


def suffix_minimum(start_BT: Tensor) -> Tensor:
    """Lowers each start to the least of all later ones, so that no window starts below an earlier window."""
    return start_BT.flip(1).cummin(1).values.flip(1)


def limit_rise(start_BT: Tensor, step: int) -> Tensor:
    """Raises starts so that no window starts more than `step` above the window before; the first window starts at 0."""
    ramp_T = step * torch.arange(start_BT.shape[1], device=start_BT.device)
    raised_BT = (start_BT - ramp_T).flip(1).cummax(1).values.flip(1) + ramp_T
    return torch.minimum(raised_BT, ramp_T)

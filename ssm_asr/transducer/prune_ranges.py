"""Which cells of the lattice a pruned transducer loss keeps (Kuang et al. 2022, arXiv 2206.13236).

Shapes: B utterances, T frames, S symbols, U = S+1 rows of cells, R kept cells of a frame.
"""

import torch
from torch import Tensor

from ssm_asr.ops.lattice import checked_boundary


def get_rnnt_prune_ranges(px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int) -> Tensor:
    """Rows (B, T, R) of the cells to keep: of each frame the R neighbours that hold the most occupation.

    Args:
        px_grad: occupations of symbol arcs by the simple or smoothed loss, (B, S, T+1) of a regular lattice, else
            (B, S, T).
        py_grad: of blanks, (B, S+1, T).
        boundary: (B, 4), see `rnnt_loss_smoothed`.
        s_range: R, which a regular lattice raises where it would not reach its end; at most S+1 in any case.

    Raises:
        ValueError: for an utterance without frames or R < 2 in a regular lattice; else for more symbols than frames.
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
    """am (B, T, C) and lm (B, S+1, C) at the cells of the ranges (B, T, R): both (B, T, R, C)."""
    utterance_B11 = torch.arange(len(ranges), device=ranges.device)[:, None, None]
    return am[:, :, None].expand(-1, -1, ranges.shape[2], -1), lm[utterance_B11, ranges]


def window_length(boundary_B4: Tensor, num_symbols: int, wanted: int, regular: bool) -> int:
    """R: long enough that windows of a regular lattice reach the last symbol by the last frame, S+1 at most."""
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
    """First kept row (B, T) of each frame: rises by at most R-1 a frame (regular) or 1, and never falls."""
    windows = blank_occupation_BTU.shape[2] - length + 1
    # A window scores the blanks of its rows less the symbols that lead into it from the row below. The R terms
    # are summed as they are: differences of cumulative sums would lose the digits that decide.
    score_BTW = blank_occupation_BTU.unfold(2, length, 1).sum(-1)
    score_BTW[:, :, 1:].sub_(symbol_occupation_BTS[:, :, : windows - 1])
    best_BT = score_BTW.argmax(2)

    _, _, s_end_B1, t_end_B1 = boundary_B4[:, :, None].unbind(1)
    frame_T = torch.arange(best_BT.shape[1], device=best_BT.device)
    best_BT = torch.where(frame_T < t_end_B1 - 1, best_BT, (s_end_B1 - length + 1).clamp(min=0))
    return limit_rise(suffix_minimum(best_BT), length - 1 if regular else 1)


def suffix_minimum(start_BT: Tensor) -> Tensor:
    """Lowers frames to the least of all later ones, so that no window starts below an earlier one."""
    return start_BT.flip(1).cummin(1).values.flip(1)


def limit_rise(start_BT: Tensor, step: int) -> Tensor:
    """Raises frames so that no window starts more than `step` above the one before, the first one at 0."""
    ramp_T = step * torch.arange(start_BT.shape[1], device=start_BT.device)
    raised_BT = (start_BT - ramp_T).flip(1).cummax(1).values.flip(1) + ramp_T
    return torch.minimum(raised_BT, ramp_T)

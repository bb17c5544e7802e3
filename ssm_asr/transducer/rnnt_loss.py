"""Transducer losses under k2's names and arguments (Kuang et al. 2022, arXiv 2206.13236), in plain PyTorch.

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, R kept cells of a frame, V vocabulary
with the blank. A boundary row is [s_begin, t_begin, s_end, t_end]. Losses are in nats.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ssm_asr.ops.joiner_terms import LogitTerms
from ssm_asr.ops.lattice import LatticeScore, checked_boundary, lattice_score
from ssm_asr.ops.precision import at_least_float32
from ssm_asr.ops.sum_joint import smoothed_terms
from ssm_asr.transducer.prune_ranges import do_rnnt_pruning, get_rnnt_prune_ranges

__all__ = [
    "do_rnnt_pruning",
    "get_rnnt_prune_ranges",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
]


def rnnt_loss_simple(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """`rnnt_loss_smoothed` without smoothing: the joint is log_softmax(am + lm)."""
    scales = (0.0, 0.0)
    return rnnt_loss_smoothed(
        lm,
        am,
        symbols,
        termination_symbol,
        *scales,
        boundary,
        rnnt_type,
        delay_penalty,
        reduction,
        return_grad,
    )


def rnnt_loss_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
) -> Any:
    """Loss over the whole lattice of a joint smoothed by its two halves (arXiv 2206.13236).

    Args:
        lm: (B, S+1, V) of the predictor.
        am: (B, T, V) of the encoder.
        symbols: (B, S) ids.
        termination_symbol: the blank.
        lm_only_scale: share of the predictor's own log-probabilities.
        am_only_scale: share of the encoder's, by the batch's mean predictor.
        boundary: (B, 4); None is [0, 0, S, T] for all.
        rnnt_type: "regular"; "modified": each symbol takes a frame; "constrained": each takes the blank of its
            frame as well.
        delay_penalty: added to a symbol's log-probability for each frame that it comes earlier.
        reduction: "none", "mean" over the batch, or "sum".
        return_grad: whether to return the occupations: the gradient of each utterance's score, which is minus its
            loss, with respect to its symbol arcs (B, S, T+1), or (B, S, T) unless regular, and blanks (B, S+1, T).

    Returns:
        The loss, or (loss, (symbol occupations, blank occupations)).

    Raises:
        ValueError: as `checked_boundary` and for an unknown reduction.
    """
    boundary = checked_boundary(boundary, am.shape[1], symbols, rnnt_type)
    symbol_BTU, blank_BTU = smoothed_terms(lm, am, symbols.long(), termination_symbol, lm_only_scale, am_only_scale)
    lattice = score_arcs(symbol_BTU, blank_BTU, boundary, symbols.shape[1], rnnt_type, delay_penalty)
    loss = _reduce(-lattice.score_B, reduction)
    if not return_grad:
        return loss
    px_grad = lattice.symbol_occupation_BTR[:, :, :-1].mT
    if rnnt_type == "regular":
        px_grad = functional.pad(px_grad, (0, 1))
    return loss, (px_grad, lattice.blank_occupation_BTR.mT)


def rnnt_loss_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    use_hat_loss: bool = False,
) -> Tensor:
    """Loss over the cells that the ranges keep; infinite where they leave an utterance no alignment.

    Args:
        logits: (B, T, R, V) of the joiner at those cells.
        ranges: (B, T, R) of `get_rnnt_prune_ranges`.
        use_hat_loss: the blank is a Bernoulli variable of its own (Variani et al. 2020, arXiv 2003.07705).
        others: as in `rnnt_loss_smoothed`.

    Raises:
        ValueError: as `checked_boundary`, for an unknown reduction, for ranges that fall over time, and for a
            HAT blank other than 0.
    """
    boundary = checked_boundary(boundary, logits.shape[1], symbols, rnnt_type)
    start_BT = ranges[:, :, 0]
    if bool((start_BT.diff(dim=1) < 0).any()):
        raise ValueError("ranges that fall over time: give those of get_rnnt_prune_ranges")
    next_symbol_BTR = next_symbols(symbols, ranges)
    logits = at_least_float32(logits)
    if use_hat_loss:
        symbol_BTR, blank_BTR = _hat_terms(logits, next_symbol_BTR, termination_symbol)
    else:
        symbol_BTR, blank_BTR = LogitTerms.apply(logits, next_symbol_BTR, termination_symbol)
    lattice = score_arcs(symbol_BTR, blank_BTR, boundary, symbols.shape[1], rnnt_type, delay_penalty, start_BT)
    return _reduce(-lattice.score_B, reduction)


def rnnt_loss(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    use_hat_loss: bool = False,
) -> Tensor:
    """`rnnt_loss_pruned` over the whole lattice: logits (B, T, S+1, V)."""
    ranges = torch.arange(logits.shape[2], device=logits.device).expand(logits.shape[:3])
    return rnnt_loss_pruned(
        logits,
        symbols,
        ranges,
        termination_symbol,
        boundary,
        rnnt_type,
        delay_penalty,
        reduction,
        use_hat_loss,
    )


def _hat_terms(logits_BTRV: Tensor, next_symbol_BTR: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    if blank != 0:
        raise ValueError(f"blank {blank}: the HAT loss needs blank 0")
    blank_logit_BTR, symbol_logits = logits_BTRV[..., 0], logits_BTRV[..., 1:]
    symbol_logit_BTR = logits_BTRV.gather(3, next_symbol_BTR[..., None])[..., 0]
    symbol_BTR = functional.logsigmoid(-blank_logit_BTR) + symbol_logit_BTR - symbol_logits.logsumexp(3)
    return symbol_BTR, functional.logsigmoid(blank_logit_BTR)


def next_symbols(symbols_BS: Tensor, row_BTR: Tensor) -> Tensor:
    """The id that each cell's symbol arc puts out; any id for cells of the last row, which have none."""
    S = symbols_BS.shape[1]
    if S == 0:
        return torch.zeros_like(row_BTR)
    return symbols_BS.long().gather(1, row_BTR.clamp(max=S - 1).flatten(1)).view(row_BTR.shape)


def score_arcs(
    symbol_BTR: Tensor,
    blank_BTR: Tensor,
    boundary_B4: Tensor,
    num_symbols: int,
    rnnt_type: str,
    delay_penalty: float,
    start_BT: Tensor | None = None,
) -> LatticeScore:
    symbol_BTR = symbol_arcs(symbol_BTR, blank_BTR, boundary_B4, rnnt_type, delay_penalty, start_BT is not None)
    return lattice_score(symbol_BTR, blank_BTR, boundary_B4, num_symbols, rnnt_type == "regular", start_BT)


def symbol_arcs(
    symbol_BTR: Tensor,
    blank_BTR: Tensor,
    boundary_B4: Tensor,
    rnnt_type: str,
    delay_penalty: float,
    pruned: bool = False,
) -> Tensor:
    """With what a type adds, and without symbols at the end's frame where alignments could come by them."""
    t_end_B11 = boundary_B4[:, 3, None, None]
    frame_T1 = torch.arange(symbol_BTR.shape[1], device=symbol_BTR.device)[:, None]
    if delay_penalty != 0.0:
        symbol_BTR = symbol_BTR + delay_penalty * ((t_end_B11 - 1) / 2 - frame_T1).to(symbol_BTR.dtype)
    if rnnt_type == "constrained":
        symbol_BTR = symbol_BTR + functional.pad(blank_BTR[:, :, 1:], (0, 1), value=-torch.inf)
    if rnnt_type == "regular" and not pruned:  # else the lattice has no such alignments
        symbol_BTR = symbol_BTR.masked_fill(frame_T1 >= t_end_B11, -torch.inf)
    return symbol_BTR


def _reduce(loss_B: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss_B
    if reduction == "mean":
        return loss_B.mean()
    if reduction == "sum":
        return loss_B.sum()
    raise ValueError(f"reduction {reduction!r}: give none, mean or sum")

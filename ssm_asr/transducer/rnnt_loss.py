"""Transducer losses in plain PyTorch, with the names and arguments of k2.

A row of a boundary is [s_begin, t_begin, s_end, t_end]: the symbols and frames of an utterance. Losses are in nats.

Source: Kuang et al. 2022 (arXiv 2206.13236).

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, R kept cells of a frame, V vocabulary with the
blank.
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
    """Computes `rnnt_loss_smoothed` without smoothing: the joint is log_softmax(am + lm)."""
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
    """Computes the loss over the whole lattice, with a joint that is smoothed by its two halves.

    Source: Kuang et al. 2022 (arXiv 2206.13236).

    Args:
        lm: logits (B, S+1, V) from the predictor.
        am: logits (B, T, V) from the encoder.
        symbols: ids (B, S).
        termination_symbol: id of the blank.
        lm_only_scale: share of the log-probabilities that the predictor alone gives.
        am_only_scale: share of the log-probabilities that the encoder gives with the batch's mean predictor output.
        boundary: (B, 4); None means [0, 0, S, T] for all utterances.
        rnnt_type: "regular"; "modified", in which each symbol takes a frame; or "constrained", in which each symbol
            takes a frame and also the probability of the blank that follows it in this frame.
        delay_penalty: a symbol at frame t gets delay_penalty·((t_end - 1)/2 - t) added to its log-probability, so that
            early symbols are favoured.
        reduction: "none", "mean" over the batch, or "sum".
        return_grad: whether to return the occupations too. They are the gradient of each utterance's score (minus its
            loss) with respect to its symbol arcs, (B, S, T+1) if regular, else (B, S, T), and its blank arcs,
            (B, S+1, T).

    Returns:
        The loss, or (loss, (symbol occupations, blank occupations)).

    Raises:
        ValueError: as in `checked_boundary`, and for an unknown reduction.
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
    """Computes the loss over the cells that the ranges keep. It is infinite where they leave an utterance no alignment.

    The other arguments are described at `rnnt_loss_smoothed`.

    Args:
        logits: (B, T, R, V), from the joiner at the kept cells.
        ranges: (B, T, R), from `get_rnnt_prune_ranges`.
        use_hat_loss: whether the blank has a Bernoulli distribution of its own beside the distribution over symbols
            (Variani et al. 2020, arXiv 2003.07705).

    Raises:
        ValueError: as in `checked_boundary`; for an unknown reduction, for ranges that fall over time, and for a blank
            other than 0 with use_hat_loss.
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
    """Computes `rnnt_loss_pruned` over the whole lattice, from logits (B, T, S+1, V)."""
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
    """Returns (symbol, blank) log-probabilities (B, T, R) as in Variani et al. 2020 (arXiv 2003.07705)."""
    if blank != 0:
        raise ValueError(f"blank {blank}: the HAT loss needs blank 0")
    blank_logit_BTR, symbol_logits = logits_BTRV[..., 0], logits_BTRV[..., 1:]
    symbol_logit_BTR = logits_BTRV.gather(3, next_symbol_BTR[..., None])[..., 0]
    symbol_BTR = functional.logsigmoid(-blank_logit_BTR) + symbol_logit_BTR - symbol_logits.logsumexp(3)
    return symbol_BTR, functional.logsigmoid(blank_logit_BTR)


def next_symbols(symbols_BS: Tensor, row_BTR: Tensor) -> Tensor:
    """Returns the id (B, T, R) that the symbol arc of each cell emits.

    Cells of the last row, which have no symbol arc, get any id.

    Args:
        symbols_BS: ids.
        row_BTR: number of emitted symbols of each cell.
    """
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
    """Returns the score and the occupations of the lattice (see `lattice_score`), after `symbol_arcs`."""
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
    """Returns the log-probabilities of the symbol arcs with the delay penalty and the terms of the lattice's type.

    In a regular lattice that is not pruned, arcs at frame t_end and later are set to -inf, because the end could be
    reached over them. In all other lattices these arcs do not lead to the end, or `lattice_score` cuts them.

    Args:
        symbol_BTR: log-probability of the symbol arc of each cell.
        blank_BTR: log-probability of the blank arc of each cell.
        boundary_B4: see `rnnt_loss_smoothed`.
        rnnt_type: see `rnnt_loss_smoothed`.
        delay_penalty: see `rnnt_loss_smoothed`.
        pruned: whether only windows of the lattice are kept.
    """
    t_end_B11 = boundary_B4[:, 3, None, None]
    frame_T1 = torch.arange(symbol_BTR.shape[1], device=symbol_BTR.device)[:, None]
    if delay_penalty != 0.0:
        symbol_BTR = symbol_BTR + delay_penalty * ((t_end_B11 - 1) / 2 - frame_T1).to(symbol_BTR.dtype)
    if rnnt_type == "constrained":
        symbol_BTR = symbol_BTR + functional.pad(blank_BTR[:, :, 1:], (0, 1), value=-torch.inf)
    if rnnt_type == "regular" and not pruned:
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

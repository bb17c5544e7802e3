"""This module computes log-probabilities of the simple joiner, which only adds up two projections.

They may be smoothed with the distributions of the two projections alone: `am` of the encoder, `lm` of the predictor.

Source: Kuang et al. 2022, "Pruned RNN-T" (arXiv 2206.13236).

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, V vocabulary with the blank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ssm_asr.ops import dispatch
from ssm_asr.ops.pieces import full_precision, pieces
from ssm_asr.ops.precision import at_least_float32


def smoothed_terms(
    lm_BUV: Tensor, am_BTV: Tensor, symbols_BS: Tensor, blank: int, lm_scale: float, am_scale: float
) -> tuple[Tensor, Tensor]:
    """Computes the log-probabilities of symbol and blank by the simple joiner, in float32 at least.

    Args:
        lm_BUV: logits of the predictor.
        am_BTV: logits of the encoder.
        symbols_BS: int64 ids; symbol s may follow predictor output s.
        blank: id of the blank.
        lm_scale: weight of the distribution by the predictor alone.
        am_scale: weight of the distribution by the encoder alone, with the predictor's mean distribution as a prior.

    Returns:
        The log-probabilities of the symbols (B, T, U), -inf at the last predictor output, which no symbol follows, and
        the log-probabilities of the blank (B, T, U).
    """
    half = {am_BTV.dtype, lm_BUV.dtype} <= {torch.float16, torch.bfloat16}
    if half and am_scale == 0.0 and dispatch.use_kernels(am_BTV):
        from ssm_asr.ops.sum_joint_kernel import SmoothedTerms  # only where Triton is installed

        return SmoothedTerms.apply(am_BTV, lm_BUV, symbols_BS, blank, lm_scale)
    lm_BUV, am_BTV = at_least_float32(lm_BUV), at_least_float32(am_BTV)
    am_symbol_BTS, am_blank_BT, normaliser_BTU = SumJointTerms.apply(am_BTV, lm_BUV, symbols_BS, blank)
    lm_symbol_BS, lm_blank_BU = lm_BUV[:, :-1].gather(2, symbols_BS[..., None])[..., 0], lm_BUV[:, :, blank]
    joint_scale = 1.0 - lm_scale - am_scale
    symbol_BTS = joint_scale * (am_symbol_BTS + lm_symbol_BS[:, None] - normaliser_BTU[:, :, :-1])
    blank_BTU = joint_scale * (am_blank_BT[..., None] + lm_blank_BU[:, None] - normaliser_BTU)
    if lm_scale != 0.0:
        lm_normaliser_BU = lm_BUV.logsumexp(2)
        symbol_BTS = symbol_BTS + lm_scale * (lm_symbol_BS - lm_normaliser_BU[:, :-1])[:, None]
        blank_BTU = blank_BTU + lm_scale * (lm_blank_BU - lm_normaliser_BU)[:, None]
    if am_scale != 0.0:
        log_unigram_V = (lm_BUV.softmax(2).mean((0, 1)) + torch.finfo(lm_BUV.dtype).tiny).log()
        am_normaliser_BT1 = (am_BTV + log_unigram_V).logsumexp(2, keepdim=True)
        symbol_BTS = symbol_BTS + am_scale * (am_symbol_BTS + log_unigram_V[symbols_BS][:, None] - am_normaliser_BT1)
        blank_BTU = blank_BTU + am_scale * (am_blank_BT[..., None] + log_unigram_V[blank] - am_normaliser_BT1)
    return functional.pad(symbol_BTS, (0, 1), value=-torch.inf), blank_BTU


class SumJointTerms(torch.autograd.Function):
    """Computes the parts of log_softmax(am + lm).

    The parts are am at the symbols (B, T, S), am at the blank (B, T), and the normalisers (B, T, U). One matrix product
    gives the normalisers for all pairs of a frame and a predictor output: log Σ_v exp(am_v)·exp(lm_v).
    """

    @staticmethod
    def forward(
        ctx: Any, am_BTV: Tensor, lm_BUV: Tensor, symbols_BS: Tensor, blank: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, V = am_BTV.shape
        sum_BTU = am_BTV.new_empty(B, T, lm_BUV.shape[1])
        normaliser_BTU = torch.empty_like(sum_BTU)
        with full_precision(am_BTV):
            for batch in pieces(B, T * V, am_BTV.device):
                am_exp, am_max = _exp_below_max(am_BTV[batch])
                lm_exp, lm_max = _exp_below_max(lm_BUV[batch])
                # The smallest number keeps the logarithm finite where a frame and a predictor output share no likely
                # token.
                torch.add(torch.matmul(am_exp, lm_exp.mT), smallest(am_exp.dtype), out=sum_BTU[batch])
                normaliser_BTU[batch] = sum_BTU[batch].log() + am_max + lm_max.mT
        ctx.save_for_backward(am_BTV, lm_BUV, symbols_BS, sum_BTU)
        ctx.blank = blank
        am_symbol_BTS = am_BTV.gather(2, symbols_BS[:, None].expand(-1, T, -1))
        return am_symbol_BTS, am_BTV[:, :, blank].clone(), normaliser_BTU

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_symbol_BTS: Tensor, d_blank_BT: Tensor, d_normaliser_BTU: Tensor
    ) -> tuple[Tensor | None, ...]:
        am_BTV, lm_BUV, symbols_BS, sum_BTU = ctx.saved_tensors
        B, T, V = am_BTV.shape
        d_am_BTV, d_lm_BUV = torch.empty_like(am_BTV), torch.empty_like(lm_BUV)
        with full_precision(am_BTV):
            for batch in pieces(B, T * V, am_BTV.device):
                am_exp, _ = _exp_below_max(am_BTV[batch])
                lm_exp, _ = _exp_below_max(lm_BUV[batch])
                d_sum = d_normaliser_BTU[batch] / sum_BTU[batch]
                torch.matmul(d_sum, lm_exp, out=d_am_BTV[batch])
                d_am_BTV[batch].mul_(am_exp)
                torch.matmul(d_sum.mT, am_exp, out=d_lm_BUV[batch])
                d_lm_BUV[batch].mul_(lm_exp)
        d_am_BTV[:, :, ctx.blank].add_(d_blank_BT)
        d_am_BTV.scatter_add_(2, symbols_BS[:, None].expand(-1, T, -1), d_symbol_BTS)
        return d_am_BTV, d_lm_BUV, None, None


def smallest(dtype: torch.dtype) -> float:
    """Returns the smallest normal number of a type."""
    return torch.finfo(dtype).tiny


def _exp_below_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns exp(x - max) and max, with the maximum taken over the last dimension."""
    max_x = x.amax(2, keepdim=True)
    return (x - max_x).exp_(), max_x

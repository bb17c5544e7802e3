"""Log-probabilities of blank and next symbol at the cells of a lattice, without a tensor over cells and vocabulary.

A loss needs two numbers of a cell's distribution and its normaliser. The functions here work through the cells
in pieces, keep the normalisers, and compute the distributions again in the backward pass, where a piece of the
logits turns into its own gradient in place.

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, R kept cells of a frame, V vocabulary with
the blank, J joiner dimension; N cells and M frames of one piece.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Largest piece of a distribution tensor, in numbers: on a CPU small enough for its cache.
PIECE_NUMEL_CPU = 1 << 20
PIECE_NUMEL_GPU = 1 << 24


def pieces(count: int, numel_each: int, device: torch.device) -> Iterator[slice]:
    """Cuts `count` items of `numel_each` numbers into slices of at most PIECE_NUMEL_* numbers, or of one item."""
    numel = PIECE_NUMEL_CPU if device.type == "cpu" else PIECE_NUMEL_GPU
    size = max(1, numel // max(1, numel_each))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


class SumJointTerms(torch.autograd.Function):
    """log_softmax(am + lm) in parts: am at the symbols (B, T, S), am at the blank (B, T), normalisers (B, T, U).

    The normaliser of every pair of a frame and a predictor output is one matrix product: log sum_v exp(am_v)
    exp(lm_v) (arXiv 2206.13236).
    """

    @staticmethod
    def forward(
        ctx: Any, am_BTV: Tensor, lm_BUV: Tensor, symbols_BS: Tensor, blank: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, V = am_BTV.shape
        normaliser_BTU = am_BTV.new_empty(B, T, lm_BUV.shape[1])
        with _full_precision(am_BTV):
            for batch in pieces(B, T * V, am_BTV.device):
                am_exp, am_max = _exp_below_max(am_BTV[batch])
                lm_exp, lm_max = _exp_below_max(lm_BUV[batch])
                normaliser_BTU[batch] = _sum_exp(am_exp, lm_exp).log_() + am_max + lm_max.mT
        ctx.save_for_backward(am_BTV, lm_BUV, symbols_BS)
        ctx.blank = blank
        am_symbol_BTS = am_BTV.gather(2, symbols_BS[:, None].expand(-1, T, -1))
        return am_symbol_BTS, am_BTV[:, :, blank].clone(), normaliser_BTU

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_symbol_BTS: Tensor, d_blank_BT: Tensor, d_normaliser_BTU: Tensor
    ) -> tuple[Tensor | None, ...]:
        am_BTV, lm_BUV, symbols_BS = ctx.saved_tensors
        B, T, V = am_BTV.shape
        d_am_BTV, d_lm_BUV = torch.empty_like(am_BTV), torch.empty_like(lm_BUV)
        with _full_precision(am_BTV):
            for batch in pieces(B, T * V, am_BTV.device):
                am_exp, _ = _exp_below_max(am_BTV[batch])
                lm_exp, _ = _exp_below_max(lm_BUV[batch])
                d_sum = d_normaliser_BTU[batch] / _sum_exp(am_exp, lm_exp)
                torch.matmul(d_sum, lm_exp, out=d_am_BTV[batch])
                d_am_BTV[batch].mul_(am_exp)
                torch.matmul(d_sum.mT, am_exp, out=d_lm_BUV[batch])
                d_lm_BUV[batch].mul_(lm_exp)
        d_am_BTV[:, :, ctx.blank].add_(d_blank_BT)
        d_am_BTV.scatter_add_(2, symbols_BS[:, None].expand(-1, T, -1), d_symbol_BTS)
        return d_am_BTV, d_lm_BUV, None, None


def _exp_below_max(x: Tensor) -> tuple[Tensor, Tensor]:
    max_x = x.amax(2, keepdim=True)
    return (x - max_x).exp_(), max_x


def _sum_exp(am_exp: Tensor, lm_exp: Tensor) -> Tensor:
    # Without the smallest number a frame and a context that share no likely token would have the logarithm of 0.
    return torch.matmul(am_exp, lm_exp.mT) + torch.finfo(am_exp.dtype).tiny


class LogitTerms(torch.autograd.Function):
    """(symbol, blank) log-probabilities, each (B, T, R), of logits (B, T, R, V)."""

    @staticmethod
    def forward(ctx: Any, logits_BTRV: Tensor, symbol_BTR: Tensor, blank: int) -> tuple[Tensor, Tensor]:
        logits_NV, symbol_N = logits_BTRV.flatten(0, 2), symbol_BTR.flatten()
        terms_3N = logits_NV.new_empty(3, len(logits_NV))
        for cells in pieces(len(logits_NV), logits_NV.shape[1], logits_NV.device):
            _cell_terms(logits_NV[cells], symbol_N[cells], blank, out=terms_3N[:, cells])
        ctx.save_for_backward(logits_BTRV, symbol_BTR, terms_3N[2])
        ctx.blank = blank
        return terms_3N[0].view_as(symbol_BTR), terms_3N[1].view_as(symbol_BTR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_symbol_BTR: Tensor, d_blank_BTR: Tensor) -> tuple[Tensor | None, ...]:
        logits_BTRV, symbol_BTR, normaliser_N = ctx.saved_tensors
        logits_NV, symbol_N = logits_BTRV.flatten(0, 2), symbol_BTR.flatten()
        d_symbol_N, d_blank_N = d_symbol_BTR.flatten(), d_blank_BTR.flatten()
        d_logits_NV = torch.empty_like(logits_NV)
        for cells in pieces(len(logits_NV), logits_NV.shape[1], logits_NV.device):
            torch.sub(logits_NV[cells], normaliser_N[cells, None], out=d_logits_NV[cells])
            _to_gradient(d_logits_NV[cells], symbol_N[cells], ctx.blank, d_symbol_N[cells], d_blank_N[cells])
        return d_logits_NV.view_as(logits_BTRV), None, None


def _cell_terms(logits_NV: Tensor, symbol_N: Tensor, blank: int, out: Tensor) -> None:
    """Writes the rows symbol log-probability, blank log-probability, normaliser."""
    normaliser_N = logits_NV.logsumexp(1)
    out[0] = logits_NV.gather(1, symbol_N[:, None])[:, 0] - normaliser_N
    out[1] = logits_NV[:, blank] - normaliser_N
    out[2] = normaliser_N


def _to_gradient(log_probs_NV: Tensor, symbol_N: Tensor, blank: int, d_symbol_N: Tensor, d_blank_N: Tensor) -> None:
    """Overwrites log-probabilities by the gradient with respect to the logits."""
    log_probs_NV.exp_().mul_(-(d_symbol_N + d_blank_N)[:, None])
    log_probs_NV[:, blank].add_(d_blank_N)
    log_probs_NV.scatter_add_(1, symbol_N[:, None], d_symbol_N[:, None])


class JoinerTerms(torch.autograd.Function):
    """(symbol, blank) log-probabilities, each (B, T, R), of softmax(tanh(encoder + decoder) weight' + bias).

    Neither the logits nor their inputs exist for more than one piece of the cells. Cells of frames that are not
    in `frame_M` get zeros. The matrix products run in the type that the caller names, all else in the type of
    `bias_V` (float32 under autocast).
    """

    @staticmethod
    def forward(
        ctx: Any,
        encoder_BTJ: Tensor,
        decoder_BUJ: Tensor,
        weight_VJ: Tensor,
        bias_V: Tensor,
        row_BTR: Tensor,  # s of each cell
        symbol_BTR: Tensor,  # id of each cell's symbol
        frame_M: Tensor,  # indices into the flattened (B, T)
        blank: int,
        matmul_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        B, T, R = symbol_BTR.shape
        ctx.blank, ctx.matmul_dtype = blank, matmul_dtype
        row_BTR = row_BTR + decoder_BUJ.shape[1] * torch.arange(B, device=row_BTR.device)[:, None, None]
        terms_3BTR = bias_V.new_zeros(3, B, T, R)
        with _full_precision(encoder_BTJ):
            cells = _JoinerCells(encoder_BTJ, decoder_BUJ, weight_VJ, bias_V, row_BTR, matmul_dtype)
            for frames in _frame_pieces(frame_M, R, weight_VJ):
                _, logits_NV = cells.logits(frames)
                terms_3N = bias_V.new_empty(3, len(logits_NV))
                _cell_terms(logits_NV, symbol_BTR.flatten(0, 1)[frames].flatten(), blank, out=terms_3N)
                terms_3BTR.flatten(1, 2)[:, frames] = terms_3N.view(3, -1, R)
        ctx.save_for_backward(encoder_BTJ, decoder_BUJ, weight_VJ, bias_V, row_BTR, symbol_BTR, frame_M, terms_3BTR[2])
        return terms_3BTR[0], terms_3BTR[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_symbol_BTR: Tensor, d_blank_BTR: Tensor) -> tuple[Tensor | None, ...]:
        encoder_BTJ, decoder_BUJ, weight_VJ, bias_V, row_BTR, symbol_BTR, frame_M, normaliser_BTR = ctx.saved_tensors
        R = symbol_BTR.shape[2]
        d_encoder = bias_V.new_zeros(encoder_BTJ.shape).flatten(0, 1)
        d_decoder = bias_V.new_zeros(decoder_BUJ.shape).flatten(0, 1)
        d_weight_VJ, d_bias_V = bias_V.new_zeros(weight_VJ.shape), torch.zeros_like(bias_V)
        with _full_precision(encoder_BTJ):
            cells = _JoinerCells(encoder_BTJ, decoder_BUJ, weight_VJ, bias_V, row_BTR, ctx.matmul_dtype)
            for frames in _frame_pieces(frame_M, R, weight_VJ):
                hidden_NJ, d_logits_NV = cells.logits(frames)
                symbol_N, normaliser_N, d_symbol_N, d_blank_N, row_N = (
                    x.flatten(0, 1)[frames].flatten()
                    for x in (symbol_BTR, normaliser_BTR, d_symbol_BTR, d_blank_BTR, row_BTR)
                )
                d_logits_NV -= normaliser_N[:, None]
                _to_gradient(d_logits_NV, symbol_N, ctx.blank, d_symbol_N, d_blank_N)
                d_bias_V += d_logits_NV.sum(0)
                d_logits_NV = d_logits_NV.to(ctx.matmul_dtype)
                d_weight_VJ += d_logits_NV.mT @ hidden_NJ.to(ctx.matmul_dtype)
                d_hidden_NJ = (d_logits_NV @ cells.weight_VJ).to(bias_V.dtype)
                d_sum_NJ = d_hidden_NJ.addcmul_(d_hidden_NJ, hidden_NJ.square().to(bias_V.dtype), value=-1)
                d_encoder[frames] = d_sum_NJ.view(len(frames), R, -1).sum(1)
                d_decoder.index_add_(0, row_N, d_sum_NJ)
        return (
            d_encoder.view_as(encoder_BTJ).to(encoder_BTJ.dtype),
            d_decoder.view_as(decoder_BUJ).to(decoder_BUJ.dtype),
            d_weight_VJ.to(weight_VJ.dtype),
            d_bias_V,
            *(None,) * 5,
        )


def _frame_pieces(frame_M: Tensor, cells_per_frame: int, weight_VJ: Tensor) -> Iterator[Tensor]:
    width = max(weight_VJ.shape)
    return (frame_M[piece] for piece in pieces(len(frame_M), cells_per_frame * width, weight_VJ.device))


class _JoinerCells:
    """Computes the joiner at the cells of given frames, forward and again backward."""

    def __init__(
        self,
        encoder_BTJ: Tensor,
        decoder_BUJ: Tensor,
        weight_VJ: Tensor,
        bias_V: Tensor,
        row_BTR: Tensor,
        matmul_dtype: torch.dtype,
    ) -> None:
        self.encoder, self.decoder = encoder_BTJ.flatten(0, 1), decoder_BUJ.flatten(0, 1)
        self.weight_VJ, self.bias_V = weight_VJ.to(matmul_dtype), bias_V
        self.row = row_BTR.flatten(0, 1)

    def logits(self, frames_M: Tensor) -> tuple[Tensor, Tensor]:
        """tanh(encoder + decoder) (N, J) and the logits (N, V) of the cells of these frames."""
        row_MR = self.row[frames_M]
        decoder_MRJ = self.decoder.index_select(0, row_MR.flatten()).view(*row_MR.shape, -1)
        hidden_NJ = (self.encoder[frames_M][:, None] + decoder_MRJ).tanh_().flatten(0, 1)
        logits_NV = functional.linear(hidden_NJ.to(self.weight_VJ.dtype), self.weight_VJ)
        return hidden_NJ, logits_NV.to(self.bias_V.dtype).add_(self.bias_V)

"""This module computes the log-probabilities of blank and next symbol at the cells of a lattice.

A loss needs only these two log-probabilities of each cell. They follow from two logits and a normaliser, so no tensor
of distributions over all cells is made. The functions here work through the cells in pieces and keep the normalisers.
The backward pass computes the distributions of a piece again, and turns them into the gradient of the logits in place.

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, R kept cells of a frame, V vocabulary with the
blank, J joiner dimension, N cells and M frames of one piece.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ssm_asr.ops import dispatch
from ssm_asr.ops.pieces import full_precision, pieces


class LogitTerms(torch.autograd.Function):
    """Takes the log-probabilities of symbol and blank, (B, T, R) each, from logits (B, T, R, V).

    `apply` takes the logits, the id (B, T, R) of the symbol in each cell, and the id of the blank.
    """

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
    """Writes three rows: the log-probability of the symbol, the log-probability of the blank, and the normaliser."""
    normaliser_N = logits_NV.logsumexp(1)
    out[0] = logits_NV.gather(1, symbol_N[:, None])[:, 0] - normaliser_N
    out[1] = logits_NV[:, blank] - normaliser_N
    out[2] = normaliser_N


def _to_gradient(log_probs_NV: Tensor, symbol_N: Tensor, blank: int, d_symbol_N: Tensor, d_blank_N: Tensor) -> None:
    """Overwrites log-probabilities with the gradient of the logits."""
    log_probs_NV.exp_().mul_(-(d_symbol_N + d_blank_N)[:, None])
    log_probs_NV[:, blank].add_(d_blank_N)
    log_probs_NV.scatter_add_(1, symbol_N[:, None], d_symbol_N[:, None])


class JoinerTerms(torch.autograd.Function):
    """Computes the log-probabilities of symbol and blank, (B, T, R) each, from projected encoder and predictor outputs.

    The distribution is softmax(tanh(encoder + decoder)·weightᵀ + bias). Neither the logits nor the tanh exist for more
    than one piece of the cells at a time. Cells of frames that are not in `frame_M` get zeros. Matrix products run in
    `matmul_dtype`, everything else in the type of `bias_V` (float32 under autocast).
    """

    @staticmethod
    def forward(
        ctx: Any,
        encoder_BTJ: Tensor,
        decoder_BUJ: Tensor,
        weight_VJ: Tensor,
        bias_V: Tensor,
        row_BTR: Tensor,  # s of each cell: neighbours in a frame, which do not fall over the frames
        symbol_BTR: Tensor,  # id of the symbol that may follow in each cell
        frame_M: Tensor,  # indices into the flattened (B, T)
        blank: int,
        matmul_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        B, T, R = symbol_BTR.shape
        ctx.blank = blank
        row_BTR = row_BTR + decoder_BUJ.shape[1] * torch.arange(B, device=row_BTR.device)[:, None, None]
        terms_3BTR = bias_V.new_zeros(3, B, T, R)
        inputs = (encoder_BTJ, decoder_BUJ, weight_VJ, bias_V, row_BTR, symbol_BTR)
        with full_precision(encoder_BTJ):
            ctx.cells = _joiner_cells(*inputs, matmul_dtype)  # kept for the backward pass, with the cast weight
            for frames in _frame_pieces(frame_M, R, weight_VJ):
                ctx.cells.write_terms(frames, blank, terms_3BTR)
        ctx.save_for_backward(*inputs, frame_M, terms_3BTR[2])
        return terms_3BTR[0], terms_3BTR[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_symbol_BTR: Tensor, d_blank_BTR: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, frame_M, normaliser_BTR = ctx.saved_tensors
        encoder_BTJ, _, weight_VJ, *_ = inputs
        with full_precision(encoder_BTJ):
            gradients = ctx.cells.gradients(
                _frame_pieces(frame_M, d_symbol_BTR.shape[2], weight_VJ),
                ctx.blank,
                normaliser_BTR,
                d_symbol_BTR,
                d_blank_BTR,
            )
        return *(d_x.view_as(x).to(x.dtype) for d_x, x in zip(gradients, inputs, strict=False)), *(None,) * 5


def _frame_pieces(frame_M: Tensor, cells_per_frame: int, weight_VJ: Tensor) -> Iterator[Tensor]:
    width = max(weight_VJ.shape)
    return (frame_M[piece] for piece in pieces(len(frame_M), cells_per_frame * width, weight_VJ.device))


def _joiner_cells(*inputs: Any) -> Any:
    """Makes the joiner at the cells, by kernels or in PyTorch. Both have `write_terms` and `gradients`."""
    bias_V = inputs[3]
    if dispatch.use_kernels(bias_V) and bias_V.dtype == torch.float32:
        from ssm_asr.ops import joiner_terms_kernel  # only where Triton is installed

        return joiner_terms_kernel.JoinerCells(*inputs)
    return _JoinerCells(*inputs)


class _JoinerCells:
    """Computes the joiner at the cells of given frames, in the forward pass and again in the backward pass."""

    def __init__(
        self,
        encoder_BTJ: Tensor,
        decoder_BUJ: Tensor,
        weight_VJ: Tensor,
        bias_V: Tensor,
        row_BTR: Tensor,
        symbol_BTR: Tensor,
        matmul_dtype: torch.dtype,
    ) -> None:
        self.encoder, self.decoder = encoder_BTJ.flatten(0, 1), decoder_BUJ.flatten(0, 1)
        self.weight_VJ, self.bias_V = weight_VJ.to(matmul_dtype), bias_V
        self.row, self.symbol = row_BTR.flatten(0, 1), symbol_BTR.flatten(0, 1)

    def _logits(self, frames_M: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tanh(encoder + decoder), (N, J), and the logits (N, V) for the cells of these frames."""
        row_MR = self.row[frames_M]
        decoder_MRJ = self.decoder.index_select(0, row_MR.flatten()).view(*row_MR.shape, -1)
        hidden_NJ = (self.encoder[frames_M][:, None] + decoder_MRJ).tanh_().flatten(0, 1)
        logits_NV = functional.linear(hidden_NJ.to(self.weight_VJ.dtype), self.weight_VJ)
        return hidden_NJ, logits_NV.to(self.bias_V.dtype).add_(self.bias_V)

    def write_terms(self, frames_M: Tensor, blank: int, terms_3BTR: Tensor) -> None:
        """Writes the log-probabilities of symbol and blank, and the normaliser, for the cells of these frames."""
        _, logits_NV = self._logits(frames_M)
        terms_3N = self.bias_V.new_empty(3, len(logits_NV))
        _cell_terms(logits_NV, self.symbol[frames_M].flatten(), blank, out=terms_3N)
        terms_3BTR.flatten(1, 2)[:, frames_M] = terms_3N.view(3, len(frames_M), -1)

    def gradients(
        self,
        frame_pieces: Iterable[Tensor],
        blank: int,
        normaliser_BTR: Tensor,
        d_symbol_BTR: Tensor,
        d_blank_BTR: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the gradients of encoder (B·T, J), decoder (B·U, J), weight and bias, given the terms' gradients."""
        dtype = self.bias_V.dtype
        d_encoder, d_decoder = (torch.zeros_like(x, dtype=dtype) for x in (self.encoder, self.decoder))
        d_weight_VJ, d_bias_V = torch.zeros_like(self.weight_VJ, dtype=dtype), torch.zeros_like(self.bias_V)
        cells = (self.symbol, self.row, *(x.flatten(0, 1) for x in (normaliser_BTR, d_symbol_BTR, d_blank_BTR)))
        for frames_M in frame_pieces:
            hidden_NJ, d_logits_NV = self._logits(frames_M)
            symbol_N, row_N, normaliser_N, d_symbol_N, d_blank_N = (x[frames_M].flatten() for x in cells)
            d_logits_NV -= normaliser_N[:, None]
            _to_gradient(d_logits_NV, symbol_N, blank, d_symbol_N, d_blank_N)
            d_bias_V += d_logits_NV.sum(0)
            d_logits_NV = d_logits_NV.to(self.weight_VJ.dtype)
            d_weight_VJ += d_logits_NV.mT @ hidden_NJ.to(self.weight_VJ.dtype)
            d_hidden_NJ = (d_logits_NV @ self.weight_VJ).to(dtype)
            d_sum_NJ = d_hidden_NJ.addcmul_(d_hidden_NJ, hidden_NJ.square().to(dtype), value=-1)
            d_encoder[frames_M] = d_sum_NJ.view(len(frames_M), -1, d_sum_NJ.shape[1]).sum(1)
            d_decoder.index_add_(0, row_N, d_sum_NJ)
        return d_encoder, d_decoder, d_weight_VJ, d_bias_V

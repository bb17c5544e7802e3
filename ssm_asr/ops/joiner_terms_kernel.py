"""These kernels do what `ssm_asr.ops.joiner_terms.JoinerTerms` needs beside matrix products. Each reads its input once.

Logits have columns beyond the vocabulary, so that rows of matrices end with a memory line. The weights of these columns
are 0 and their biases -inf, so their probabilities and gradients are 0. All sums run in float32 and in a fixed order.

Shapes: B utterances, T frames, F = B·T frames of all utterances, U predictor outputs, G = B·U predictor outputs of all
utterances, R kept cells of a frame, M frames and N = M·R cells of one piece, J joiner dimension, V vocabulary, P >= V
columns of the logits, S slabs of cells.
"""

from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ssm_asr.ops.dispatch import ANY_COUNT, MEMORY_LINE
from ssm_asr.ops.sums_kernel import rows, slabs_of, totals

ELEMENTS, WIDTH = 4096, 512  # the elements and the most columns of a program's tile
TERMS, GRADIENT = (2048, 128), (1024, 256)  # likewise for tiles of logits, in the forward and in the backward pass
FRAMES = 16  # frames of a tile for the gradient of the predictor
LOWEST = tl.constexpr(-3e38)


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, e - 1.0, 1.0 - e) / (1.0 + e)


@triton.jit
def _load(ptr, n, j, width, mask):  # type: ignore[no-untyped-def]
    """Loads rows n of a matrix in float32."""
    return tl.load(ptr + n.to(tl.int64)[:, None] * width + j[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _frames(frame_ptr, M, J, FRAMES: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the program's frames in the piece, which exist, their indices among all, its channels, and a mask."""
    m = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    j = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    frame = tl.load(frame_ptr + m, mask=m < M, other=0)
    return m, m < M, frame, j, (m < M)[:, None] & (j < J)[None, :]


@triton.jit(do_not_specialize=ANY_COUNT)
def _hidden_kernel(  # type: ignore[no-untyped-def]
    encoder_ptr, decoder_ptr, row_ptr, frame_ptr, hidden_ptr, M,
    R: tl.constexpr, J: tl.constexpr, FRAMES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    m, inside, frame, j, mask = _frames(frame_ptr, M, J, FRAMES, WIDTH)
    encoder = _load(encoder_ptr, frame, j, J, mask)
    for r in range(R):
        row = tl.load(row_ptr + frame * R + r, mask=inside, other=0)
        hidden = _tanh(encoder + _load(decoder_ptr, row, j, J, mask))
        tl.store(hidden_ptr + (m.to(tl.int64) * R + r)[:, None] * J + j[None, :], hidden, mask=mask)


@triton.jit(do_not_specialize=ANY_COUNT)
def _encoder_gradient_kernel(  # type: ignore[no-untyped-def]
    encoder_ptr, decoder_ptr, row_ptr, frame_ptr, d_hidden_ptr, d_encoder_ptr, M,
    R: tl.constexpr, J: tl.constexpr, FRAMES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    m, inside, frame, j, mask = _frames(frame_ptr, M, J, FRAMES, WIDTH)
    encoder = _load(encoder_ptr, frame, j, J, mask)
    total = tl.zeros((FRAMES, WIDTH), tl.float32)
    for r in range(R):
        row = tl.load(row_ptr + frame * R + r, mask=inside, other=0)
        hidden = _tanh(encoder + _load(decoder_ptr, row, j, J, mask))
        total += _load(d_hidden_ptr, m * R + r, j, J, mask) * (1.0 - hidden * hidden)
    tl.store(d_encoder_ptr + frame[:, None] * J + j[None, :], total, mask=mask)


@triton.jit(do_not_specialize=ANY_COUNT)
def _decoder_gradient_kernel(  # type: ignore[no-untyped-def]
    encoder_ptr, decoder_ptr, row_ptr, place_ptr, d_hidden_ptr, d_decoder_ptr, T, U,
    R: tl.constexpr, J: tl.constexpr, TIMES: tl.constexpr, FRAMES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of one predictor output, whose cells lie in frames next to each other."""
    g = tl.program_id(0)
    j = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    base = (g // U) * T
    t = tl.arange(0, TIMES)
    lowest_row = tl.load(row_ptr + (base + t).to(tl.int64) * R, mask=t < T, other=2147483647)
    start = tl.sum((lowest_row <= g - R).to(tl.int32), axis=0)
    end = tl.sum((lowest_row <= g).to(tl.int32), axis=0)
    out = d_decoder_ptr + g.to(tl.int64) * J + j
    decoder = tl.load(decoder_ptr + g.to(tl.int64) * J + j, mask=j < J, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((FRAMES, WIDTH), tl.float32)
    while start < end:
        times = start + tl.arange(0, FRAMES)
        m = tl.load(place_ptr + base + times, mask=times < end, other=-1)
        inside = (times < end) & (m >= 0)
        r = g - tl.load(row_ptr + (base + times).to(tl.int64) * R, mask=inside, other=0)
        mask = inside[:, None] & (j < J)[None, :]
        hidden = _tanh(_load(encoder_ptr, base + times, j, J, mask) + decoder)
        total += _load(d_hidden_ptr, m * R + r, j, J, mask) * (1.0 - hidden * hidden)
        start += FRAMES
    tl.store(out, tl.sum(total, axis=0), mask=j < J)


@triton.jit(do_not_specialize=ANY_COUNT)
def _terms_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, symbol_ptr, frame_ptr, terms_ptr, N, num_cells, blank,
    R: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    largest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, P, WIDTH):
        v = begin + tl.arange(0, WIDTH)
        bias = tl.load(bias_ptr + v, mask=v < P, other=-float("inf"))
        x = _load(logits_ptr, n, v, P, inside[:, None] & (v < P)[None, :]) + bias[None, :]
        larger = tl.maximum(largest, tl.max(x, axis=1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger[:, None]), axis=1)
        largest = larger
    normaliser = largest + tl.log(total)
    cell = tl.load(frame_ptr + n // R, mask=inside, other=0) * R + n % R
    symbol = tl.load(symbol_ptr + cell, mask=inside, other=0)
    row = logits_ptr + n.to(tl.int64) * P
    symbol_logit = tl.load(row + symbol, mask=inside, other=0.0).to(tl.float32) + tl.load(bias_ptr + symbol)
    blank_logit = tl.load(row + blank, mask=inside, other=0.0).to(tl.float32) + tl.load(bias_ptr + blank)
    tl.store(terms_ptr + cell, symbol_logit - normaliser, mask=inside)
    tl.store(terms_ptr + num_cells + cell, blank_logit - normaliser, mask=inside)
    tl.store(terms_ptr + 2 * num_cells + cell, normaliser, mask=inside)


@triton.jit(do_not_specialize=ANY_COUNT)
def _logits_gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias_ptr, symbol_ptr, frame_ptr, normaliser_ptr, d_symbol_ptr, d_blank_ptr, sums_ptr,
    N, slab_rows, blank, R: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Overwrites the logits of a slab of cells with their gradients, and sums these over the cells."""
    v = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    bias = tl.load(bias_ptr + v, mask=v < P, other=-float("inf"))
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    done = 0
    while done < slab_rows:
        n = tl.program_id(0) * slab_rows + done + tl.arange(0, ROWS)
        inside = n < N
        mask = inside[:, None] & (v < P)[None, :]
        cell = tl.load(frame_ptr + n // R, mask=inside, other=0) * R + n % R
        d_symbol = tl.load(d_symbol_ptr + cell, mask=inside, other=0.0)
        d_blank = tl.load(d_blank_ptr + cell, mask=inside, other=0.0)
        symbol = tl.load(symbol_ptr + cell, mask=inside, other=0)
        normaliser = tl.load(normaliser_ptr + cell, mask=inside, other=float("inf"))
        x = _load(logits_ptr, n, v, P, mask) + bias[None, :] - normaliser[:, None]
        gradient = tl.exp(x) * -(d_symbol + d_blank)[:, None]
        gradient += tl.where(v[None, :] == symbol[:, None], d_symbol[:, None], 0.0)
        gradient += tl.where(v[None, :] == blank, d_blank[:, None], 0.0)
        tl.store(logits_ptr + n.to(tl.int64)[:, None] * P + v[None, :], gradient, mask=mask)
        total += gradient
        done += ROWS
    tl.store(sums_ptr + tl.program_id(0) * P + v, tl.sum(total, axis=0), mask=v < P)


def columns(vocab_size: int) -> int:
    """Returns P, the vocabulary size rounded up to whole memory lines."""
    return triton.cdiv(vocab_size, MEMORY_LINE) * MEMORY_LINE


def _tile(width: int, elements: int = ELEMENTS, most: int = WIDTH) -> tuple[int, int]:
    """Returns the rows and columns of a program's tile for a matrix with `width` columns."""
    columns = min(most, triton.next_power_of_2(width))
    return elements // columns, columns


class JoinerCells:
    """Computes the joiner at the cells of given frames, as `ssm_asr.ops.joiner_terms._JoinerCells` does, by kernels.

    Inputs may be in float32 or half precision, and of different types.
    """

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
        self.T, self.U = encoder_BTJ.shape[1], decoder_BUJ.shape[1]
        self.V, self.J = weight_VJ.shape
        self.R = row_BTR.shape[2]
        padding = columns(self.V) - self.V
        self.encoder, self.decoder = rows(encoder_BTJ).contiguous(), rows(decoder_BUJ).contiguous()
        self.weight_PJ = functional.pad(weight_VJ.to(matmul_dtype), (0, 0, 0, padding))
        self.bias_P = functional.pad(bias_V, (0, padding), value=-torch.inf)
        self.row, self.symbol = row_BTR.contiguous(), symbol_BTR.contiguous()
        tile_frames, width = _tile(self.J)
        self.sizes = dict(R=self.R, J=self.J, FRAMES=tile_frames, WIDTH=width)

    @property
    def P(self) -> int:
        """The number of columns of the logits."""
        return len(self.weight_PJ)

    def _grid(self, frames_M: Tensor) -> tuple[int, int]:
        return triton.cdiv(len(frames_M), self.sizes["FRAMES"]), triton.cdiv(self.J, self.sizes["WIDTH"])

    def _logits(self, frames_M: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tanh(encoder + decoder), (N, J), and the logits before the bias, (N, P)."""
        hidden_NJ = self.weight_PJ.new_empty(len(frames_M) * self.R, self.J)
        _hidden_kernel[self._grid(frames_M)](
            self.encoder, self.decoder, self.row, frames_M, hidden_NJ, len(frames_M), **self.sizes
        )
        return hidden_NJ, hidden_NJ @ self.weight_PJ.mT

    def write_terms(self, frames_M: Tensor, blank: int, terms_3BTR: Tensor) -> None:
        """Writes the log-probabilities of symbol and blank, and the normaliser, for the cells of these frames."""
        _, logits_NP = self._logits(frames_M)
        tile_rows, width = _tile(self.P, *TERMS)
        _terms_kernel[(triton.cdiv(len(logits_NP), tile_rows),)](
            logits_NP, self.bias_P, self.symbol, frames_M, terms_3BTR, len(logits_NP), terms_3BTR[0].numel(), blank,
            R=self.R, P=self.P, ROWS=tile_rows, WIDTH=width,
        )  # fmt: skip

    def gradients(
        self,
        frame_pieces: Iterable[Tensor],
        blank: int,
        normaliser_BTR: Tensor,
        d_symbol_BTR: Tensor,
        d_blank_BTR: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the gradients of encoder (F, J), decoder (G, J), weight and bias, given the terms' gradients."""
        cells = (normaliser_BTR, d_symbol_BTR.contiguous(), d_blank_BTR.contiguous())
        pieces = list(frame_pieces)
        frames_M = torch.cat(pieces)
        d_hidden_NJ = self.weight_PJ.new_empty(len(frames_M) * self.R, self.J)
        d_weight_PJ = torch.zeros_like(self.weight_PJ, dtype=torch.float32)
        d_bias_P = torch.zeros_like(self.bias_P)
        for frames, d_hidden in zip(
            pieces, d_hidden_NJ.split([len(frames) * self.R for frames in pieces]), strict=True
        ):
            hidden, logits = self._logits(frames)
            d_bias_P += self._to_gradient(logits, frames, blank, *cells)
            d_weight_PJ += logits.mT @ hidden
            torch.mm(logits, self.weight_PJ, out=d_hidden)
        d_encoder_FJ, d_decoder_GJ = self._input_gradients(d_hidden_NJ, frames_M)
        return d_encoder_FJ, d_decoder_GJ, d_weight_PJ[: self.V], d_bias_P[: self.V]

    def _to_gradient(self, logits_NP: Tensor, frames_M: Tensor, blank: int, *cells: Tensor) -> Tensor:
        """Overwrites the logits with their gradients, and returns the sums (P,) of these over the cells."""
        tile_rows, width = _tile(self.P, *GRADIENT)
        N, tiles = len(logits_NP), triton.cdiv(self.P, width)
        slab_rows, slabs = slabs_of(N, tile_rows, tiles)
        sums_SP = self.bias_P.new_empty(slabs, self.P)
        _logits_gradient_kernel[(slabs, tiles)](
            logits_NP, self.bias_P, self.symbol, frames_M, *cells, sums_SP, N, slab_rows, blank,
            R=self.R, P=self.P, ROWS=tile_rows, WIDTH=width,
        )  # fmt: skip
        return totals(sums_SP, torch.float32)

    def _input_gradients(self, d_hidden_NJ: Tensor, frames_M: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradients of encoder (F, J) and decoder (G, J)."""
        d_encoder_FJ, d_decoder_GJ = torch.zeros_like(self.encoder), torch.empty_like(self.decoder)
        place_F = torch.full((len(self.encoder),), -1, dtype=torch.int32, device=frames_M.device)
        place_F[frames_M] = torch.arange(len(frames_M), dtype=torch.int32, device=frames_M.device)
        inputs = (self.encoder, self.decoder, self.row)
        _encoder_gradient_kernel[self._grid(frames_M)](
            *inputs, frames_M, d_hidden_NJ, d_encoder_FJ, len(frames_M), **self.sizes
        )
        width = min(ELEMENTS // FRAMES, self.sizes["WIDTH"])
        sizes = self.sizes | dict(TIMES=triton.next_power_of_2(self.T), FRAMES=FRAMES, WIDTH=width)
        _decoder_gradient_kernel[(len(d_decoder_GJ), triton.cdiv(self.J, width))](
            *inputs, place_F, d_hidden_NJ, d_decoder_GJ, self.T, self.U, **sizes
        )
        return d_encoder_FJ, d_decoder_GJ

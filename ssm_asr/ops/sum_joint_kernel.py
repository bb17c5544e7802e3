"""These kernels compute the log-probabilities of the simple joiner, and their gradients.

They compute `ssm_asr.ops.sum_joint.smoothed_terms` for an am_scale of 0. The logits `am` and `lm` are read once forward
and twice backward, in the half precision that they have; everything else runs in float32. Each factor of a matrix
product is cut into two bfloat16 numbers, and three products of these are added up. Errors are then 2⁻¹⁶ of a sum, far
below the rounding of the inputs. Sums run in a fixed order. Let E = exp(am - max), L = exp(lm - max), and let d_symbol
and d_blank be the gradients of the results. Then

    normaliser = log(E·Lᵀ) + maxima                     W = (d_symbol + d_blank) / (E·Lᵀ)
    d_am = (1 - lm_scale)·(d_symbol at the symbols + Σ_u d_blank at the blank - (W·L)·E)
    d_lm = Σ_t d_symbol at the symbol + Σ_t d_blank at the blank - (1 - lm_scale)·(Wᵀ·E)·L
           - lm_scale·Σ_t (d_symbol + d_blank)·softmax(lm)

E and L are kept multiplied by powers of 2, which cancel in the results. Otherwise products of small numbers would be
lost.

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, V vocabulary with the blank, 2 parts of a number.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssm_asr.ops.products_kernel import dot

# Frames, predictor outputs and tokens that a program takes at once, for the log-probabilities and for both gradients.
TERMS = dict(TIMES=64, OUTPUTS=64, WIDTH=32, num_warps=4)
AM_GRADIENT = dict(TIMES=64, OUTPUTS=16, WIDTH=64, num_warps=4)
LM_GRADIENT = dict(TIMES=64, OUTPUTS=64, WIDTH=64, num_warps=4)
ELEMENTS = 4096  # elements of a tile in kernels without matrix products
PART = torch.bfloat16  # type of the two parts of a factor
LOWEST = tl.constexpr(-3e38)
E_SCALE, L_SCALE = tl.constexpr(2.0**20), tl.constexpr(2.0**40)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _scaled_exp(x, scale):  # type: ignore[no-untyped-def]
    """Returns scale·exp(x), even where exp(x) alone would be smaller than the smallest normal number."""
    root = tl.exp(0.5 * x)
    return root * scale * root


@triton.jit
def _split(x, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    high = x.to(PART)
    return high, (x - high.to(tl.float32)).to(PART)


@triton.jit
def _load_am(am_ptr, t, v, T, V: tl.constexpr):  # type: ignore[no-untyped-def]
    mask = (t < T)[:, None] & (v < V)[None, :]
    return tl.load(am_ptr + t[:, None] * V + v[None, :], mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def _load_parts(ptr, size, i, j, rows, columns, stride_i, stride_j):  # type: ignore[no-untyped-def]
    """Loads both parts of a tile of a matrix. The parts lie `size` numbers apart."""
    place = i[:, None] * stride_i + j[None, :] * stride_j
    mask = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(ptr + place, mask=mask, other=0.0), tl.load(ptr + size + place, mask=mask, other=0.0)


@triton.jit
def _exp_kernel(  # type: ignore[no-untyped-def]
    lm_ptr, L_ptr, max_ptr, sum_ptr, size, N, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Computes L in two parts, the maximum of each row of lm, and the sum of L over each row."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    start = n.to(tl.int64)[:, None] * V
    most = tl.full((ROWS, WIDTH), LOWEST, tl.float32)
    for begin in range(0, V, WIDTH):
        v = begin + tl.arange(0, WIDTH)[None, :]
        x = tl.load(lm_ptr + start + v, mask=inside[:, None] & (v < V), other=-float("inf")).to(tl.float32)
        most = tl.maximum(most, x)
    largest = tl.max(most, axis=1)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in range(0, V, WIDTH):
        v = begin + tl.arange(0, WIDTH)[None, :]
        x = tl.load(lm_ptr + start + v, mask=inside[:, None] & (v < V), other=-float("inf")).to(tl.float32)
        L = _scaled_exp(x - largest[:, None], L_SCALE)
        high, low = _split(L, L_ptr.dtype.element_ty)
        tl.store(L_ptr + start + v, high, mask=inside[:, None] & (v < V))
        tl.store(L_ptr + size + start + v, low, mask=inside[:, None] & (v < V))
        total += L
    tl.store(max_ptr + n, largest, mask=inside)
    tl.store(sum_ptr + n, tl.sum(total, axis=1), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _sum_joint_kernel(  # type: ignore[no-untyped-def]
    am_ptr, lm_ptr, L_ptr, lm_max_ptr, lm_sum_ptr, symbols_ptr, am_max_ptr, sum_ptr, symbol_ptr, blank_ptr,
    T, U, size, blank, lm_scale, V: tl.constexpr, TIMES: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Computes both log-probabilities, the maximum of each frame, and E·Lᵀ times the scales of E and L."""
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TIMES + tl.arange(0, TIMES)
    u = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    am_ptr += b * T * V
    lm_ptr += b * U * V
    L_ptr += b * U * V
    largest = tl.full((TIMES,), LOWEST, tl.float32)
    total = tl.zeros((TIMES, OUTPUTS), tl.float32)
    for begin in range(0, V, WIDTH):
        v = begin + tl.arange(0, WIDTH)
        am = _load_am(am_ptr, t, v, T, V)
        high, low = _load_parts(L_ptr, size, u, v, U, V, V, 1)
        larger = tl.maximum(largest, tl.max(am, axis=1))
        total *= tl.exp(largest - larger)[:, None]
        E_high, E_low = _split(_scaled_exp(am - larger[:, None], E_SCALE), high.dtype)
        total = dot(E_high, E_low, tl.trans(high), tl.trans(low), total)
        largest = larger
    # The smallest number keeps the logarithm finite where a frame and a predictor output share no likely token.
    total += SMALLEST * E_SCALE * L_SCALE
    lm_max = tl.load(lm_max_ptr + b * U + u, mask=u < U, other=0.0)
    lm_normaliser = tl.log(tl.load(lm_sum_ptr + b * U + u, mask=u < U, other=1.0) / L_SCALE) + lm_max
    normaliser = tl.log(total / E_SCALE / L_SCALE) + largest[:, None] + lm_max[None, :]
    inside = (t < T)[:, None] & (u < U)[None, :]
    cell = t[:, None] * U + u[None, :]
    first = b * T * U

    symbol = tl.load(symbols_ptr + b * (U - 1) + u, mask=u < U - 1, other=0)
    for which in tl.static_range(2):
        token, out_ptr = (symbol, symbol_ptr) if which == 0 else (tl.zeros_like(symbol) + blank, blank_ptr)
        am = tl.load(am_ptr + t[:, None] * V + token[None, :], mask=inside, other=0.0).to(tl.float32)
        lm = tl.load(lm_ptr + u * V + token, mask=u < U, other=0.0).to(tl.float32)
        term = (1.0 - lm_scale) * (am + lm[None, :] - normaliser) + (lm_scale * (lm - lm_normaliser))[None, :]
        if which == 0:
            term = tl.where((u < U - 1)[None, :], term, -float("inf"))
        tl.store(out_ptr + first + cell, term, mask=inside)
    tl.store(sum_ptr + first + cell, total, mask=inside)
    tl.store(am_max_ptr + b * T + t, largest, mask=(t < T) & (tl.program_id(1) == 0))


@triton.jit
def _weights_kernel(  # type: ignore[no-untyped-def]
    sum_ptr, d_symbol_ptr, d_blank_ptr, W_ptr, N, U, ELEMENTS: tl.constexpr
):
    """Computes W in two parts."""
    n = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    d_symbol = tl.load(d_symbol_ptr + n, mask=(n < N) & (n % U < U - 1), other=0.0)
    d_blank = tl.load(d_blank_ptr + n, mask=n < N, other=0.0)
    W = (d_symbol + d_blank) / tl.load(sum_ptr + n, mask=n < N, other=1.0)
    high, low = _split(W, W_ptr.dtype.element_ty)
    tl.store(W_ptr + n, high, mask=n < N)
    tl.store(W_ptr + N + n, low, mask=n < N)


@triton.jit(do_not_specialize=["T"])
def _am_gradient_kernel(  # type: ignore[no-untyped-def]
    am_ptr, L_ptr, symbols_ptr, am_max_ptr, W_ptr, d_symbol_ptr, at_blank_ptr, d_am_ptr,
    T, U, size, blank, lm_scale, V: tl.constexpr, TIMES: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * TIMES + tl.arange(0, TIMES)
    v = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    L_ptr += b * U * V
    W_ptr += b * T * U
    cells = tl.num_programs(2).to(tl.int64) * T * U
    product = tl.zeros((TIMES, WIDTH), tl.float32)
    done = 0
    while done < U:
        u = done + tl.arange(0, OUTPUTS)
        W_high, W_low = _load_parts(W_ptr, cells, t, u, T, U, U, 1)
        L_high, L_low = _load_parts(L_ptr, size, u, v, U, V, V, 1)
        product = dot(W_high, W_low, L_high, L_low, product)
        done += OUTPUTS
    am = _load_am(am_ptr + b * T * V, t, v, T, V)
    am_max = tl.load(am_max_ptr + b * T + t, mask=t < T, other=0.0)
    d_am = -product * _scaled_exp(am - am_max[:, None], E_SCALE)
    at_blank = tl.load(at_blank_ptr + b * T + t, mask=t < T, other=0.0)
    d_am += tl.where(v[None, :] == blank, at_blank[:, None], 0.0)
    done = 0
    while done < U:
        u = done + tl.arange(0, OUTPUTS)
        symbol = tl.load(symbols_ptr + b * (U - 1) + u, mask=u < U - 1, other=-1)
        hit = (symbol[:, None] == v[None, :]).to(tl.float32)
        if tl.sum(hit) > 0.0:
            mask = (t < T)[:, None] & (u < U - 1)[None, :]
            d_symbol = tl.load(d_symbol_ptr + b * T * U + t[:, None] * U + u[None, :], mask=mask, other=0.0)
            high, low = _split(d_symbol, W_ptr.dtype.element_ty)
            d_am = tl.dot(low, hit.to(low.dtype), acc=d_am, input_precision="ieee")
            d_am = tl.dot(high, hit.to(high.dtype), acc=d_am, input_precision="ieee")
        done += OUTPUTS
    inside = (t < T)[:, None] & (v < V)[None, :]
    tl.store(d_am_ptr + b * T * V + (t[:, None] * V + v[None, :]), (1.0 - lm_scale) * d_am, mask=inside)


@triton.jit(do_not_specialize=["T"])
def _lm_gradient_kernel(  # type: ignore[no-untyped-def]
    am_ptr, L_ptr, lm_sum_ptr, symbols_ptr, am_max_ptr, W_ptr, at_symbol_ptr, at_blank_ptr, d_lm_ptr,
    T, U, size, blank, lm_scale, V: tl.constexpr, TIMES: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    u = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    v = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    am_ptr += b * T * V
    W_ptr += b * T * U
    cells = tl.num_programs(2).to(tl.int64) * T * U
    product = tl.zeros((OUTPUTS, WIDTH), tl.float32)
    done = 0
    while done < T:
        t = done + tl.arange(0, TIMES)
        W_high, W_low = _load_parts(W_ptr, cells, u, t, U, T, 1, U)
        am_max = tl.load(am_max_ptr + b * T + t, mask=t < T, other=0.0)
        E_high, E_low = _split(_scaled_exp(_load_am(am_ptr, t, v, T, V) - am_max[:, None], E_SCALE), W_high.dtype)
        product = dot(W_high, W_low, E_high, E_low, product)
        done += TIMES
    symbol = tl.load(symbols_ptr + b * (U - 1) + u, mask=u < U - 1, other=-1)
    at_symbol = tl.load(at_symbol_ptr + b * (U - 1) + u, mask=u < U - 1, other=0.0)
    at_blank = tl.load(at_blank_ptr + b * U + u, mask=u < U, other=0.0)
    alone = lm_scale * (at_symbol + at_blank) / tl.load(lm_sum_ptr + b * U + u, mask=u < U, other=1.0)
    high, low = _load_parts(L_ptr + b * U * V, size, u, v, U, V, V, 1)
    L = high.to(tl.float32) + low.to(tl.float32)
    d_lm = tl.where(v[None, :] == symbol[:, None], at_symbol[:, None], 0.0)
    d_lm += tl.where(v[None, :] == blank, at_blank[:, None], 0.0)
    d_lm -= ((1.0 - lm_scale) * product + alone[:, None]) * L
    inside = (u < U)[:, None] & (v < V)[None, :]
    tl.store(d_lm_ptr + b * U * V + (u[:, None] * V + v[None, :]), d_lm, mask=inside)


class SmoothedTerms(torch.autograd.Function):
    """Computes `ssm_asr.ops.sum_joint.smoothed_terms` with an am_scale of 0."""

    @staticmethod
    def forward(
        ctx: Any, am_BTV: Tensor, lm_BUV: Tensor, symbols_BS: Tensor, blank: int, lm_scale: float
    ) -> tuple[Tensor, Tensor]:
        (B, T, V), U = am_BTV.shape, lm_BUV.shape[1]
        am_BTV, lm_BUV, symbols_BS = am_BTV.contiguous(), lm_BUV.contiguous(), symbols_BS.contiguous()
        L_2BUV = lm_BUV.new_empty(2, B, U, V, dtype=PART)
        lm_max_BU, lm_sum_BU = lm_BUV.new_empty(2, B, U, dtype=torch.float32)
        width = min(ELEMENTS, triton.next_power_of_2(V))
        rows = ELEMENTS // width
        _exp_kernel[(triton.cdiv(B * U, rows),)](
            lm_BUV, L_2BUV, lm_max_BU, lm_sum_BU, lm_BUV.numel(), B * U, V=V, ROWS=rows, WIDTH=width, num_warps=8
        )
        sizes: dict[str, Any] = dict(T=T, U=U, size=lm_BUV.numel(), blank=blank, lm_scale=lm_scale, V=V)
        am_max_BT, (sum_BTU, symbol_BTU, blank_BTU) = lm_sum_BU.new_empty(B, T), lm_sum_BU.new_empty(3, B, T, U)
        _sum_joint_kernel[(triton.cdiv(T, TERMS["TIMES"]), triton.cdiv(U, TERMS["OUTPUTS"]), B)](
            am_BTV, lm_BUV, L_2BUV, lm_max_BU, lm_sum_BU, symbols_BS, am_max_BT, sum_BTU, symbol_BTU, blank_BTU,
            **TERMS, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(am_BTV, L_2BUV, lm_sum_BU, symbols_BS, am_max_BT, sum_BTU)
        ctx.lm_dtype, ctx.sizes = lm_BUV.dtype, sizes
        return symbol_BTU, blank_BTU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_symbol_BTU: Tensor, d_blank_BTU: Tensor) -> tuple[Tensor | None, ...]:
        am_BTV, L_2BUV, lm_sum_BU, symbols_BS, am_max_BT, sum_BTU = ctx.saved_tensors
        (B, T, V), U = am_BTV.shape, L_2BUV.shape[2]
        d_symbol_BTU, d_blank_BTU = d_symbol_BTU.contiguous(), d_blank_BTU.contiguous()
        W_2BTU = L_2BUV.new_empty(2, B, T, U)
        _weights_kernel[(triton.cdiv(sum_BTU.numel(), ELEMENTS),)](
            sum_BTU, d_symbol_BTU, d_blank_BTU, W_2BTU, sum_BTU.numel(), U, ELEMENTS=ELEMENTS
        )
        d_am_BTV, d_lm_BUV = torch.empty_like(am_BTV), lm_sum_BU.new_empty(B, U, V, dtype=ctx.lm_dtype)
        _am_gradient_kernel[(triton.cdiv(V, AM_GRADIENT["WIDTH"]), triton.cdiv(T, AM_GRADIENT["TIMES"]), B)](
            am_BTV, L_2BUV, symbols_BS, am_max_BT, W_2BTU, d_symbol_BTU, d_blank_BTU.sum(2), d_am_BTV,
            **AM_GRADIENT, **ctx.sizes,
        )  # fmt: skip
        _lm_gradient_kernel[(triton.cdiv(V, LM_GRADIENT["WIDTH"]), triton.cdiv(U, LM_GRADIENT["OUTPUTS"]), B)](
            am_BTV, L_2BUV, lm_sum_BU, symbols_BS, am_max_BT, W_2BTU, d_symbol_BTU[:, :, :-1].sum(1),
            d_blank_BTU.sum(1), d_lm_BUV, **LM_GRADIENT, **ctx.sizes,
        )  # fmt: skip
        return d_am_BTV, d_lm_BUV, None, None, None

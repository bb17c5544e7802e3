"""The simple joint's log-probabilities (`rnnt_loss.smoothed_terms`) in Triton kernels for GPUs, and their gradients.

What `am` and `lm` have for the whole vocabulary is read once forward and twice backward, in the type that it comes in;
everything else runs in float32, with matrix products of three tf32 products each, in the same order run after run.
With E = exp(am - max) and L = exp(lm - max), c the share of the joint, d_symbol and d_blank the gradients given:

    normaliser = log(E·Lᵀ) + maxima                     W = -c·(d_symbol + d_blank) / (E·Lᵀ)
    d_am = (W·L)·E + c·d_symbol at the symbols and c·Σ_u d_blank at the blank
    d_lm = (Wᵀ·E)·L - (1 - c)·Σ_t (d_symbol + d_blank)·softmax(lm)
           + Σ_t d_symbol at the symbol and Σ_t d_blank at the blank

Shapes: B utterances, T frames, S symbols, U = S+1 predictor outputs, V vocabulary with the blank.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Frames, predictor outputs and tokens that a program takes at once: for the terms and for both gradients.
TERMS = dict(TIMES=64, OUTPUTS=64, WIDTH=64, num_warps=8)
AM_GRADIENT = dict(TIMES=64, OUTPUTS=32, WIDTH=64, num_warps=8)
LM_GRADIENT = dict(TIMES=32, OUTPUTS=64, WIDTH=64, num_warps=8)
ELEMENTS = 4096  # of a tile of exponentials
LOWEST = tl.constexpr(-3e38)
DOWN = tl.constexpr(2.0**-40)  # of what is divided by E·Lᵀ, which may be as small as float32 can have it
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _exp_kernel(  # type: ignore[no-untyped-def]
    x_ptr, exp_ptr, max_ptr, sum_ptr, N, V: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """exp(x - max of a row), the max, and the row's sum of them."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    start = n.to(tl.int64)[:, None] * V
    most = tl.full((ROWS, WIDTH), LOWEST, tl.float32)
    for begin in range(0, V, WIDTH):
        v = begin + tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + start + v, mask=inside[:, None] & (v < V), other=-float("inf")).to(tl.float32)
        most = tl.maximum(most, x)
    largest = tl.max(most, axis=1)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in range(0, V, WIDTH):
        v = begin + tl.arange(0, WIDTH)[None, :]
        x = tl.load(x_ptr + start + v, mask=inside[:, None] & (v < V), other=-float("inf")).to(tl.float32)
        e = tl.exp(x - largest[:, None])
        tl.store(exp_ptr + start + v, e, mask=inside[:, None] & (v < V))
        total += e
    tl.store(max_ptr + n, largest, mask=inside)
    tl.store(sum_ptr + n, tl.sum(total, axis=1), mask=inside)


@triton.jit
def _sum_joint_kernel(  # type: ignore[no-untyped-def]
    am_ptr, lm_ptr, lm_exp_ptr, lm_max_ptr, lm_sum_ptr, symbols_ptr, am_max_ptr, sum_ptr, symbol_ptr, blank_ptr,
    T, U, blank, lm_scale, V: tl.constexpr, TIMES: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TIMES + tl.arange(0, TIMES)
    u = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    am_ptr += b * T * V + t[:, None] * V
    lm_exp_ptr += b * U * V
    lm_ptr += b * U * V
    first = b * T * U
    largest = tl.full((TIMES,), LOWEST, tl.float32)
    total = tl.zeros((TIMES, OUTPUTS), tl.float32)
    for begin in range(0, V, WIDTH):
        v = begin + tl.arange(0, WIDTH)
        am = tl.load(am_ptr + v[None, :], mask=(t < T)[:, None] & (v < V)[None, :], other=-float("inf")).to(tl.float32)
        lm_exp = tl.load(lm_exp_ptr + u[:, None] * V + v[None, :], mask=(u < U)[:, None] & (v < V)[None, :], other=0.0)
        larger = tl.maximum(largest, tl.max(am, axis=1))
        total *= tl.exp(largest - larger)[:, None]
        total = tl.dot(tl.exp(am - larger[:, None]), tl.trans(lm_exp), acc=total, input_precision="tf32x3")
        largest = larger
    # Without the smallest number a frame and a context that share no likely token would have the logarithm of 0.
    total += SMALLEST
    lm_max = tl.load(lm_max_ptr + b * U + u, mask=u < U, other=0.0)
    lm_normaliser = tl.log(tl.load(lm_sum_ptr + b * U + u, mask=u < U, other=1.0)) + lm_max
    normaliser = tl.log(total) + largest[:, None] + lm_max[None, :]
    inside = (t < T)[:, None] & (u < U)[None, :]
    cell = t[:, None] * U + u[None, :]

    symbol = tl.load(symbols_ptr + b * (U - 1) + u, mask=u < U - 1, other=0)
    for which in tl.static_range(2):
        token, out_ptr = (symbol, symbol_ptr) if which == 0 else (tl.zeros_like(symbol) + blank, blank_ptr)
        am = tl.load(am_ptr + token[None, :], mask=inside, other=0.0).to(tl.float32)
        lm = tl.load(lm_ptr + u * V + token, mask=u < U, other=0.0).to(tl.float32)
        term = (1.0 - lm_scale) * (am + lm[None, :] - normaliser) + (lm_scale * (lm - lm_normaliser))[None, :]
        if which == 0:
            term = tl.where((u < U - 1)[None, :], term, -float("inf"))
        tl.store(out_ptr + first + cell, term, mask=inside)
    tl.store(sum_ptr + first + cell, total, mask=inside)
    tl.store(am_max_ptr + b * T + t, largest, mask=(t < T) & (tl.program_id(1) == 0))


@triton.jit
def _am_gradient_kernel(  # type: ignore[no-untyped-def]
    am_ptr, lm_exp_ptr, symbols_ptr, am_max_ptr, sum_ptr, d_symbol_ptr, d_blank_ptr, d_am_ptr,
    T, U, blank, lm_scale, V: tl.constexpr, TIMES: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * TIMES + tl.arange(0, TIMES)
    v = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    lm_exp_ptr += b * U * V
    first = b * T * U
    product = tl.zeros((TIMES, WIDTH), tl.float32)
    at_symbols = tl.zeros((TIMES, WIDTH), tl.float32)
    at_blank = tl.zeros((TIMES,), tl.float32)
    done = 0
    while done < U:
        u = done + tl.arange(0, OUTPUTS)
        cell = t[:, None] * U + u[None, :]
        inside = (t < T)[:, None] & (u < U)[None, :]
        d_symbol = tl.load(d_symbol_ptr + first + cell, mask=inside & (u < U - 1)[None, :], other=0.0)
        d_blank = tl.load(d_blank_ptr + first + cell, mask=inside, other=0.0)
        weight = (d_symbol + d_blank) * DOWN / tl.load(sum_ptr + first + cell, mask=inside, other=1.0)
        lm_exp = tl.load(lm_exp_ptr + u[:, None] * V + v[None, :], mask=(u < U)[:, None] & (v < V)[None, :], other=0.0)
        product = tl.dot(weight, lm_exp, acc=product, input_precision="tf32x3")
        at_blank += tl.sum(d_blank, axis=1)
        symbol = tl.load(symbols_ptr + b * (U - 1) + u, mask=u < U - 1, other=-1)
        hit = (symbol[:, None] == v[None, :]).to(tl.float32)
        if tl.sum(hit) > 0.0:
            at_symbols = tl.dot(d_symbol, hit, acc=at_symbols, input_precision="tf32x3")
        done += OUTPUTS
    place = t[:, None] * V + v[None, :]
    inside = (t < T)[:, None] & (v < V)[None, :]
    am = tl.load(am_ptr + b * T * V + place, mask=inside, other=-float("inf")).to(tl.float32)
    am_max = tl.load(am_max_ptr + b * T + t, mask=t < T, other=0.0)
    d_am = at_symbols - product * tl.exp(am - am_max[:, None]) / DOWN
    d_am += tl.where(v[None, :] == blank, at_blank[:, None], 0.0)
    tl.store(d_am_ptr + b * T * V + place, (1.0 - lm_scale) * d_am, mask=inside)


@triton.jit
def _lm_gradient_kernel(  # type: ignore[no-untyped-def]
    am_ptr, lm_exp_ptr, lm_sum_ptr, symbols_ptr, am_max_ptr, sum_ptr, d_symbol_ptr, d_blank_ptr, d_lm_ptr,
    T, U, blank, lm_scale, V: tl.constexpr, TIMES: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    u = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    v = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    first = b * T * U
    product = tl.zeros((OUTPUTS, WIDTH), tl.float32)
    at_symbol, at_blank = tl.zeros((OUTPUTS,), tl.float32), tl.zeros((OUTPUTS,), tl.float32)
    done = 0
    while done < T:
        t = done + tl.arange(0, TIMES)
        cell = u[:, None] + t[None, :] * U
        inside = (u < U)[:, None] & (t < T)[None, :]
        d_symbol = tl.load(d_symbol_ptr + first + cell, mask=inside & (u < U - 1)[:, None], other=0.0)
        d_blank = tl.load(d_blank_ptr + first + cell, mask=inside, other=0.0)
        weight = (d_symbol + d_blank) * DOWN / tl.load(sum_ptr + first + cell, mask=inside, other=1.0)
        am = tl.load(
            am_ptr + b * T * V + t[:, None] * V + v[None, :],
            mask=(t < T)[:, None] & (v < V)[None, :], other=-float("inf"),
        ).to(tl.float32)  # fmt: skip
        am_max = tl.load(am_max_ptr + b * T + t, mask=t < T, other=0.0)
        product = tl.dot(weight, tl.exp(am - am_max[:, None]), acc=product, input_precision="tf32x3")
        at_symbol += tl.sum(d_symbol, axis=1)
        at_blank += tl.sum(d_blank, axis=1)
        done += TIMES
    symbol = tl.load(symbols_ptr + b * (U - 1) + u, mask=u < U - 1, other=-1)
    alone = lm_scale * (at_symbol + at_blank) / tl.load(lm_sum_ptr + b * U + u, mask=u < U, other=1.0)
    place = u[:, None] * V + v[None, :]
    inside = (u < U)[:, None] & (v < V)[None, :]
    lm_exp = tl.load(lm_exp_ptr + b * U * V + place, mask=inside, other=0.0)
    d_lm = tl.where(v[None, :] == symbol[:, None], at_symbol[:, None], 0.0)
    d_lm += tl.where(v[None, :] == blank, at_blank[:, None], 0.0)
    d_lm -= ((1.0 - lm_scale) * product * lm_exp) / DOWN + alone[:, None] * lm_exp
    tl.store(d_lm_ptr + b * U * V + place, d_lm, mask=inside)


class SmoothedTerms(torch.autograd.Function):
    """`rnnt_loss.smoothed_terms` with an am_scale of 0, in float32, of am and lm in float32 or half precision."""

    @staticmethod
    def forward(
        ctx: Any, am_BTV: Tensor, lm_BUV: Tensor, symbols_BS: Tensor, blank: int, lm_scale: float
    ) -> tuple[Tensor, Tensor]:
        (B, T, V), U = am_BTV.shape, lm_BUV.shape[1]
        am_BTV, lm_BUV, symbols_BS = am_BTV.contiguous(), lm_BUV.contiguous(), symbols_BS.contiguous()
        lm_exp_BUV = torch.empty_like(lm_BUV, dtype=torch.float32)
        lm_max_BU, lm_sum_BU = lm_exp_BUV.new_empty(2, B, U)
        width = min(ELEMENTS, triton.next_power_of_2(V))
        rows = ELEMENTS // width
        _exp_kernel[(triton.cdiv(B * U, rows),)](
            lm_BUV, lm_exp_BUV, lm_max_BU, lm_sum_BU, B * U, V=V, ROWS=rows, WIDTH=width, num_warps=8
        )
        sizes: dict[str, Any] = dict(T=T, U=U, blank=blank, lm_scale=lm_scale, V=V, num_stages=1)
        am_max_BT, (sum_BTU, symbol_BTU, blank_BTU) = lm_sum_BU.new_empty(B, T), lm_sum_BU.new_empty(3, B, T, U)
        _sum_joint_kernel[(triton.cdiv(T, TERMS["TIMES"]), triton.cdiv(U, TERMS["OUTPUTS"]), B)](
            am_BTV, lm_BUV, lm_exp_BUV, lm_max_BU, lm_sum_BU, symbols_BS, am_max_BT, sum_BTU, symbol_BTU, blank_BTU,
            **TERMS, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(am_BTV, lm_exp_BUV, lm_sum_BU, symbols_BS, am_max_BT, sum_BTU)
        ctx.lm_dtype, ctx.sizes = lm_BUV.dtype, sizes
        return symbol_BTU, blank_BTU

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_symbol_BTU: Tensor, d_blank_BTU: Tensor) -> tuple[Tensor | None, ...]:
        am_BTV, lm_exp_BUV, lm_sum_BU, symbols_BS, am_max_BT, sum_BTU = ctx.saved_tensors
        (B, T, V), U = am_BTV.shape, lm_exp_BUV.shape[1]
        given = (symbols_BS, am_max_BT, sum_BTU, d_symbol_BTU.contiguous(), d_blank_BTU.contiguous())
        d_am_BTV, d_lm_BUV = torch.empty_like(am_BTV), torch.empty_like(lm_exp_BUV, dtype=ctx.lm_dtype)
        _am_gradient_kernel[(triton.cdiv(V, AM_GRADIENT["WIDTH"]), triton.cdiv(T, AM_GRADIENT["TIMES"]), B)](
            am_BTV, lm_exp_BUV, *given, d_am_BTV, **AM_GRADIENT, **ctx.sizes
        )
        _lm_gradient_kernel[(triton.cdiv(V, LM_GRADIENT["WIDTH"]), triton.cdiv(U, LM_GRADIENT["OUTPUTS"]), B)](
            am_BTV, lm_exp_BUV, lm_sum_BU, *given, d_lm_BUV, **LM_GRADIENT, **ctx.sizes
        )
        return d_am_BTV, d_lm_BUV, None, None, None

"""These kernels compute the weighted mean of each group of frames, in one pass over memory forward and one backward.

Shapes: B batch, T frames, S groups of F frames (T / F, rounded up), D channels, N = B·S.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT
from ssm_asr.ops.sums_kernel import load_rows, rows, slabs_of, totals

ROWS, CHANNELS = 32, 64  # sizes of a program's tile


@triton.jit
def _weights(bias_ptr, FACTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    bias = tl.load(bias_ptr + tl.arange(0, FACTOR)).to(tl.float32)
    e = tl.exp(bias - tl.max(bias, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit
def _weight_at(weights, i, FACTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(tl.arange(0, FACTOR) == i, weights, 0.0), axis=0)


@triton.jit
def _mean(x_ptr, weights, first, t, T, x_row, d, mask, FACTOR: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the weighted mean of the groups that start at frames t. The last frame fills up the last group."""
    y = load_rows(x_ptr, first + t, x_row, d, mask) * _weight_at(weights, 0, FACTOR)
    for i in range(1, FACTOR):
        x = load_rows(x_ptr, first + tl.minimum(t + i, T - 1), x_row, d, mask)
        y += x * _weight_at(weights, i, FACTOR)
    return y


@triton.jit(do_not_specialize=ANY_COUNT)
def _downsample_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, y_ptr, x_row, N, S, T, D,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (n < N)[:, None] & (d < D)[None, :]
    y = _mean(x_ptr, _weights(bias_ptr, FACTOR), n // S * T, n % S * FACTOR, T, x_row, d, mask, FACTOR)
    tl.store(y_ptr + n.to(tl.int64)[:, None] * D + d[None, :], y, mask=mask)


@triton.jit(do_not_specialize=ANY_COUNT)
def _gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, dy_ptr, dx_ptr, sums_ptr, x_row, dy_row, N, S, T, D, slab_rows,
    FACTOR: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes dx, and the share of each program in the gradient of the bias, weight_i · Σ dy·(x_i - y)."""
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0) * slab_rows
    place = tl.arange(0, FACTOR)
    weights = _weights(bias_ptr, FACTOR)
    dbias = tl.zeros((FACTOR,), tl.float32)
    done = 0
    while done < slab_rows:
        n = first + done + tl.arange(0, ROWS)
        sequence, t = n // S * T, n % S * FACTOR
        mask = (n < N)[:, None] & (d < D)[None, :]
        dy = load_rows(dy_ptr, n, dy_row, d, mask)
        y = _mean(x_ptr, weights, sequence, t, T, x_row, d, mask, FACTOR)
        for i in range(FACTOR):
            x = load_rows(x_ptr, sequence + tl.minimum(t + i, T - 1), x_row, d, mask)
            dbias += tl.where(place == i, weights * tl.sum(tl.sum(dy * (x - y), axis=1), axis=0), 0.0)
            rest = tl.sum(tl.where(place >= i, weights, 0.0), axis=0)
            dx = dy * tl.where(t + i == T - 1, rest, _weight_at(weights, i, FACTOR))[:, None]
            out = dx_ptr + (sequence + t + i).to(tl.int64)[:, None] * D + d[None, :]
            tl.store(out, dx, mask=mask & (t + i < T)[:, None])
        done += ROWS
    slab = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums_ptr + slab * FACTOR + place, dbias)


class _Downsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, bias_F: Tensor) -> Tensor:
        (B, T, D), F = x_BTD.shape, len(bias_F)
        x_ND, S = rows(x_BTD), triton.cdiv(T, F)
        ctx.sizes, ctx.tile = (B * S, S, T, D), dict(FACTOR=F, ROWS=ROWS, CHANNELS=CHANNELS)
        y_BSD = torch.empty(B, S, D, device=x_BTD.device, dtype=x_BTD.dtype)
        _downsample_kernel[(triton.cdiv(B * S, ROWS), triton.cdiv(D, CHANNELS))](
            x_ND, bias_F, y_BSD, x_ND.stride(0), *ctx.sizes, **ctx.tile
        )
        ctx.save_for_backward(x_ND, bias_F)
        return y_BSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, bias_F = ctx.saved_tensors
        N, S, T, D = ctx.sizes
        dy_ND, columns = rows(grads[0]), triton.cdiv(D, CHANNELS)
        # Every program writes a row of sums.
        slab_rows, slabs = slabs_of(N, ROWS, 2 * columns)
        dx_BTD = torch.empty(N // S, T, D, device=x_ND.device, dtype=x_ND.dtype)
        sums_F = torch.empty(slabs * columns, len(bias_F), device=x_ND.device)
        _gradient_kernel[(slabs, columns)](
            x_ND, bias_F, dy_ND, dx_BTD, sums_F, x_ND.stride(0), dy_ND.stride(0), *ctx.sizes, slab_rows, **ctx.tile
        )
        return dx_BTD, totals(sums_F, bias_F.dtype)


def downsample(x_BTD: Tensor, bias_F: Tensor) -> Tensor:
    """Returns the mean of each group of F frames with the weights softmax(bias), (B, S, D) in the type of x.

    The last frame is repeated until the last group is full.

    Args:
        x_BTD: at least one frame.
        bias_F: F is a power of 2.
    """
    y_BSD: Tensor = _Downsample.apply(x_BTD, bias_F)
    return y_BSD

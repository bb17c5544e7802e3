"""These kernels compute balancer, Swoosh and dropout, alone or as a chain.

A chain is one pass over memory forward and one backward, where PyTorch makes many. In a batch where the balancer does
not act, its statistics cost a kernel that returns at once, and its change of the gradient costs nothing.

In all of them, `settings` are the five numbers of `ssm_asr.ops.balance.Balance` in a tensor on the device.

Shapes: B sequences, T frames of each, N = B·T frames, D channels, S slabs of frames.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT
from ssm_asr.ops.sums_kernel import rows

ELEMENTS = 4096  # elements of a program's tile, frames times channels
CHANNELS = 64  # the most channels of a tile
PARTIAL_SUMS = 2048  # slabs times channels of a tile
WARPS = 8


@triton.jit
def tile(T, D, FRAMES: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the program's sequence, its frames there, their rows among all frames, its channels, and a mask."""
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)
    b = tl.program_id(2).to(tl.int64)
    return b, t, (b * T + t)[:, None], d, (t < T)[:, None] & (d < D)[None, :]


@triton.jit(do_not_specialize=ANY_COUNT)
def _sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr, settings_ptr, sums_ptr, N, D, x_row, slab_frames, FRAMES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Computes the sums of x and x² over each slab of frames, or nothing if the balancer does not act."""
    if tl.load(settings_ptr) > 0:
        d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        first = tl.program_id(1) * slab_frames
        total = tl.zeros((FRAMES, CHANNELS), tl.float32)
        squares = tl.zeros((FRAMES, CHANNELS), tl.float32)
        done = 0
        while done < slab_frames:
            n = first + done + tl.arange(0, FRAMES)
            mask = ((n < N) & (n < first + slab_frames))[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + n.to(tl.int64)[:, None] * x_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
            total += x
            squares += x * x
            done += FRAMES
        out = sums_ptr + tl.program_id(1) * 2 * D + d
        tl.store(out, tl.sum(total, axis=0), mask=d < D)
        tl.store(out + D, tl.sum(squares, axis=0), mask=d < D)


@triton.jit
def balanced(x, grad, settings_ptr, sums_ptr, N, d, D, grad_scale, SLABS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a tile of the gradient after a balancer that acts; `ssm_asr.ops.balance` has the equations."""
    slab = tl.arange(0, SLABS)
    sums = sums_ptr + slab[:, None] * 2 * D + d[None, :]
    mean = tl.sum(tl.load(sums, mask=(d < D)[None, :], other=0.0), axis=0) / N
    square = tl.sum(tl.load(sums + D, mask=(d < D)[None, :], other=0.0), axis=0) / N
    std = tl.sqrt(tl.maximum(square - mean * mean, 1e-20))
    rms = tl.sqrt(tl.maximum(square, 1e-20))
    m = mean / std
    low_m, high_m = tl.load(settings_ptr + 1), tl.load(settings_ptr + 2)
    low_rms, high_rms = tl.load(settings_ptr + 3), tl.load(settings_ptr + 4)
    sign_m = tl.where(m > high_m, 1.0, tl.where(m < low_m, -1.0, 0.0))
    sign_r = tl.where(rms > high_rms, 1.0, tl.where(rms < low_rms, -1.0, 0.0))
    slope = sign_r / (rms * rms) - sign_m * m / (std * std)
    offset = sign_m * (1.0 + m * mean / std) / std
    # Numbers are scaled before they are squared: squares would overflow where a channel is all zeros.
    a, c = tl.abs(offset + slope * mean), tl.abs(slope * std)
    larger = tl.maximum(tl.maximum(a, c), 1e-20)
    size = larger * tl.sqrt((a / larger) * (a / larger) + (c / larger) * (c / larger))
    size = tl.maximum(size, 1e-20)
    push = (offset / size)[None, :] + (slope / size)[None, :] * x
    return grad + tl.abs(grad) * push * grad_scale


@triton.jit(do_not_specialize=ANY_COUNT)
def _balance_kernel(  # type: ignore[no-untyped-def]
    x_ptr, grad_ptr, settings_ptr, sums_ptr, out_ptr, N, D, x_row, grad_row, grad_scale,
    SLABS: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    _, _, row, d, mask = tile(N, D, FRAMES, CHANNELS)
    grad = tl.load(grad_ptr + row * grad_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if tl.load(settings_ptr) > 0:
        x = tl.load(x_ptr + row * x_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = balanced(x, grad, settings_ptr, sums_ptr, N, d, D, grad_scale, SLABS)
    tl.store(out_ptr + row * D + d[None, :], grad, mask=mask)


@triton.jit
def _kept(uniform_ptr, rate_ptr, b, d, D):  # type: ignore[no-untyped-def]
    """Returns what dropout multiplies the channels of a sequence by."""
    rate = tl.load(rate_ptr)
    uniform = tl.load(uniform_ptr + b * D + d, mask=d < D, other=0.0)
    return tl.where(uniform >= rate, 1.0 / (1.0 - rate), 0.0)[None, :]


@triton.jit(do_not_specialize=ANY_COUNT)
def _swoosh_kernel(  # type: ignore[no-untyped-def]
    x_ptr, uniform_ptr, rate_ptr, out_ptr, T, D, x_row, shift, offset,
    DROP: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, _, row, d, mask = tile(T, D, FRAMES, CHANNELS)
    x = tl.load(x_ptr + row * x_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.maximum(x - shift, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x - shift))) - 0.08 * x - offset
    if DROP:
        out *= _kept(uniform_ptr, rate_ptr, b, d, D)
    tl.store(out_ptr + row * D + d[None, :], out, mask=mask)


@triton.jit(do_not_specialize=ANY_COUNT)
def _swoosh_backward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, uniform_ptr, rate_ptr, settings_ptr, sums_ptr, dx_ptr, T, D, x_row, dy_row, shift, grad_scale,
    DROP: tl.constexpr, BALANCE: tl.constexpr, SLABS: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, _, row, d, mask = tile(T, D, FRAMES, CHANNELS)
    x = tl.load(x_ptr + row * x_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(x - shift))
    dx = tl.load(dy_ptr + row * dy_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    dx *= tl.where(x > shift, 1.0, e) / (1.0 + e) - 0.08
    if DROP:
        dx *= _kept(uniform_ptr, rate_ptr, b, d, D)
    if BALANCE:  # noqa: SIM102 - known at compile time
        if tl.load(settings_ptr) > 0:
            dx = balanced(x, dx, settings_ptr, sums_ptr, T * tl.num_programs(2), d, D, grad_scale, SLABS)
    tl.store(dx_ptr + row * D + d[None, :], dx, mask=mask)


def shaped(x_ND: Tensor, like: Tensor, channel_dim: int = -1) -> Tensor:
    """Returns the rows in the shape of `like`; inverse of moving its channels to the end and taking `rows`."""
    return x_ND.reshape(like.movedim(channel_dim, -1).shape).movedim(-1, channel_dim)


def launch(channels: int, frames: int, sequences: int = 1) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Returns the grid, and the sizes of a program's tile."""
    width = min(CHANNELS, triton.next_power_of_2(channels))
    sizes = dict(FRAMES=ELEMENTS // width, CHANNELS=width)
    return (triton.cdiv(channels, width), triton.cdiv(frames, sizes["FRAMES"]), sequences), sizes


def statistics(x_ND: Tensor, settings: Tensor) -> tuple[Tensor, int]:
    """Returns the statistics that `balanced` needs: sums over S slabs of frames (S, 2, D), and S."""
    N, D = x_ND.shape
    (columns, _, _), sizes = launch(D, N)
    slabs = PARTIAL_SUMS // sizes["CHANNELS"]
    sums_S2D = torch.empty(slabs, 2, D, device=x_ND.device)
    _sums_kernel[(columns, slabs)](
        x_ND, settings, sums_S2D, N, D, x_ND.stride(0), triton.cdiv(N, slabs), **sizes, num_warps=WARPS
    )
    return sums_S2D, slabs


def balance(x: Tensor, grad: Tensor, settings: Tensor, grad_scale: float, channel_dim: int = -1) -> Tensor:
    """Returns the gradient after a balancer, with the channels next to each other in memory.

    Args:
        x: the input of the balancer.
        grad: the gradient, of the shape of x.
        settings: the five numbers of the balancer, on the device.
        grad_scale: size of the added gradient, relative to each element of the gradient.
        channel_dim: dimension of the channels.
    """
    x_ND, grad_ND = rows(x.movedim(channel_dim, -1)), rows(grad.movedim(channel_dim, -1))
    N, D = x_ND.shape
    sums_S2D, slabs = statistics(x_ND, settings)
    out_ND = torch.empty(N, D, dtype=grad.dtype, device=grad.device)
    grid, sizes = launch(D, N)
    _balance_kernel[grid](
        x_ND, grad_ND, settings, sums_S2D, out_ND, N, D, x_ND.stride(0), grad_ND.stride(0), grad_scale,
        SLABS=slabs, **sizes, num_warps=WARPS,
    )  # fmt: skip
    return shaped(out_ND, grad, channel_dim)


class _Swoosh(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: float, offset: float, channel_dim: int, settings: Tensor | None, grad_scale: float,
        uniform_B1D: Tensor | None, rate: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # settings and rate may be views of a tensor that other modules write to, which autograd would refuse to save.
        ctx.settings, ctx.grad_scale, ctx.rate = settings, grad_scale, rate
        ctx.shift, ctx.channel_dim = shift, channel_dim
        ctx.save_for_backward(x, uniform_B1D)
        x_ND = rows(x.movedim(channel_dim, -1))
        N, D = x_ND.shape
        B = 1 if uniform_B1D is None else len(uniform_B1D)
        out_ND = torch.empty(N, D, dtype=x.dtype, device=x.device)
        grid, sizes = launch(D, N // B, B)
        _swoosh_kernel[grid](
            x_ND, uniform_B1D, rate, out_ND, N // B, D, x_ND.stride(0), shift, offset,
            DROP=uniform_B1D is not None, **sizes, num_warps=WARPS,
        )  # fmt: skip
        return shaped(out_ND, x, channel_dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, uniform_B1D = ctx.saved_tensors
        x_ND, dy_ND = rows(x.movedim(ctx.channel_dim, -1)), rows(grads[0].movedim(ctx.channel_dim, -1))
        N, D = x_ND.shape
        B = 1 if uniform_B1D is None else len(uniform_B1D)
        sums_S2D, slabs = (None, 0) if ctx.settings is None else statistics(x_ND, ctx.settings)
        dx_ND = torch.empty(N, D, dtype=x.dtype, device=x.device)
        grid, sizes = launch(D, N // B, B)
        _swoosh_backward_kernel[grid](
            x_ND, dy_ND, uniform_B1D, ctx.rate, ctx.settings, sums_S2D, dx_ND, N // B, D,
            x_ND.stride(0), dy_ND.stride(0), ctx.shift, ctx.grad_scale,
            DROP=uniform_B1D is not None, BALANCE=ctx.settings is not None, SLABS=slabs, **sizes, num_warps=WARPS,
        )  # fmt: skip
        return shaped(dx_ND, x, ctx.channel_dim), *[None] * 7


def swoosh(
    x: Tensor,
    shift: float,
    offset: float,
    channel_dim: int = -1,
    settings: Tensor | None = None,
    grad_scale: float = 0.0,
    uniform_B1D: Tensor | None = None,
    rate: Tensor | None = None,
) -> Tensor:
    """Returns log(1 + exp(x - shift)) - 0.08·x - offset, after a balancer and before dropout.

    Args:
        x: of any shape, or (B, T, D) with dropout.
        shift, offset: as in `ssm_asr.ops.swoosh.swoosh`.
        channel_dim: dimension of the channels, which lie next to each other in the memory of the result.
        settings: the five numbers of the balancer, on the device; None if there is no balancer.
        grad_scale: size of the gradient that the balancer adds, relative to each element of the gradient.
        uniform_B1D: random numbers in [0, 1), one for all frames of a channel. Dropout keeps channels whose number is
            not below the rate. None if there is no dropout.
        rate: the probability of dropout, a scalar on the device; None if there is no dropout.
    """
    out: Tensor = _Swoosh.apply(x, shift, offset, channel_dim, settings, grad_scale, uniform_B1D, rate)
    return out

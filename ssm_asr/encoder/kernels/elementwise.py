"""Swoosh, and the Balancer's change of the gradient, in one pass over memory each where PyTorch makes many.

Shapes: N frames, D channels, S slabs of frames.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024  # of a program
FRAMES, CHANNELS = 32, 64  # of a program's tile
SLABS = 64


@triton.jit
def _swoosh_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, out_ptr, count, shift, offset, BACKWARD: tl.constexpr, ELEMENTS: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = i < count
    x = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
    e = tl.exp(-tl.abs(x - shift))
    if BACKWARD:
        sigmoid = tl.where(x > shift, 1.0, e) / (1.0 + e)
        out = tl.load(dy_ptr + i, mask=mask, other=0.0).to(tl.float32) * (sigmoid - 0.08)
    else:
        out = tl.maximum(x - shift, 0.0) + tl.log(1.0 + e) - 0.08 * x - offset
    tl.store(out_ptr + i, out, mask=mask)


def swoosh(x: Tensor, shift: float, offset: float, dy: Tensor | None = None) -> Tensor:
    """log(1 + exp(x - shift)) - 0.08·x - offset, or with dy its gradient with respect to x; x is dense in memory."""
    out = torch.empty_like(x)
    if dy is not None and dy.stride() != x.stride():
        dy = torch.empty_like(x).copy_(dy)
    grid = (triton.cdiv(x.numel(), ELEMENTS),)
    _swoosh_kernel[grid](x, x if dy is None else dy, out, x.numel(), shift, offset, dy is not None, ELEMENTS)
    return out


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr, settings_ptr, sums_ptr, N, D, slab_frames, FRAMES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Sums of x and x² over each slab of frames; nothing at all while the balancer does not act."""
    if tl.load(settings_ptr) > 0:
        d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        first = tl.program_id(1) * slab_frames
        total = tl.zeros((FRAMES, CHANNELS), tl.float32)
        squares = tl.zeros((FRAMES, CHANNELS), tl.float32)
        done = 0
        while done < slab_frames:
            n = first + done + tl.arange(0, FRAMES)
            mask = ((n < N) & (n < first + slab_frames))[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + n.to(tl.int64)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            total += x
            squares += x * x
            done += FRAMES
        out = sums_ptr + tl.program_id(1) * 2 * D + d
        tl.store(out, tl.sum(total, axis=0), mask=d < D)
        tl.store(out + D, tl.sum(squares, axis=0), mask=d < D)


@triton.jit
def _balance_kernel(  # type: ignore[no-untyped-def]
    x_ptr, grad_ptr, settings_ptr, sums_ptr, out_ptr, N, D, grad_scale,
    SLABS: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    mask = (n < N)[:, None] & (d < D)[None, :]
    place = n.to(tl.int64)[:, None] * D + d[None, :]
    grad = tl.load(grad_ptr + place, mask=mask, other=0.0)
    if tl.load(settings_ptr) > 0:
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
        # Scaled before it is squared, which would overflow where a channel is all zeros.
        a, c = tl.abs(offset + slope * mean), tl.abs(slope * std)
        larger = tl.maximum(tl.maximum(a, c), 1e-20)
        size = larger * tl.sqrt((a / larger) * (a / larger) + (c / larger) * (c / larger))
        size = tl.maximum(size, 1e-20)
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        wide = grad.to(tl.float32)
        push = (offset / size)[None, :] + (slope / size)[None, :] * x
        grad = (wide + tl.abs(wide) * push * grad_scale).to(grad.dtype)
    tl.store(out_ptr + place, grad, mask=mask)


def balance(x_ND: Tensor, grad_ND: Tensor, settings: Tensor, grad_scale: float) -> Tensor:
    """The gradient as a Balancer changes it; x and the gradient contiguous.

    Args:
        settings: whether it acts (0 or 1), and the least and greatest mean/std and rms of a channel.
    """
    N, D = x_ND.shape
    out_ND = torch.empty_like(grad_ND)
    sums_S2D = torch.empty(SLABS, 2, D, device=x_ND.device)
    columns, tile = triton.cdiv(D, CHANNELS), dict(FRAMES=FRAMES, CHANNELS=CHANNELS)
    slab_frames = triton.cdiv(N, SLABS)
    _sums_kernel[(columns, SLABS)](x_ND, settings, sums_S2D, N, D, slab_frames, **tile)
    _balance_kernel[(triton.cdiv(N, FRAMES), columns)](
        x_ND, grad_ND, settings, sums_S2D, out_ND, N, D, grad_scale, SLABS=SLABS, **tile
    )
    return out_ND

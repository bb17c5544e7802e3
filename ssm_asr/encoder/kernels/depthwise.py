"""The chunk-causal depthwise convolution as one kernel forward and two backward.

    y_t = Σ_k causal_k·x_{t+k-M} + causal_bias + edge_p·(Σ_k inside_k·x_{t+k-M}·[same chunk] + inside_bias)

for k up to M in the causal sum and up to K-1 = 2·M in the other, and p the place of t in its chunk. Both sums read the
same frames, so that each is loaded once. What PyTorch does for the gradient of such weights takes ten times as long.

Shapes: B batch, T frames, D channels, K taps, M = K // 2, C frames of a chunk, S slabs of frames.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FRAMES, CHANNELS = 64, 32  # of a program's tile


@triton.jit
def _tile(T, D, FRAMES: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    t = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return tl.program_id(2), t, d, d < D


@triton.jit
def _frames(ptr, b, t, d, d_mask, T, D):  # type: ignore[no-untyped-def]
    """Frames t of a (B, T, D) tensor in float32, zero outside."""
    mask = ((t >= 0) & (t < T))[:, None] & d_mask[None, :]
    return tl.load(ptr + (b * T + t)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, causal_ptr, causal_bias_ptr, inside_ptr, inside_bias_ptr, edge_ptr, y_ptr,
    T, D, C, K: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, t, d, d_mask = _tile(T, D, FRAMES, CHANNELS)
    M: tl.constexpr = K // 2
    start = t - t % C  # of the chunk
    causal = tl.zeros((FRAMES, CHANNELS), tl.float32) + tl.load(causal_bias_ptr + d, mask=d_mask)[None, :]
    inside = tl.zeros((FRAMES, CHANNELS), tl.float32) + tl.load(inside_bias_ptr + d, mask=d_mask)[None, :]
    k = 0
    while k < K:  # not unrolled: with all loads in flight there would be too few registers
        source = t + (k - M)
        x = _frames(x_ptr, b, source, d, d_mask, T, D)
        causal += x * tl.load(causal_ptr + d * (M + 1) + k, mask=d_mask & (k <= M), other=0.0)[None, :]
        same = (source >= start) & (source < start + C)
        inside += tl.where(same[:, None], x, 0.0) * tl.load(inside_ptr + d * K + k, mask=d_mask)[None, :]
        k += 1
    mask = (t < T)[:, None] & d_mask[None, :]
    edge = tl.load(edge_ptr + (t - start)[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + (b * T + t)[:, None] * D + d[None, :], causal + edge * inside, mask=mask)


@triton.jit
def _input_gradient_kernel(  # type: ignore[no-untyped-def]
    dy_ptr, causal_ptr, inside_ptr, edge_ptr, dx_ptr,
    T, D, C, K: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, t, d, d_mask = _tile(T, D, FRAMES, CHANNELS)
    M: tl.constexpr = K // 2
    start = t - t % C  # of the chunk
    dx = tl.zeros((FRAMES, CHANNELS), tl.float32)
    k = 0
    while k < K:
        target = t - (k - M)
        dy = _frames(dy_ptr, b, target, d, d_mask, T, D)
        dx += dy * tl.load(causal_ptr + d * (M + 1) + k, mask=d_mask & (k <= M), other=0.0)[None, :]
        same = (target >= start) & (target < start + C) & (target < T)
        edge_pointers = edge_ptr + (target - start)[:, None] * D + d[None, :]
        edge = tl.load(edge_pointers, mask=same[:, None] & d_mask[None, :], other=0.0)
        dx += dy * edge * tl.load(inside_ptr + d * K + k, mask=d_mask)[None, :]
        k += 1
    mask = (t < T)[:, None] & d_mask[None, :]
    tl.store(dx_ptr + (b * T + t)[:, None] * D + d[None, :], dx, mask=mask)


@triton.jit
def _weight_gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, inside_ptr, inside_bias_ptr, edge_ptr, dcausal_ptr, dinside_ptr, dedge_ptr,
    T, D, C, K: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each slab its own sums, the biases' after those of the taps; the edge's gradient still for every frame."""
    b, t, d, d_mask = _tile(T, D, FRAMES, CHANNELS)
    M: tl.constexpr = K // 2
    start = t - t % C  # of the chunk
    slab = b * tl.num_programs(0) + tl.program_id(0)
    mask = (t < T)[:, None] & d_mask[None, :]
    dy = _frames(dy_ptr, b, t, d, d_mask, T, D)
    ds = dy * tl.load(edge_ptr + (t - start)[:, None] * D + d[None, :], mask=mask, other=0.0)
    inside = tl.zeros((FRAMES, CHANNELS), tl.float32) + tl.load(inside_bias_ptr + d, mask=d_mask)[None, :]
    k = 0
    while k < K:
        source = t + (k - M)
        x = _frames(x_ptr, b, source, d, d_mask, T, D)
        tl.store(dcausal_ptr + (slab * (M + 2) + k) * D + d, tl.sum(dy * x, axis=0), mask=d_mask & (k <= M))
        same = (source >= start) & (source < start + C)
        x = tl.where(same[:, None], x, 0.0)
        inside += x * tl.load(inside_ptr + d * K + k, mask=d_mask)[None, :]
        tl.store(dinside_ptr + (slab * (K + 1) + k) * D + d, tl.sum(ds * x, axis=0), mask=d_mask)
        k += 1
    tl.store(dcausal_ptr + (slab * (M + 2) + M + 1) * D + d, tl.sum(dy, axis=0), mask=d_mask)
    tl.store(dinside_ptr + (slab * (K + 1) + K) * D + d, tl.sum(ds, axis=0), mask=d_mask)
    tl.store(dedge_ptr + (b * T + t)[:, None] * D + d[None, :], dy * inside, mask=mask)


class _ChunkCausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, edge_CD: Tensor, *weights: Tensor) -> Tensor:
        causal_D1L, causal_bias_D, inside_D1K, inside_bias_D = weights
        (B, T, D), C, K = x_BTD.shape, len(edge_CD), inside_D1K.shape[-1]
        ctx.sizes = dict(T=T, D=D, C=C, K=K, FRAMES=FRAMES, CHANNELS=CHANNELS)
        ctx.grid = (triton.cdiv(T, FRAMES), triton.cdiv(D, CHANNELS), B)
        y_BTD = torch.empty_like(x_BTD)
        _forward_kernel[ctx.grid](
            x_BTD, causal_D1L, causal_bias_D, inside_D1K, inside_bias_D, edge_CD, y_BTD, **ctx.sizes
        )
        ctx.save_for_backward(x_BTD, edge_CD, *weights)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, edge_CD, causal_D1L, _, inside_D1K, inside_bias_D = ctx.saved_tensors
        dy_BTD = grads[0].contiguous()
        (B, T, D), C, K = x_BTD.shape, len(edge_CD), inside_D1K.shape[-1]
        dx_BTD, dedge_BTD = torch.empty_like(x_BTD), edge_CD.new_empty(B, T, D)
        _input_gradient_kernel[ctx.grid](dy_BTD, causal_D1L, inside_D1K, edge_CD, dx_BTD, **ctx.sizes)
        slabs = B * ctx.grid[0]
        dcausal, dinside = edge_CD.new_empty(slabs, K // 2 + 2, D), edge_CD.new_empty(slabs, K + 1, D)
        _weight_gradient_kernel[ctx.grid](
            x_BTD, dy_BTD, inside_D1K, inside_bias_D, edge_CD, dcausal, dinside, dedge_BTD, **ctx.sizes
        )
        missing = -T % C
        dedge_CD = torch.nn.functional.pad(dedge_BTD.sum(dim=0), (0, 0, 0, missing)).reshape(-1, C, D).sum(dim=0)
        dcausal_DL, dinside_DL = dcausal.sum(dim=0).T, dinside.sum(dim=0).T
        return (
            dx_BTD,
            dedge_CD,
            *(dcausal_DL[:, None, :-1].contiguous(), dcausal_DL[:, -1].contiguous()),
            *(dinside_DL[:, None, :-1].contiguous(), dinside_DL[:, -1].contiguous()),
        )


def chunk_causal_conv(
    x_BTD: Tensor,
    edge_CD: Tensor,
    causal_D1L: Tensor,
    causal_bias_D: Tensor,
    inside_D1K: Tensor,
    inside_bias_D: Tensor,
) -> Tensor:
    """y (B, T, D) in the type of x; sums are in float32.

    Args:
        x_BTD: in any floating-point type.
        edge_CD: what the second sum is multiplied by at each place in a chunk, for chunks of C frames; float32.
        causal_D1L, causal_bias_D: the causal taps, L = K // 2 + 1; float32, as all weights.
        inside_D1K, inside_bias_D: the taps that stay inside the chunk.
    """
    weights = (w.contiguous() for w in (causal_D1L, causal_bias_D, inside_D1K, inside_bias_D))
    y_BTD: Tensor = _ChunkCausalConv.apply(x_BTD.contiguous(), edge_CD.contiguous(), *weights)
    return y_BTD

"""These kernels compute what stands around Mamba-2's state-space operation: the convolution with SiLU, the gated norm.

Sums run in float32, and sums over frames in a fixed order.

Shapes: B batch, T frames, N = B·T, C convolved channels, K taps, D normed channels, W of them in a group, S slabs of
frames.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT

FRAMES, CHANNELS = 64, 32  # sizes of a program's tile in the convolution
NORM_ELEMENTS = 2048  # of a program's tile in the norm, which has all channels of a group
MOST_SLABS = 128
WARPS = 8


@triton.jit
def _frames(ptr, padding_ptr, b, t, c, T, C, row, padding_b, padding_t, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loads frames t of a sequence in float32, with zeros outside the sequence and at padding."""
    inside = (t >= 0) & (t < T)
    if PADDED:
        inside = inside & (tl.load(padding_ptr + b * padding_b + t * padding_t, mask=inside, other=1) == 0)
    mask = inside[:, None] & (c < C)[None, :]
    return tl.load(ptr + (b * T + t)[:, None] * row + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _convolved(  # type: ignore[no-untyped-def]
    x_ptr, padding_ptr, weight_ptr, bias_ptr, b, t, c, T, C, x_row, padding_b, padding_t,
    K: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Returns the sum over the taps, and its sigmoid."""
    total = tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
    for k in tl.static_range(K):
        x = _frames(x_ptr, padding_ptr, b, t + (k + 1 - K), c, T, C, x_row, padding_b, padding_t, PADDED)
        total += x * tl.load(weight_ptr + c * K + k, mask=c < C, other=0.0)[None, :]
    return total, tl.sigmoid(total)


@triton.jit(do_not_specialize=ANY_COUNT)
def _convolution_kernel(  # type: ignore[no-untyped-def]
    x_ptr, padding_ptr, weight_ptr, bias_ptr, y_ptr, T, C, x_row, padding_b, padding_t,
    K: tl.constexpr, PADDED: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)
    b = tl.program_id(2).to(tl.int64)
    total, sigmoid = _convolved(
        x_ptr, padding_ptr, weight_ptr, bias_ptr, b, t, c, T, C, x_row, padding_b, padding_t, K, PADDED
    )
    tl.store(y_ptr + (b * T + t)[:, None] * C + c[None, :], total * sigmoid, mask=(t < T)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=ANY_COUNT)
def _convolution_sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr, padding_ptr, weight_ptr, bias_ptr, dy_ptr, dtotal_ptr, sums_ptr, T, C, x_row, padding_b, padding_t,
    K: tl.constexpr, PADDED: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes the gradient before the activation, and the share of each tile in the gradients of weights and bias."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)
    b = tl.program_id(2).to(tl.int64)
    total, sigmoid = _convolved(
        x_ptr, padding_ptr, weight_ptr, bias_ptr, b, t, c, T, C, x_row, padding_b, padding_t, K, PADDED
    )
    dtotal = _frames(dy_ptr, padding_ptr, b, t, c, T, C, C, 0, 0, False)
    dtotal *= sigmoid * (1.0 + total * (1.0 - sigmoid))
    mask = (t < T)[:, None] & (c < C)[None, :]
    tl.store(dtotal_ptr + (b * T + t)[:, None] * C + c[None, :], dtotal, mask=mask)
    sums = sums_ptr + ((b * tl.num_programs(1) + tl.program_id(1)) * C + c) * (K + 1)
    for k in tl.static_range(K):
        x = _frames(x_ptr, padding_ptr, b, t + (k + 1 - K), c, T, C, x_row, padding_b, padding_t, PADDED)
        tl.store(sums + k, tl.sum(dtotal * x, axis=0), mask=c < C)
    tl.store(sums + K, tl.sum(dtotal, axis=0), mask=c < C)


@triton.jit(do_not_specialize=ANY_COUNT)
def _convolution_input_kernel(  # type: ignore[no-untyped-def]
    dtotal_ptr, padding_ptr, weight_ptr, dx_ptr, T, C, padding_b, padding_t,
    K: tl.constexpr, PADDED: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    t = tl.program_id(1) * FRAMES + tl.arange(0, FRAMES)
    b = tl.program_id(2).to(tl.int64)
    dx = tl.zeros((FRAMES, CHANNELS), tl.float32)
    for k in tl.static_range(K):
        dtotal = _frames(dtotal_ptr, padding_ptr, b, t + (K - 1 - k), c, T, C, C, 0, 0, False)
        dx += dtotal * tl.load(weight_ptr + c * K + k, mask=c < C, other=0.0)[None, :]
    if PADDED:
        hidden = tl.load(padding_ptr + b * padding_b + t * padding_t, mask=t < T, other=1) != 0
        dx = tl.where(hidden[:, None], 0.0, dx)
    tl.store(dx_ptr + (b * T + t)[:, None] * C + c[None, :], dx, mask=(t < T)[:, None] & (c < C)[None, :])


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, weight_C1K: Tensor, bias_C: Tensor, padding_mask_BT: Tensor | None) -> Tensor:
        B, T, C = x_BTC.shape
        K = weight_C1K.shape[2]
        padding = None if padding_mask_BT is None else padding_mask_BT.view(torch.uint8)
        ctx.strides = (0, 0) if padding is None else padding.stride()
        ctx.grid = (triton.cdiv(C, CHANNELS), triton.cdiv(T, FRAMES), B)
        ctx.sizes = dict(K=K, PADDED=padding is not None, FRAMES=FRAMES, CHANNELS=CHANNELS, num_warps=WARPS)
        y_BTC = torch.empty(B, T, C, device=x_BTC.device)
        _convolution_kernel[ctx.grid](
            x_BTC, padding, weight_C1K, bias_C, y_BTC, T, C, x_BTC.stride(1), *ctx.strides, **ctx.sizes
        )
        ctx.save_for_backward(x_BTC, weight_C1K, bias_C, padding)
        return y_BTC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTC, weight_C1K, bias_C, padding = ctx.saved_tensors
        B, T, C = x_BTC.shape
        K = weight_C1K.shape[2]
        dtotal_BTC = torch.empty(B, T, C, device=x_BTC.device)
        dx_BTC = torch.empty(B, T, C, dtype=x_BTC.dtype, device=x_BTC.device)
        sums_SCK = torch.empty(B * ctx.grid[1], C, K + 1, device=x_BTC.device)
        _convolution_sums_kernel[ctx.grid](
            x_BTC, padding, weight_C1K, bias_C, grads[0].contiguous(), dtotal_BTC, sums_SCK, T, C, x_BTC.stride(1),
            *ctx.strides, **ctx.sizes,
        )  # fmt: skip
        _convolution_input_kernel[ctx.grid](dtotal_BTC, padding, weight_C1K, dx_BTC, T, C, *ctx.strides, **ctx.sizes)
        sums_CK = sums_SCK.sum(dim=0)
        return dx_BTC, sums_CK[:, None, :K].to(weight_C1K.dtype), sums_CK[:, K].to(bias_C.dtype), None


def convolve(x_BTC: Tensor, weight_C1K: Tensor, bias_C: Tensor, padding_mask_BT: Tensor | None) -> Tensor:
    """Returns the SiLU of the causal depthwise convolution, (B, T, C) in float32, with zeros before the first frame.

    Args:
        x_BTC: in any floating-point type. It is copied unless channels lie next to each other, and sequences T frames
            apart.
        weight_C1K, bias_C: the weights of the convolution.
        padding_mask_BT: True where x counts as 0, with any strides; None if there is no padding.
    """
    if x_BTC.stride(2) != 1 or x_BTC.stride(0) != x_BTC.shape[1] * x_BTC.stride(1):
        x_BTC = x_BTC.contiguous()
    y_BTC: Tensor = _Convolution.apply(x_BTC, weight_C1K.contiguous(), bias_C, padding_mask_BT)
    return y_BTC


@triton.jit
def _normed(  # type: ignore[no-untyped-def]
    y_ptr, z_ptr, weight_ptr, n, w, mask, y_row, z_row, eps, W: tl.constexpr
):
    """Returns y, z, y·SiLU(z) and its inverse rms, the weight, and the indices of the group's channels in a row."""
    i = tl.program_id(0) * W + w
    y = tl.load(y_ptr + n[:, None] * y_row + i[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + n[:, None] * z_row + i[None, :], mask=mask, other=0.0).to(tl.float32)
    gated = y * z * tl.sigmoid(z)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(gated * gated, axis=1) / W + eps)
    weight = tl.load(weight_ptr + i, mask=w < W, other=0.0).to(tl.float32)
    return y, z, gated, inverse_rms[:, None], weight[None, :], i


@triton.jit(do_not_specialize=ANY_COUNT)
def _norm_kernel(  # type: ignore[no-untyped-def]
    y_ptr, z_ptr, weight_ptr, out_ptr, N, D, y_row, z_row, eps,
    W: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64) * FRAMES + tl.arange(0, FRAMES)
    w = tl.arange(0, CHANNELS)
    mask = (n < N)[:, None] & (w < W)[None, :]
    _, _, gated, inverse_rms, weight, i = _normed(y_ptr, z_ptr, weight_ptr, n, w, mask, y_row, z_row, eps, W)
    tl.store(out_ptr + n[:, None] * D + i[None, :], gated * inverse_rms * weight, mask=mask)


@triton.jit(do_not_specialize=ANY_COUNT)
def _norm_backward_kernel(  # type: ignore[no-untyped-def]
    y_ptr, z_ptr, weight_ptr, dout_ptr, dy_ptr, dz_ptr, sums_ptr, N, D, y_row, z_row, dout_row, eps, slab_frames,
    W: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    w = tl.arange(0, CHANNELS)
    first = tl.program_id(1).to(tl.int64) * slab_frames
    dweight = tl.zeros((FRAMES, CHANNELS), tl.float32)
    done = 0
    while done < slab_frames:
        n = first + done + tl.arange(0, FRAMES)
        mask = (n < N)[:, None] & (w < W)[None, :]
        y, z, gated, inverse_rms, weight, i = _normed(y_ptr, z_ptr, weight_ptr, n, w, mask, y_row, z_row, eps, W)
        dout = tl.load(dout_ptr + n[:, None] * dout_row + i[None, :], mask=mask, other=0.0).to(tl.float32)
        normed = gated * inverse_rms
        dweight += dout * normed
        dnormed = dout * weight
        dgated = inverse_rms * (dnormed - normed * (tl.sum(dnormed * normed, axis=1) / W)[:, None])
        sigmoid = tl.sigmoid(z)
        tl.store(dy_ptr + n[:, None] * D + i[None, :], dgated * z * sigmoid, mask=mask)
        dz = dgated * y * sigmoid * (1.0 + z * (1.0 - sigmoid))
        tl.store(dz_ptr + n[:, None] * D + i[None, :], dz, mask=mask)
        done += FRAMES
    i = tl.program_id(0) * W + w
    tl.store(sums_ptr + tl.program_id(1) * D + i, tl.sum(dweight, axis=0), mask=w < W)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, z_ND: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
        N, D = y_ND.shape
        width = triton.next_power_of_2(D // groups)
        ctx.groups, ctx.eps = groups, eps
        ctx.sizes = dict(W=D // groups, FRAMES=max(1, NORM_ELEMENTS // width), CHANNELS=width, num_warps=WARPS)
        out_ND = torch.empty(N, D, dtype=z_ND.dtype, device=y_ND.device)
        _norm_kernel[(groups, triton.cdiv(N, ctx.sizes["FRAMES"]))](
            y_ND, z_ND, weight_D, out_ND, N, D, y_ND.stride(0), z_ND.stride(0), eps, **ctx.sizes
        )
        ctx.save_for_backward(y_ND, z_ND, weight_D)
        return out_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, z_ND, weight_D = ctx.saved_tensors
        N, D = y_ND.shape
        dout_ND = grads[0] if grads[0].stride(1) == 1 else grads[0].contiguous()
        tiles = triton.cdiv(N, ctx.sizes["FRAMES"])
        slab_frames = triton.cdiv(tiles, MOST_SLABS) * ctx.sizes["FRAMES"]
        slabs = triton.cdiv(N, slab_frames)
        dy_ND = torch.empty(N, D, dtype=y_ND.dtype, device=y_ND.device)
        dz_ND = torch.empty(N, D, dtype=z_ND.dtype, device=y_ND.device)
        sums_SD = torch.empty(slabs, D, device=y_ND.device)
        _norm_backward_kernel[(ctx.groups, slabs)](
            y_ND, z_ND, weight_D, dout_ND, dy_ND, dz_ND, sums_SD, N, D, y_ND.stride(0), z_ND.stride(0),
            dout_ND.stride(0), ctx.eps, slab_frames, **ctx.sizes,
        )  # fmt: skip
        return dy_ND, dz_ND, sums_SD.sum(dim=0).to(weight_D.dtype), None, None


def gated_norm(y_BTD: Tensor, z_BTD: Tensor, weight_D: Tensor, groups: int, eps: float) -> Tensor:
    """Returns weight·v / rms(v) with v = y·SiLU(z), (B, T, D) in the type of z.

    Args:
        y_BTD: output of the state-space operation.
        z_BTD: the gate.
        weight_D: learned weights.
        groups: number of equal parts of the channels, over each of which an rms is taken.
        eps: added to the mean square.
    """
    y_ND, z_ND = (x if x.stride(-1) == 1 else x.contiguous() for x in (y_BTD.flatten(0, 1), z_BTD.flatten(0, 1)))
    out_ND: Tensor = _GatedNorm.apply(y_ND, z_ND, weight_D, groups, eps)
    return out_ND.reshape(y_BTD.shape)

"""These kernels compute gates, which multiply two halves of a projection, and the sums of non-linear attention.

Shapes: B sequences, T frames (queries), K keys, D channels of a gated tensor, N channels that are summed over time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT, FEW_NUMBERS
from ssm_asr.ops.sums_kernel import rows
from ssm_asr.ops.swoosh_kernel import WARPS, balanced, launch, statistics, tile

QUERIES = KEYS = CHANNELS = 64  # sizes of a program's tile in sums over time


@triton.jit
def _activation(gate, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the activation and its derivative."""
    if NAME == "identity":
        return gate, tl.zeros_like(gate) + 1.0
    # This exponential cannot overflow. It gives the sigmoid of the gate, or for tanh the sigmoid of twice the gate.
    z = gate if NAME == "sigmoid" else 2.0 * gate
    e = tl.exp(-tl.abs(z))
    sigmoid = tl.where(z > 0, 1.0, e) / (1.0 + e)
    slope = e / ((1.0 + e) * (1.0 + e))
    if NAME == "sigmoid":
        return sigmoid, slope
    return tl.where(z > 0, 1.0 - e, e - 1.0) / (1.0 + e), 4.0 * slope


@triton.jit(do_not_specialize=ANY_COUNT)
def _gate_kernel(  # type: ignore[no-untyped-def]
    x_ptr, gate_ptr, padding_ptr, out_ptr, T, D, x_row, gate_row, padding_b, padding_t,
    NAME: tl.constexpr, PADDED: tl.constexpr, FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, t, row, d, mask = tile(T, D, FRAMES, CHANNELS)
    x = tl.load(x_ptr + row * x_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    activated, _ = _activation(gate, NAME)
    out = x * activated
    if PADDED:
        hidden = tl.load(padding_ptr + b * padding_b + t * padding_t, mask=t < T, other=0) != 0
        out = tl.where(hidden[:, None], 0.0, out)
    tl.store(out_ptr + row * D + d[None, :], out, mask=mask)


@triton.jit(do_not_specialize=ANY_COUNT)
def _gate_backward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, gate_ptr, padding_ptr, dout_ptr, settings_ptr, sums_ptr, dx_ptr, dgate_ptr, T, D,
    x_row, gate_row, padding_b, padding_t, dout_row, dx_row, dgate_row, grad_scale,
    NAME: tl.constexpr, PADDED: tl.constexpr, BALANCE: tl.constexpr, SLABS: tl.constexpr,
    FRAMES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b, t, row, d, mask = tile(T, D, FRAMES, CHANNELS)
    x = tl.load(x_ptr + row * x_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * dout_row + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if PADDED:
        hidden = tl.load(padding_ptr + b * padding_b + t * padding_t, mask=t < T, other=0) != 0
        dout = tl.where(hidden[:, None], 0.0, dout)
    activated, slope = _activation(gate, NAME)
    tl.store(dx_ptr + row * dx_row + d[None, :], dout * activated, mask=mask)
    dgate = dout * x * slope
    if BALANCE:  # noqa: SIM102 - known at compile time
        if tl.load(settings_ptr) > 0:
            dgate = balanced(gate, dgate, settings_ptr, sums_ptr, T * tl.num_programs(2), d, D, grad_scale, SLABS)
    tl.store(dgate_ptr + row * dgate_row + d[None, :], dgate, mask=mask)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, padding_mask_BT: Tensor | None, settings: Tensor | None, grad_scale: float, *inputs: Tensor
    ) -> Tensor:
        # settings may be a view of a tensor that other modules write to, which autograd would refuse to save.
        ctx.name, ctx.settings, ctx.grad_scale = name, settings, grad_scale
        padding = None if padding_mask_BT is None else padding_mask_BT.view(torch.uint8)
        ctx.save_for_backward(padding, *inputs)
        x, gate = inputs if len(inputs) == 2 else inputs[0].chunk(2, dim=-1)
        B, T, D = x.shape
        x_ND, gate_ND = rows(x), rows(gate)
        out_BTD = torch.empty(B, T, D, dtype=x.dtype, device=x.device)
        grid, sizes = launch(D, T, B)
        _gate_kernel[grid](
            x_ND, gate_ND, padding, out_BTD, T, D, x_ND.stride(0), gate_ND.stride(0),
            *((0, 0) if padding is None else padding.stride()), NAME=name, PADDED=padding is not None,
            **sizes, num_warps=WARPS,
        )  # fmt: skip
        return out_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        padding, *inputs = ctx.saved_tensors
        dinputs = [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in inputs]
        x, gate = inputs if len(inputs) == 2 else inputs[0].chunk(2, dim=-1)
        dx, dgate = dinputs if len(inputs) == 2 else dinputs[0].chunk(2, dim=-1)
        B, T, D = x.shape
        x_ND, gate_ND, dout_ND = rows(x), rows(gate), rows(grads[0])
        sums_S2D, slabs = (None, 0) if ctx.settings is None else statistics(gate_ND, ctx.settings)
        grid, sizes = launch(D, T, B)
        _gate_backward_kernel[grid](
            x_ND, gate_ND, padding, dout_ND, ctx.settings, sums_S2D, dx, dgate, T, D, x_ND.stride(0), gate_ND.stride(0),
            *((0, 0) if padding is None else padding.stride()), dout_ND.stride(0), dx.stride(1), dgate.stride(1),
            ctx.grad_scale, NAME=ctx.name, PADDED=padding is not None, BALANCE=ctx.settings is not None, SLABS=slabs,
            **sizes, num_warps=WARPS,
        )  # fmt: skip
        return None, None, None, None, *dinputs


def gated(
    inputs: Tensor | tuple[Tensor, Tensor],
    activation: str,
    padding_mask_BT: Tensor | None = None,
    settings: Tensor | None = None,
    grad_scale: float = 0.0,
) -> Tensor:
    """Returns x·activation(gate), (B, T, D), contiguous.

    Args:
        inputs: x and gate, (B, T, D) each, with any strides between frames, or one tensor (B, T, 2D) whose first half
            is x and whose second is gate.
        activation: sigmoid, tanh or identity.
        padding_mask_BT: True where the result is 0, with any strides; None if there is no padding.
        settings: the balancer of the gate, as `ssm_asr.ops.swoosh_kernel.balance` takes it; None if there is none.
        grad_scale: size of the gradient that the balancer adds, relative to each element of the gradient.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    out_BTD: Tensor = _Gated.apply(activation, padding_mask_BT, settings, grad_scale, *tensors)
    return out_BTD


@triton.jit(do_not_specialize=FEW_NUMBERS)
def _even_kernel(  # type: ignore[no-untyped-def]
    weights_ptr, x_ptr, even_ptr, y_ptr, seen_ptr, T, K, N, weights_b, weights_t,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes the mean of x over the keys with a weight, and the number of these keys, if weights are to be even."""
    if tl.load(even_ptr) > 0:
        n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        t = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
        b = tl.program_id(2).to(tl.int64)
        total = tl.zeros((QUERIES, CHANNELS), tl.float32)
        seen = tl.zeros((QUERIES,), tl.float32)
        first = 0
        while first < K:
            k = first + tl.arange(0, KEYS)
            weights = tl.load(
                weights_ptr + b * weights_b + t[:, None] * weights_t + k[None, :],
                mask=(t < T)[:, None] & (k < K)[None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(
                x_ptr + (b * K + k)[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
            )
            visible = tl.where(weights > 0, 1.0, 0.0)
            seen += tl.sum(visible, axis=1)
            total += tl.dot(visible.to(x.dtype), x, input_precision="ieee")
            first += KEYS
        row = b * T + t
        mask = (t < T)[:, None] & (n < N)[None, :]
        tl.store(y_ptr + row[:, None] * N + n[None, :], total / tl.maximum(seen, 1.0)[:, None], mask=mask)
        tl.store(seen_ptr + row, seen, mask=t < T)


@triton.jit(do_not_specialize=FEW_NUMBERS)
def _even_backward_kernel(  # type: ignore[no-untyped-def]
    weights_ptr, dy_ptr, even_ptr, seen_ptr, dx_ptr, dweights_ptr, T, K, N, weights_b, weights_t,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of x, and zeros as the gradient of the weights, if weights were even."""
    if tl.load(even_ptr) > 0:
        n = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
        k = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        b = tl.program_id(2).to(tl.int64)
        total = tl.zeros((KEYS, CHANNELS), tl.float32)
        first = 0
        while first < T:
            t = first + tl.arange(0, QUERIES)
            row = b * T + t
            inside = (k < K)[:, None] & (t < T)[None, :]
            weights = tl.load(weights_ptr + b * weights_b + t[None, :] * weights_t + k[:, None], mask=inside, other=0.0)
            dy = tl.load(dy_ptr + row[:, None] * N + n[None, :], mask=(t < T)[:, None] & (n < N)[None, :], other=0.0)
            seen = tl.load(seen_ptr + row, mask=t < T, other=1.0)
            share = (dy.to(tl.float32) / tl.maximum(seen, 1.0)[:, None]).to(dy.dtype)
            total += tl.dot(tl.where(weights > 0, 1.0, 0.0).to(dy.dtype), share, input_precision="ieee")
            if tl.program_id(0) == 0:
                nothing = tl.zeros((KEYS, QUERIES), tl.float32)
                tl.store(dweights_ptr + row[None, :] * K + k[:, None], nothing, mask=inside)
            first += QUERIES
        out = dx_ptr + (b * K + k)[:, None] * N + n[None, :]
        tl.store(out, total, mask=(k < K)[:, None] & (n < N)[None, :])


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_BTK: Tensor, x_BKN: Tensor, even: Tensor) -> Tensor:
        (B, T, K), N = weights_BTK.shape, x_BKN.shape[2]
        y_BTN = torch.bmm(weights_BTK, x_BKN)
        seen_BT = torch.empty(B, T, device=x_BKN.device)  # only read if the weights were even, and it was written
        ctx.sizes = dict(
            T=T, K=K, N=N, weights_b=weights_BTK.stride(0), weights_t=weights_BTK.stride(1),
            QUERIES=QUERIES, KEYS=KEYS, CHANNELS=CHANNELS,
        )  # fmt: skip
        _even_kernel[(triton.cdiv(N, CHANNELS), triton.cdiv(T, QUERIES), B)](
            weights_BTK, x_BKN, even, y_BTN, seen_BT, **ctx.sizes
        )
        ctx.even = even  # may be a view of a tensor that other modules write to, which autograd would refuse to save
        ctx.save_for_backward(weights_BTK, x_BKN, seen_BT)
        return y_BTN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights_BTK, x_BKN, seen_BT = ctx.saved_tensors
        B, K, N = x_BKN.shape
        dy_BTN = grads[0].contiguous()
        dweights_BTK = torch.bmm(dy_BTN, x_BKN.transpose(1, 2))
        dx_BKN = torch.bmm(weights_BTK.transpose(1, 2), dy_BTN)
        _even_backward_kernel[(triton.cdiv(N, CHANNELS), triton.cdiv(K, KEYS), B)](
            weights_BTK, dy_BTN, ctx.even, seen_BT, dx_BKN, dweights_BTK, **ctx.sizes
        )
        return dweights_BTK, dx_BKN, None


def mixed(weights_BTK: Tensor, x_BKN: Tensor, even: Tensor) -> Tensor:
    """Returns weights @ x, (B, T, N), or the plain mean of x over the keys with a nonzero weight.

    Even weights are never stored: the means overwrite the product. They are constants, so no gradient flows to them.

    Args:
        weights_BTK: in the type of x; it is copied if its last stride is not 1.
        x_BKN: what is summed.
        even: above 0 if the weights are to be even; a scalar on the device.
    """
    weights_BTK = weights_BTK if weights_BTK.stride(2) == 1 else weights_BTK.contiguous()
    y_BTN: Tensor = _Mixed.apply(weights_BTK, x_BKN.contiguous(), even)
    return y_BTN

"""These kernels compute the first convolution of the front end: 3×3, from one channel to a few, channels-last.

One input channel gives matrix units nothing to multiply, and libraries fall back to slow general kernels. Here a thread
computes all channels of a few places, and sums the gradients of the weights in registers. A place is a row and a column
of an image of the output.

Shapes: B batch, T rows (frames), F columns (frequencies), C channels, U = T - 2 rows of the output, N = B·U·F places,
S slabs of places, K = 10 (9 taps and the bias).
"""

# Triton unrolls loops over constants, so that tuples may grow in them.
# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Places of a program's tile in the forward and in the backward pass, and the most slabs.
FORWARD_PLACES, PLACES, SLABS = 512, 128, 528


@triton.jit
def _seen(x_ptr, n, N, T, F: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loads the 9 numbers of x that the output sees at the places n. Columns outside the image are zeros."""
    f, u = n % F, n // F % (T - 2)
    x_ptrs = x_ptr + (n // (F * (T - 2)) * T + u) * F + f
    seen = ()
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            mask = (n < N) & (f + (j - 1) >= 0) & (f + (j - 1) < F)
            seen += (tl.load(x_ptrs + (i * F + j - 1), mask=mask, other=0.0).to(tl.float32)[:, None],)
    return seen


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, y_ptr, N, T,
    F: tl.constexpr, C: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    c = tl.arange(0, CHANNELS)
    y = tl.zeros((PLACES, CHANNELS), tl.float32) + tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
    seen = _seen(x_ptr, n, N, T, F)
    for k in tl.static_range(9):
        y += seen[k] * tl.load(weight_ptr + c * 9 + k, mask=c < C, other=0.0)[None, :]
    mask = (n < N)[:, None] & (c < C)[None, :]
    tl.store(y_ptr + n.to(tl.int64)[:, None] * C + c[None, :], y, mask=mask)


@triton.jit
def _weight_gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, sums_ptr, N, T, slab_places,
    F: tl.constexpr, C: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums the gradients of the taps, and of the bias after them, over one slab."""
    c = tl.arange(0, CHANNELS)
    zeros = tl.zeros((PLACES, CHANNELS), tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    done = 0
    while done < slab_places:
        n = tl.program_id(0) * slab_places + done + tl.arange(0, PLACES)
        mask = (n < N)[:, None] & (c < C)[None, :]
        dy = tl.load(dy_ptr + n.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        seen = _seen(x_ptr, n, N, T, F)
        more = ()
        for k in tl.static_range(9):
            more += (sums[k] + seen[k] * dy,)
        sums = more + (sums[9] + dy,)  # noqa: RUF005 - Triton knows no unpacking
        done += PLACES
    for k in tl.static_range(10):
        tl.store(sums_ptr + (tl.program_id(0) * 10 + k) * C + c, tl.sum(sums[k], axis=0), mask=c < C)


class _FirstConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTF: Tensor, weight_C133: Tensor, bias_C: Tensor, dtype: torch.dtype) -> Tensor:
        (B, T, F), C = x_BTF.shape, len(weight_C133)
        y_BUFC = torch.empty(B, T - 2, F, C, device=x_BTF.device, dtype=dtype)
        ctx.sizes = dict(F=F, C=C, CHANNELS=triton.next_power_of_2(C))
        N = B * (T - 2) * F
        _forward_kernel[(triton.cdiv(N, FORWARD_PLACES),)](
            x_BTF, weight_C133.contiguous(), bias_C, y_BUFC, N, T, PLACES=FORWARD_PLACES, **ctx.sizes
        )
        ctx.save_for_backward(x_BTF)
        return y_BUFC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_BTF,) = ctx.saved_tensors
        dy_BUFC = grads[0].contiguous()
        (B, U, F, C), T = dy_BUFC.shape, x_BTF.shape[1]
        N = B * U * F
        slab_places = PLACES * triton.cdiv(N, PLACES * SLABS)
        slabs = triton.cdiv(N, slab_places)
        sums_SKC = dy_BUFC.new_empty(slabs, 10, C, dtype=torch.float32)
        _weight_gradient_kernel[(slabs,)](x_BTF, dy_BUFC, sums_SKC, N, T, slab_places, PLACES=PLACES, **ctx.sizes)
        sums_KC = sums_SKC.sum(dim=0)
        return None, sums_KC[:9].T.reshape(C, 1, 3, 3), sums_KC[9], None


def first_conv(x_BTF: Tensor, weight_C133: Tensor, bias_C: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns y (B, C, T - 2, F) in channels-last memory. x gets no gradient. Sums are in float32.

    Args:
        x_BTF: images of one channel.
        weight_C133, bias_C: weights of a Conv2d with one input channel and a padding of (0, 1), in float32.
        dtype: type of the result.
    """
    y_BUFC: Tensor = _FirstConv.apply(x_BTF.contiguous(), weight_C133, bias_C, dtype)
    return y_BUFC.permute(0, 3, 1, 2)

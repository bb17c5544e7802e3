"""These kernels compute a 7×7 depthwise convolution of channels-last images, padded with zeros.

One kernel computes the output and, with flipped taps, the gradient of the input; another computes the gradients of the
weights. Sums stay in float32 registers. A loaded number is used for as many taps as registers allow: the first kernel
computes 16 rows of a column at once, the second keeps 7 rows. A tile takes columns from several images side by side,
because the images of the front end are long, but only 19 columns wide.

Shapes: B batch, C channels, T rows (frames), W columns (frequencies), K = 49 taps, S slabs of rows and columns.
"""

# Triton unrolls loops over constants, so that tuples may grow in them.
# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT

TAPS = tl.constexpr(7)  # in each direction
HALO = tl.constexpr(3)


@triton.jit
def _columns(first, images, T, W: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns for a tile of columns where each begins in memory, its place in its image, and whether it exists."""
    q = first + tl.arange(0, COLUMNS)
    image, w = q // W, q % W
    return image.to(tl.int64) * T * W * C + w * C, w, q < images * W


@triton.jit(do_not_specialize=ANY_COUNT)
def _convolve_kernel(  # type: ignore[no-untyped-def]
    x_ptr, taps_ptr, bias_ptr, y_ptr, images, T,
    W: tl.constexpr, C: tl.constexpr, FLIPPED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes ROWS rows of y. With flipped taps and no bias, it computes dx from dy."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    start, w, there = _columns(tl.program_id(1) * COLUMNS, images, T, W, C, COLUMNS)
    t = tl.program_id(2) * ROWS
    x_ptrs = x_ptr + (start[:, None] + c[None, :]) + (t - HALO) * W * C
    mask = there[:, None] & (c < C)[None, :]
    out = ()
    for _ in tl.static_range(ROWS):
        zeros = tl.zeros((COLUMNS, CHANNELS), tl.float32)
        out += (zeros if FLIPPED else zeros + tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :],)
    j = 0
    while j < TAPS:  # not unrolled, because the program would be too long for the instruction cache
        taps = ()
        for i in tl.static_range(TAPS):
            tap = (TAPS - 1 - i) * TAPS + TAPS - 1 - j if FLIPPED else i * TAPS + j
            taps += (tl.load(taps_ptr + tap * C + c, mask=c < C, other=0.0)[None, :],)
        source = w + (j - HALO)
        inside = mask & ((source >= 0) & (source < W))[:, None]
        for r in tl.static_range(ROWS + TAPS - 1):
            row = t + (r - HALO)
            x_ptrs_r = x_ptrs + ((j - HALO) * C + r * W * C)
            x = tl.load(x_ptrs_r, mask=inside & (row >= 0) & (row < T), other=0.0).to(tl.float32)
            sums = ()
            for o in tl.static_range(ROWS):
                if o <= r and r - o < TAPS:
                    sums += (out[o] + x * taps[r - o],)
                else:
                    sums += (out[o],)
            out = sums
        j += 1
    for o in tl.static_range(ROWS):
        tl.store(y_ptr + (start[:, None] + c[None, :]) + (t + o) * W * C, out[o], mask=mask & (t + o < T))


@triton.jit(do_not_specialize=ANY_COUNT)
def _weight_gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, sums_ptr, images, T, slab_rows,
    W: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums the gradients of the taps, and of the bias after them, over one slab.

    The program goes from row to row and keeps the last 7 rows of dy.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    start, w, there = _columns(tl.program_id(1) * COLUMNS, images, T, W, C, COLUMNS)
    first = tl.program_id(2) * slab_rows
    last = tl.minimum(first + slab_rows, T)
    place = start[:, None] + c[None, :]
    mask = there[:, None] & (c < C)[None, :]
    zeros = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    sums = ()
    for _ in tl.static_range(TAPS * TAPS):
        sums += (zeros,)
    dys = (zeros, zeros, zeros, zeros, zeros, zeros, zeros)
    total = zeros
    t = first  # the row of dy that is loaded next
    while t < last + TAPS - 1:
        dy = tl.load(dy_ptr + place + t * W * C, mask=mask & (t < last), other=0.0).to(tl.float32)
        total += dy
        dys = (dys[1], dys[2], dys[3], dys[4], dys[5], dys[6], dy)
        row = t - HALO  # the row of x
        x_ptrs = x_ptr + place + row * W * C
        shifted = ()
        for j in tl.static_range(TAPS):
            source = w + (j - HALO)
            inside = mask & ((source >= 0) & (source < W))[:, None] & (row >= 0) & (row < T)
            shifted += (tl.load(x_ptrs + (j - HALO) * C, mask=inside, other=0.0).to(tl.float32),)
        more = ()
        for i in tl.static_range(TAPS):
            for j in tl.static_range(TAPS):
                more += (sums[i * TAPS + j] + dys[TAPS - 1 - i] * shifted[j],)
        sums = more
        t += 1
    slab = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    sums_ptrs = sums_ptr + slab * (TAPS * TAPS + 1) * C + c
    for k in tl.static_range(TAPS * TAPS):
        tl.store(sums_ptrs + k * C, tl.sum(sums[k], axis=0), mask=c < C)
    tl.store(sums_ptrs + TAPS * TAPS * C, tl.sum(total, axis=0), mask=c < C)


# With these tiles, three programs of 4 warps fit on a multiprocessor without spilling: they take 162 and 147 registers
# per thread.
CONVOLVE = dict(ROWS=16, COLUMNS=16, CHANNELS=32)
WEIGHTS = dict(COLUMNS=8, CHANNELS=32)
SLAB_ROWS = 256  # the most rows of a slab


def _convolve(x_BTWC: Tensor, taps_KC: Tensor, bias_C: Tensor | None) -> Tensor:
    B, T, W, C = x_BTWC.shape
    y_BTWC = torch.empty_like(x_BTWC)
    grid = tuple(triton.cdiv(size, CONVOLVE[tile]) for size, tile in ((C, "CHANNELS"), (B * W, "COLUMNS"), (T, "ROWS")))
    flipped = bias_C is None
    _convolve_kernel[grid](
        x_BTWC, taps_KC, taps_KC if flipped else bias_C, y_BTWC, B, T, W=W, C=C, FLIPPED=flipped, **CONVOLVE
    )
    return y_BTWC


class _DepthwiseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTWC: Tensor, weight_C1KK: Tensor, bias_C: Tensor) -> Tensor:
        taps_KC = weight_C1KK.flatten(1).T.contiguous()
        ctx.save_for_backward(x_BTWC, taps_KC)
        return _convolve(x_BTWC, taps_KC, bias_C.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTWC, taps_KC = ctx.saved_tensors
        dy_BTWC = grads[0].contiguous()
        (B, T, W, C), K = x_BTWC.shape, len(taps_KC)
        slabs = triton.cdiv(T, SLAB_ROWS)
        grid = (triton.cdiv(C, WEIGHTS["CHANNELS"]), triton.cdiv(B * W, WEIGHTS["COLUMNS"]), slabs)
        sums_SKC = x_BTWC.new_empty(slabs * grid[1], K + 1, C, dtype=torch.float32)
        _weight_gradient_kernel[grid](x_BTWC, dy_BTWC, sums_SKC, B, T, triton.cdiv(T, slabs), W=W, C=C, **WEIGHTS)
        sums_KC = sums_SKC.sum(dim=0)
        dweight_C1KK = sums_KC[:K].T.reshape(C, 1, TAPS.value, TAPS.value)
        return _convolve(dy_BTWC, taps_KC, None), dweight_C1KK, sums_KC[K]


def depthwise_conv(x_BCTW: Tensor, weight_C1KK: Tensor, bias_C: Tensor) -> Tensor:
    """Returns y (B, C, T, W) in channels-last memory and in the type of x.

    Args:
        x_BCTW: in any floating-point type. It is copied if it is not in channels-last memory. W should be small, and
            differ rarely, because a kernel is compiled for each width.
        weight_C1KK, bias_C: weights of a Conv2d with a 7×7 kernel, a padding of 3 and C groups, in float32.
    """
    y_BTWC: Tensor = _DepthwiseConv.apply(x_BCTW.permute(0, 2, 3, 1).contiguous(), weight_C1KK, bias_C)
    return y_BTWC.permute(0, 3, 1, 2)

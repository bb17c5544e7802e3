"""These kernels connect the modules of a layer: bypasses, residual connections with masks, and forks.

Each is one pass over memory.

Shapes: B batch, T frames, D channels, S frames at a lower rate (T / factor, rounded up), N rows (all dimensions but
channels).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT
from ssm_asr.ops.sums_kernel import load_rows, rows, slabs_of, totals

ROWS, CHANNELS = 32, 64  # sizes of a program's tile
SUM_ELEMENTS = 2048  # of a program's tile in sums of gradients
MOST_BRANCHES = 5


@triton.jit
def _shares(  # type: ignore[no-untyped-def]
    scale_ptr, keep_ptr, b, inside, d, D, SKIPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Returns the share of `new` in the output, and 1 for sequences that keep `new` or 0 for those that skip it."""
    share = tl.zeros((ROWS, CHANNELS), tl.float32) + tl.load(scale_ptr + d, mask=d < D, other=0.0)[None, :]
    keep = tl.full((ROWS,), 1.0, tl.float32)
    if SKIPS:
        keep = tl.load(keep_ptr + b, mask=inside, other=0).to(tl.float32)
        share = share * keep[:, None]
    return share, keep


@triton.jit(do_not_specialize=ANY_COUNT)
def _bypass_kernel(  # type: ignore[no-untyped-def]
    orig_ptr, new_ptr, scale_ptr, keep_ptr, out_ptr, orig_row, new_row, N, S, T, D,
    FACTOR: tl.constexpr, SKIPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # frames at the lower rate
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    b, t = n // S, n % S * FACTOR
    share, _ = _shares(scale_ptr, keep_ptr, b, n < N, d, D, SKIPS, ROWS, CHANNELS)
    new = load_rows(new_ptr, n, new_row, d, (n < N)[:, None] & (d < D)[None, :])
    for i in range(FACTOR):
        mask = ((n < N) & (t + i < T))[:, None] & (d < D)[None, :]
        m = b * T + t + i
        orig = load_rows(orig_ptr, m, orig_row, d, mask)
        tl.store(out_ptr + m.to(tl.int64)[:, None] * D + d[None, :], orig + (new - orig) * share, mask=mask)


@triton.jit(do_not_specialize=ANY_COUNT)
def _bypass_gradient_kernel(  # type: ignore[no-untyped-def]
    orig_ptr, new_ptr, scale_ptr, keep_ptr, dy_ptr, dorig_ptr, dnew_ptr, sums_ptr,
    orig_row, new_row, dy_row, N, S, T, D, slab_rows,
    FACTOR: tl.constexpr, SKIPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0) * slab_rows
    dscale = tl.zeros((ROWS, CHANNELS), tl.float32)
    done = 0
    while done < slab_rows:
        n = first + done + tl.arange(0, ROWS)
        b, t = n // S, n % S * FACTOR
        share, keep = _shares(scale_ptr, keep_ptr, b, n < N, d, D, SKIPS, ROWS, CHANNELS)
        new_mask = (n < N)[:, None] & (d < D)[None, :]
        new = load_rows(new_ptr, n, new_row, d, new_mask)
        dnew = tl.zeros((ROWS, CHANNELS), tl.float32)
        for i in range(FACTOR):
            mask = ((n < N) & (t + i < T))[:, None] & (d < D)[None, :]
            m = b * T + t + i
            orig, dy = load_rows(orig_ptr, m, orig_row, d, mask), load_rows(dy_ptr, m, dy_row, d, mask)
            dscale += dy * (new - orig) * keep[:, None]
            dnew += dy * share
            tl.store(dorig_ptr + m.to(tl.int64)[:, None] * D + d[None, :], dy - dy * share, mask=mask)
        tl.store(dnew_ptr + n.to(tl.int64)[:, None] * D + d[None, :], dnew, mask=new_mask)
        done += ROWS
    tl.store(sums_ptr + tl.program_id(0) * D + d, tl.sum(dscale, axis=0), mask=d < D)


class _Bypass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, orig_BTD: Tensor, new_BSD: Tensor, scale_D: Tensor, *rest: Any) -> Tensor:
        keep_B, ctx.settings, factor = rest
        (B, T, D), S = orig_BTD.shape, new_BSD.shape[1]
        orig_ND, new_ND = rows(orig_BTD), rows(new_BSD)
        ctx.sizes = (B * S, S, T, D)
        ctx.tile = dict(FACTOR=factor, SKIPS=keep_B is not None, ROWS=ROWS, CHANNELS=CHANNELS)
        keep_B = scale_D if keep_B is None else keep_B.contiguous().view(torch.uint8)
        out_BTD = torch.empty(orig_BTD.shape, device=orig_BTD.device, dtype=orig_BTD.dtype)
        _bypass_kernel[(triton.cdiv(B * S, ROWS), triton.cdiv(D, CHANNELS))](
            orig_ND, new_ND, scale_D, keep_B, out_BTD, orig_ND.stride(0), new_ND.stride(0), *ctx.sizes, **ctx.tile
        )
        ctx.save_for_backward(orig_ND, new_ND, scale_D, keep_B)
        return out_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        orig_ND, new_ND, scale_D, keep_B = ctx.saved_tensors
        N, S, _, D = ctx.sizes
        dy_ND, columns = rows(grads[0]), triton.cdiv(D, CHANNELS)
        slab_rows, slabs = slabs_of(N, ROWS, columns)
        dorig_BTD = torch.empty(grads[0].shape, device=dy_ND.device, dtype=orig_ND.dtype)
        dnew_BSD = torch.empty(N // S, S, D, device=dy_ND.device, dtype=new_ND.dtype)
        sums_D = torch.empty(slabs, D, device=dy_ND.device)
        strides = orig_ND.stride(0), new_ND.stride(0), dy_ND.stride(0)
        _bypass_gradient_kernel[(slabs, columns)](
            orig_ND, new_ND, scale_D, keep_B, dy_ND, dorig_BTD, dnew_BSD, sums_D, *strides, *ctx.sizes, slab_rows,
            **ctx.tile,
        )  # fmt: skip
        dscale_D = totals(sums_D, scale_D.dtype, scale_D, ctx.settings)
        return dorig_BTD, dnew_BSD, dscale_D, None, None, None


def bypass(
    orig_BTD: Tensor,
    new_BSD: Tensor,
    scale_D: Tensor,
    keep_B: Tensor | None,
    settings: Tensor | None,
    factor: int = 1,
) -> Tensor:
    """Returns orig + (new - orig)·scale, (B, T, D), with each frame of `new` repeated `factor` times.

    Args:
        orig_BTD, new_BSD: in one type.
        scale_D: the share of `new` in each channel of the result.
        keep_B: False for sequences for which the result is `orig`; of any shape with B elements. None keeps all.
        settings: three numbers on the device that limit the scale, as `ssm_asr.ops.limit.limit` takes them, or None.
        factor: how many frames of `orig` one frame of `new` stands for.
    """
    out_BTD: Tensor = _Bypass.apply(orig_BTD, new_BSD, scale_D, keep_B, settings, factor)
    return out_BTD


@triton.jit(do_not_specialize=ANY_COUNT)
def _masked_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, mask_ptr, out_ptr, x_row, y_row, mask_b, mask_d, N, T, D,
    ADDS: tl.constexpr, BY_CHANNEL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (n < N)[:, None] & (d < D)[None, :]
    of_sequence = mask_ptr + n // T * mask_b
    out = load_rows(y_ptr, n, y_row, d, inside)
    if BY_CHANNEL:
        out *= tl.load(of_sequence[:, None] + d[None, :] * mask_d, mask=inside, other=0).to(tl.float32)
    else:
        out *= tl.load(of_sequence, mask=n < N, other=0).to(tl.float32)[:, None]
    if ADDS:
        out += load_rows(x_ptr, n, x_row, d, inside)
    tl.store(out_ptr + n.to(tl.int64)[:, None] * D + d[None, :], out, mask=inside)


def _masked(x_BTD: Tensor | None, y_BTD: Tensor, mask_B1D: Tensor) -> Tensor:
    _, T, D = y_BTD.shape
    y_ND = rows(y_BTD)
    x_ND = y_ND if x_BTD is None else rows(x_BTD)
    mask = mask_B1D.view(torch.uint8) if mask_B1D.dtype == torch.bool else mask_B1D
    out_BTD = torch.empty(y_BTD.shape, device=y_BTD.device, dtype=y_BTD.dtype)
    _masked_kernel[(triton.cdiv(len(y_ND), ROWS), triton.cdiv(D, CHANNELS))](
        x_ND, y_ND, mask, out_BTD, x_ND.stride(0), y_ND.stride(0), mask.stride(0), mask.stride(2), len(y_ND), T, D,
        ADDS=x_BTD is not None, BY_CHANNEL=mask.shape[2] > 1, ROWS=ROWS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return out_BTD


class _AddMasked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor | None, y_BTD: Tensor, mask_B1D: Tensor) -> Tensor:
        ctx.save_for_backward(mask_B1D)
        ctx.adds = x_BTD is not None
        return _masked(x_BTD, y_BTD, mask_B1D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (mask_B1D,) = ctx.saved_tensors
        return grads[0] if ctx.adds else None, _masked(None, grads[0], mask_B1D), None


def add_masked(x_BTD: Tensor | None, y_BTD: Tensor, mask_B1D: Tensor) -> Tensor:
    """Returns x + y·mask, or y·mask if x is None.

    Args:
        x_BTD, y_BTD: in one type.
        mask_B1D: (B, 1, D) or (B, 1, 1), in any type.
    """
    out_BTD: Tensor = _AddMasked.apply(x_BTD, y_BTD, mask_B1D)
    return out_BTD


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, out_ptr, count, TERMS: tl.constexpr, ELEMENTS: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = i < count
    total = tl.load(a_ptr + i, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(b_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if TERMS > 2:
        total += tl.load(c_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if TERMS > 3:
        total += tl.load(d_ptr + i, mask=mask, other=0.0).to(tl.float32)
    if TERMS > 4:
        total += tl.load(e_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total, mask=mask)


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branches: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(branches))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        terms = [grad.contiguous() for grad in grads if grad is not None]
        if len(terms) < 2:
            return (*terms, None) if terms else (None, None)
        out, count = torch.empty_like(terms[0]), terms[0].numel()
        given = (terms + terms[:1] * MOST_BRANCHES)[:MOST_BRANCHES]
        _sum_kernel[(triton.cdiv(count, SUM_ELEMENTS),)](*given, out, count, TERMS=len(terms), ELEMENTS=SUM_ELEMENTS)
        return out, None


def fork(x: Tensor, branches: int) -> tuple[Tensor, ...]:
    """Returns x once for each of at most 5 branches. One kernel adds up their gradients."""
    assert branches <= MOST_BRANCHES
    out: tuple[Tensor, ...] = _Fork.apply(x, branches)
    return out

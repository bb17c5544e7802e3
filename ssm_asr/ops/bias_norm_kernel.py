"""These kernels compute BiasNorm, in one pass over memory forward and one backward.

Shapes: N rows (all dimensions but channels), D channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT
from ssm_asr.ops.sums_kernel import load_rows, rows, slabs_of, totals

TILE_ELEMENTS = 2048  # in a program's tile, which consists of whole rows


@triton.jit
def _inverse_rms(centred, D):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D)


@triton.jit(do_not_specialize=ANY_COUNT)
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, log_scale_ptr, y_ptr, x_row, N, D, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    n, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    mask = (n < N)[:, None] & (d < D)[None, :]
    x = load_rows(x_ptr, n, x_row, d, mask)
    centred = x - tl.load(bias_ptr + d, mask=d < D, other=0.0)[None, :]
    scale = _inverse_rms(centred, D) * tl.exp(tl.load(log_scale_ptr).to(tl.float32))
    tl.store(y_ptr + n.to(tl.int64)[:, None] * D + d[None, :], x * scale[:, None], mask=mask)


@triton.jit(do_not_specialize=ANY_COUNT)
def _norm_gradient_kernel(  # type: ignore[no-untyped-def]
    x_ptr, bias_ptr, log_scale_ptr, dy_ptr, dx_ptr, sums_ptr, x_row, dy_row, N, D, slab_rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes dx, and the share of each slab of rows in the gradients of the bias and (column D) of log_scale.

    With r = 1/rms(x - bias) and s = r·exp(log_scale), dx = s·dy + (ds/dx)·Σ dy·x and ds/dx = -s·r²·(x - bias)/D.
    """
    d = tl.arange(0, CHANNELS)
    first = tl.program_id(0) * slab_rows
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0)
    exp_log_scale = tl.exp(tl.load(log_scale_ptr).to(tl.float32))
    dbias, dlog_scale = tl.zeros((ROWS, CHANNELS), tl.float32), tl.zeros((ROWS,), tl.float32)
    done = 0
    while done < slab_rows:
        n = first + done + tl.arange(0, ROWS)
        mask = (n < N)[:, None] & (d < D)[None, :]
        x, dy = load_rows(x_ptr, n, x_row, d, mask), load_rows(dy_ptr, n, dy_row, d, mask)
        centred = x - bias[None, :]
        # Rows beyond the end are zeros. They must not become infinite where the bias is 0 too.
        inverse_rms = tl.where(n < N, _inverse_rms(centred, D), 0.0)
        scale = inverse_rms * exp_log_scale
        dscale = tl.sum(dy * x, axis=1)
        dcentred = centred * (-dscale * scale * inverse_rms * inverse_rms / D)[:, None]
        tl.store(dx_ptr + n.to(tl.int64)[:, None] * D + d[None, :], dy * scale[:, None] + dcentred, mask=mask)
        dbias -= dcentred
        dlog_scale += dscale * scale
        done += ROWS
    sums = sums_ptr + tl.program_id(0) * (D + 1)
    tl.store(sums + d, tl.sum(dbias, axis=0), mask=d < D)
    tl.store(sums + D, tl.sum(dlog_scale, axis=0))


class _BiasNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias_D: Tensor, log_scale: Tensor, settings: Tensor | None) -> Tensor:
        x_ND = rows(x)
        N, D = x_ND.shape
        channels = triton.next_power_of_2(D)
        ctx.tile = dict(ROWS=max(1, TILE_ELEMENTS // channels), CHANNELS=channels)
        y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        _norm_kernel[(triton.cdiv(N, ctx.tile["ROWS"]),)](x_ND, bias_D, log_scale, y, x_ND.stride(0), N, D, **ctx.tile)
        ctx.save_for_backward(x_ND, bias_D, log_scale)
        # settings may be a view of a tensor that other modules write to, which autograd would refuse to save.
        ctx.settings = settings
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, bias_D, log_scale = ctx.saved_tensors
        dy_ND = rows(grads[0])
        N, D = x_ND.shape
        slab_rows, slabs = slabs_of(N, ctx.tile["ROWS"])
        dx = torch.empty(grads[0].shape, device=x_ND.device, dtype=x_ND.dtype)
        sums = torch.empty(slabs, D + 1, device=x_ND.device)
        _norm_gradient_kernel[(slabs,)](
            x_ND, bias_D, log_scale, dy_ND, dx, sums, x_ND.stride(0), dy_ND.stride(0), N, D, slab_rows, **ctx.tile
        )
        dweights = totals(sums, bias_D.dtype, log_scale, ctx.settings, D)
        return dx, dweights[:D], dweights[D], None


def bias_norm(x: Tensor, bias_D: Tensor, log_scale: Tensor, settings: Tensor | None) -> Tensor:
    """Returns x · exp(log_scale) / rms(x - bias) in the type of x, with the rms taken over channels.

    Args:
        x: (…, D).
        bias_D, log_scale: the learned bias and the learned scalar.
        settings: three numbers on the device that limit log_scale, as `ssm_asr.ops.limit.limit` takes them, or None.
    """
    y: Tensor = _BiasNorm.apply(x, bias_D, log_scale, settings)
    return y

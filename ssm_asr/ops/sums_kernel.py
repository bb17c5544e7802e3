"""These kernels sum over the rows of a matrix, for the gradients of biases and scales, in float32 and a fixed order.

They work in two stages. The rows are cut into slabs, and one kernel writes the sums of each slab. Another one adds up
the sums of all slabs.

Shapes: N rows, D channels, S slabs of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT

ROWS, CHANNELS = 64, 64  # sizes of a program's tile
MOST_SLABS = 512
PROGRAMS = 1024  # as many programs keep a large GPU busy


@triton.jit
def load_rows(ptr, n, row_stride, d, mask):  # type: ignore[no-untyped-def]
    """Loads rows n of a matrix in float32, with zeros where the mask is False."""
    return tl.load(ptr + n.to(tl.int64)[:, None] * row_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=ANY_COUNT)
def _sums_kernel(  # type: ignore[no-untyped-def]
    x_ptr, sums_ptr, x_row, N, D, slab_rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(0) * slab_rows
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    done = 0
    while done < slab_rows:
        n = first + done + tl.arange(0, ROWS)
        total += load_rows(x_ptr, n, x_row, d, (n < N)[:, None] & (d < D)[None, :])
        done += ROWS
    tl.store(sums_ptr + tl.program_id(0) * D + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit(do_not_specialize=ANY_COUNT)
def _totals_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, out_ptr, parameter_ptr, settings_ptr, S, D, first_limited,
    LIMITED: tl.constexpr, SLABS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    slab = tl.arange(0, SLABS)
    sums = tl.load(sums_ptr + slab[:, None] * D + d[None, :], mask=(slab < S)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.sum(sums, axis=0)
    if LIMITED:
        limited = (d >= first_limited) & (d < D)
        parameter = tl.load(parameter_ptr + d - first_limited, mask=limited, other=0.0)
        acts, low, high = tl.load(settings_ptr), tl.load(settings_ptr + 1), tl.load(settings_ptr + 2)
        outward = ((total < 0) & (parameter > high)) | ((total > 0) & (parameter < low))
        total = tl.where(limited & outward, total * (1 - 2 * acts), total)
    tl.store(out_ptr + d, total, mask=d < D)


def rows(x: Tensor) -> Tensor:
    """Returns x as a matrix (N, D) with contiguous rows, as a view if possible."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def slabs_of(N: int, tile_rows: int, columns: int = 1) -> tuple[int, int]:
    """Cuts rows into slabs, few enough to be added up and many enough to keep a GPU busy.

    Args:
        N: number of rows.
        tile_rows: rows of a program's tile.
        columns: number of programs that share a slab, each with some of its columns.

    Returns:
        The rows of a slab, a multiple of tile_rows, and the number of slabs.
    """
    tiles, most = triton.cdiv(N, tile_rows), max(1, min(MOST_SLABS, PROGRAMS // columns))
    slab_rows = max(1, triton.cdiv(tiles, most)) * tile_rows
    return slab_rows, max(1, triton.cdiv(N, slab_rows))


def totals(
    sums_SD: Tensor,
    dtype: torch.dtype,
    parameter: Tensor | None = None,
    settings: Tensor | None = None,
    first_limited: int = 0,
) -> Tensor:
    """Adds up the sums of all slabs, (D,), and may limit the parameter whose gradient they are.

    Args:
        sums_SD: the sums of each slab.
        dtype: type of the result.
        parameter: the parameter whose gradient the sums are, from channel `first_limited` on.
        settings: three numbers on the device, as `ssm_asr.ops.limit.limit` takes them: gradients that lead further out
            of the limits are flipped. None flips nothing.
        first_limited: the first channel that belongs to `parameter`.
    """
    S, D = sums_SD.shape
    out_D = torch.empty(D, device=sums_SD.device, dtype=dtype)
    unused = sums_SD
    _totals_kernel[(triton.cdiv(D, 16),)](
        sums_SD, out_D, unused if parameter is None else parameter, unused if settings is None else settings,
        S, D, first_limited, LIMITED=settings is not None, SLABS=triton.next_power_of_2(S), CHANNELS=16,
    )  # fmt: skip
    return out_D


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the sums (D,) over all dimensions of x but the last, in the given type."""
    x_ND = rows(x)
    N, D = x_ND.shape
    columns = triton.cdiv(D, CHANNELS)
    slab_rows, slabs = slabs_of(N, ROWS, columns)
    sums_SD = torch.empty(slabs, D, device=x.device)
    _sums_kernel[(slabs, columns)](x_ND, sums_SD, x_ND.stride(0), N, D, slab_rows, ROWS=ROWS, CHANNELS=CHANNELS)
    return totals(sums_SD, dtype)

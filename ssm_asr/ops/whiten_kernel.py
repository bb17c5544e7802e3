"""These four kernels compute how a whitener changes the gradient.

In a batch in which the whitener does not act, they return at once, or only copy the gradient. Let cov be the covariance
of a group's channels (a sum over frames, not a mean), and m the mean of the diagonals of all groups. Then

    metric = Σ (cov/m)² / D        W = cov/m - metric·I        d metric / dx ~ (x - mean) W

The norm of (x - mean) W is the root of tr W cov W. So the result is the only tensor of the size of x that is made. Sums
run in float32 and in a fixed order.

`settings` are the three numbers of `ssm_asr.ops.whiten.whiten` in a tensor on the device.

Shapes: N frames, D channels, G groups of C channels, S slabs of frames, P blocks of channels by channels on and above
the diagonals of all groups (a block is called a pair where it is counted), E edge of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT

FRAMES = 64  # frames of a tile whose products are summed
LOADED = 8  # slabs, and rows of a block, that are summed at a time
PROGRAMS = 528  # programs that share the sums: four for each multiprocessor of an H100
APPLIED = 128  # frames of a tile of the gradient
WARPS = 8


@triton.jit
def _block(index, blocks):  # type: ignore[no-untyped-def]
    """Returns row and column of a block, counted on and above the diagonal of a square of blocks × blocks."""
    row = 0
    while index >= blocks - row:
        index -= blocks - row
        row += 1
    return row, row + index


@triton.jit
def _total(ptr, count):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 256)
    total = tl.zeros((256,), tl.float32)
    first = 0
    while first < count:
        total += tl.load(ptr + first + i, mask=first + i < count, other=0.0)
        first += 256
    return tl.sum(total, axis=0)


@triton.jit
def _metric(sums_ptr, count, D):  # type: ignore[no-untyped-def]
    """Returns the whitening metric, and the mean of the diagonals of the covariances."""
    diagonal = _total(sums_ptr + count, count) / D + 1e-20
    return _total(sums_ptr, count) / diagonal / diagonal / D, diagonal


@triton.jit(do_not_specialize=ANY_COUNT)
def _products_kernel(  # type: ignore[no-untyped-def]
    x_ptr, shift_ptr, grad_ptr, settings_ptr, over_limit_ptr, acts_ptr, products_ptr, columns_ptr,
    N, D, C, x_stride, grad_stride, blocks, pairs, slab_frames,
    SHIFTED: tl.constexpr, FRAMES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Writes whether the whitener acts, and if so products of channels and sums of x and grad² over slabs of frames."""
    pair, slab = tl.program_id(0), tl.program_id(1)
    due, anyway = tl.load(settings_ptr) > 0, tl.load(settings_ptr + 1) > 0
    acts = due & (anyway | (tl.load(over_limit_ptr) != 0))
    tl.store(acts_ptr, acts.to(tl.float32), mask=pair + slab == 0)
    if acts:
        row, column = _block(pair % pairs, blocks)
        group = pair // pairs * C
        n, i, j = tl.arange(0, FRAMES)[:, None], row * EDGE + tl.arange(0, EDGE), column * EDGE + tl.arange(0, EDGE)
        products = tl.zeros((EDGE, EDGE), tl.float32)
        total = tl.zeros((FRAMES, EDGE), tl.float32)
        squares = tl.zeros((FRAMES, EDGE), tl.float32)
        done = 0
        while done < slab_frames:
            first = slab * slab_frames + done
            x, grad = x_ptr + first.to(tl.int64) * x_stride + group, grad_ptr + first.to(tl.int64) * grad_stride + group
            inside_i, inside_j = (first + n < N) & (i < C)[None, :], (first + n < N) & (j < C)[None, :]
            x_i = tl.load(x + n * x_stride + i[None, :], mask=inside_i, other=0.0)
            x_j = tl.load(x + n * x_stride + j[None, :], mask=inside_j, other=0.0)
            if SHIFTED:  # a mean far above the deviations would cost digits of the products
                x_i = tl.where(inside_i, x_i - tl.load(shift_ptr + group + i, mask=i < C)[None, :], 0.0)
                x_j = tl.where(inside_j, x_j - tl.load(shift_ptr + group + j, mask=j < C)[None, :], 0.0)
            of_diagonal = inside_i & (row == column)
            grad = tl.load(grad + n * grad_stride + i[None, :], mask=of_diagonal, other=0.0).to(tl.float32)
            products = tl.dot(tl.trans(x_i), x_j, products, input_precision="tf32x3")
            total += x_i.to(tl.float32)
            squares += grad * grad
            done += FRAMES
        place = (slab * tl.num_programs(0) + pair) * EDGE * EDGE
        inner = tl.arange(0, EDGE)
        tl.store(products_ptr + place + inner[:, None] * EDGE + inner[None, :], products)
        out, inside = columns_ptr + slab * 2 * D + group + i, (i < C) & (row == column)
        tl.store(out, tl.sum(total, axis=0), mask=inside)
        tl.store(out + D, tl.sum(squares, axis=0), mask=inside)


@triton.jit(do_not_specialize=ANY_COUNT)
def _covariance_kernel(  # type: ignore[no-untyped-def]
    acts_ptr, products_ptr, columns_ptr, mean_ptr, cov_ptr, sums_ptr,
    N, D, C, S, blocks, pairs, LOADED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Computes some rows of a block of the covariance, and their sums for the metric and for the gradient's norm."""
    if tl.load(acts_ptr) > 0:
        pair, part = tl.program_id(0), tl.program_id(1)
        row, column = _block(pair % pairs, blocks)
        group = pair // pairs * C
        r, c = part * LOADED + tl.arange(0, LOADED), tl.arange(0, EDGE)
        within = (r[:, None] * EDGE + c[None, :])[None, :, :]
        i, j = row * EDGE + r, column * EDGE + c
        inside_i, inside_j = (i < C)[None, :], (j < C)[None, :]
        cov = tl.zeros((LOADED, EDGE), tl.float32)
        total_i, squares = tl.zeros((LOADED,), tl.float32), tl.zeros((LOADED,), tl.float32)
        total_j = tl.zeros((EDGE,), tl.float32)
        first = 0
        while first < S:
            slab = first + tl.arange(0, LOADED)[:, None]
            place = ((slab * tl.num_programs(0) + pair) * EDGE * EDGE)[:, :, None] + within
            cov += tl.sum(tl.load(products_ptr + place, mask=(slab < S)[:, :, None], other=0.0), axis=0)
            columns = columns_ptr + slab * 2 * D + group
            total_j += tl.sum(tl.load(columns + j[None, :], mask=(slab < S) & inside_j, other=0.0), axis=0)
            columns, inside = columns + i[None, :], (slab < S) & inside_i
            total_i += tl.sum(tl.load(columns, mask=inside, other=0.0), axis=0)
            squares += tl.sum(tl.load(columns + D, mask=inside, other=0.0), axis=0)
            first += LOADED
        cov -= total_i[:, None] * (total_j / N)[None, :]
        i, j, inside = i[:, None], j[None, :], (i < C)[:, None] & (j < C)[None, :]
        tl.store(cov_ptr + (group + i) * C + j, cov, mask=inside)
        tl.store(cov_ptr + (group + j) * C + i, cov, mask=inside & (row < column))
        out, count = sums_ptr + pair * tl.num_programs(1) + part, tl.num_programs(0) * tl.num_programs(1)
        diagonal = (row == column).to(tl.float32)
        tl.store(out, (2.0 - diagonal) * tl.sum(tl.sum(cov * cov, axis=1), axis=0))
        tl.store(out + count, tl.sum(tl.sum(tl.where(i == j, cov, 0.0), axis=1), axis=0))
        tl.store(out + 2 * count, diagonal * tl.sum(squares, axis=0))
        mean = mean_ptr + group + row * EDGE + r
        tl.store(mean, total_i / N, mask=(row * EDGE + r < C) & (row == column))


@triton.jit(do_not_specialize=ANY_COUNT)
def _size_kernel(  # type: ignore[no-untyped-def]
    acts_ptr, settings_ptr, over_limit_ptr, cov_ptr, sums_ptr, sizes_ptr, weight_ptr,
    D, C, blocks, pairs, count, EDGE: tl.constexpr,
):  # fmt: skip
    """Writes whether the metric is over the limit, W, and the part of each block in tr W (cov/m) W."""
    if tl.load(acts_ptr) > 0:
        pair = tl.program_id(0)
        metric, mean = _metric(sums_ptr, count, D)
        tl.store(over_limit_ptr, (metric > tl.load(settings_ptr + 2)).to(tl.uint8), mask=pair == 0)
        row, column = _block(pair % pairs, blocks)
        cov_ptr += pair // pairs * C * C
        weight_ptr += pair // pairs * C * C
        i, j = (row * EDGE + tl.arange(0, EDGE))[:, None], (column * EDGE + tl.arange(0, EDGE))[None, :]
        product = tl.zeros((EDGE, EDGE), tl.float32)
        first = 0
        while first < C:
            k = first + tl.arange(0, EDGE)
            left = tl.load(cov_ptr + i * C + k[None, :], mask=(i < C) & (k < C)[None, :], other=0.0) / mean
            right = tl.load(cov_ptr + k[:, None] * C + j, mask=(k < C)[:, None] & (j < C), other=0.0) / mean
            left -= tl.where(i == k[None, :], metric, 0.0)
            product = tl.dot(left, right, product, input_precision="tf32x3")
            first += EDGE
        inside = (i < C) & (j < C)
        weight = tl.load(cov_ptr + i * C + j, mask=inside, other=0.0) / mean
        weight -= tl.where(i == j, metric, 0.0)
        tl.store(weight_ptr + i * C + j, weight, mask=inside)
        tl.store(weight_ptr + j * C + i, weight, mask=inside & (row < column))
        size = tl.sum(tl.sum(weight * product, axis=1), axis=0)
        tl.store(sizes_ptr + pair, tl.where(row == column, size, 2.0 * size))


@triton.jit(do_not_specialize=ANY_COUNT)
def _apply_kernel(  # type: ignore[no-untyped-def]
    x_ptr, shift_ptr, grad_ptr, acts_ptr, settings_ptr, mean_ptr, sums_ptr, sizes_ptr, weight_ptr, out_ptr,
    N, D, C, x_stride, grad_stride, blocks, count, size_count, grad_scale,
    SHIFTED: tl.constexpr, IN_PLACE: tl.constexpr, FRAMES: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    acts = tl.load(acts_ptr) > 0
    if IN_PLACE:
        N = tl.where(acts, N, 0)  # nothing to copy
    group = tl.program_id(0) // blocks * C
    j = tl.program_id(0) % blocks * EDGE + tl.arange(0, EDGE)
    n, first = tl.arange(0, FRAMES)[:, None], tl.program_id(1) * FRAMES
    inside = (first + n < N) & (j < C)[None, :]
    grad_ptr += first.to(tl.int64) * grad_stride + group
    grad = tl.load(grad_ptr + n * grad_stride + j[None, :], mask=inside, other=0.0)
    if acts:
        metric, mean = _metric(sums_ptr, count, D)
        if metric > tl.load(settings_ptr + 2):
            # The least size is the size of a rounding error. It matters where the metric has no gradient, as it has
            # none if all channels are equal.
            size = tl.maximum(_total(sizes_ptr, size_count), 1e-6 * D * metric * metric)
            scale = grad_scale * tl.sqrt(_total(sums_ptr + 2 * count, count)) / tl.sqrt(mean * size)
            x_ptr += first.to(tl.int64) * x_stride + group
            push = tl.zeros((FRAMES, EDGE), tl.float32)
            done = 0
            while done < C:
                k = done + tl.arange(0, EDGE)
                x = tl.load(x_ptr + n * x_stride + k[None, :], mask=(first + n < N) & (k < C)[None, :], other=0.0)
                centred = x.to(tl.float32) - tl.load(mean_ptr + group + k, mask=k < C, other=0.0)[None, :]
                if SHIFTED:
                    centred -= tl.load(shift_ptr + group + k, mask=k < C, other=0.0)[None, :]
                place = weight_ptr + (group + k)[:, None] * C + j[None, :]
                weight = tl.load(place, mask=(k < C)[:, None] & (j < C)[None, :], other=0.0)
                push = tl.dot(centred.to(x.dtype), weight, push, input_precision="tf32x3")
                done += EDGE
            grad = (grad.to(tl.float32) + scale * push).to(grad.dtype)
    out_ptr += first.to(tl.int64) * D + group
    tl.store(out_ptr + n * D + j[None, :], grad, mask=inside)


def _frames(x: Tensor, order: list[int]) -> Tensor:
    """Returns x as (N, D), with the dimensions before D in the given order. It copies only if a view is impossible."""
    x = x.permute(*order, -1)
    return (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, -2)


def whiten(
    x: Tensor, grad: Tensor, settings: Tensor, over_limit: Tensor, groups: int = 1, grad_scale: float = 0.01
) -> Tensor:
    """Returns the gradient after a whitener.

    Args:
        x: (…, D), the input of the whitener, in a type of at most 32 bits.
        grad: the gradient, in the shape and type of x.
        settings: the three numbers of the whitener, on the device.
        over_limit: scalar of type bool: whether the metric was over the limit. It is updated if the whitener acts.
        groups: G.
        grad_scale: norm of the added gradient, relative to the norm of the gradient.
    """
    # Dimensions are ordered as in memory, so that most inputs need no copy.
    order = sorted(range(x.ndim - 1), key=x.stride().__getitem__, reverse=True)
    x_ND, grad_ND = _frames(x, order), _frames(grad, order)
    (N, D), C = x_ND.shape, x.shape[-1] // groups
    edge = min(max(triton.next_power_of_2(C), 16), 64)
    blocks = triton.cdiv(C, edge)
    pairs = blocks * (blocks + 1) // 2  # blocks of a group
    P = groups * pairs
    slab_frames = FRAMES * triton.cdiv(N, FRAMES * max(PROGRAMS // P, 1))
    S, parts = triton.cdiv(N, slab_frames), edge // LOADED

    acts, products_SPEE, columns_S2D, mean_D, cov_GCC, sums_3P, sizes_P = (
        torch.empty(shape, device=x.device)
        for shape in ((), (S, P, edge, edge), (S, 2, D), (D,), (groups, C, C), (3, P * parts), (P,))
    )
    weight_GCC = torch.empty(groups, C, C, dtype=x.dtype, device=x.device)
    flag = over_limit.view(torch.uint8)
    shifted = x.dtype == torch.float32  # half precision has so few digits that a mean costs none in float32
    shift_D = x_ND.mean(dim=0) if shifted else mean_D
    strides = x_ND.stride(0), grad_ND.stride(0)
    _products_kernel[(P, S)](
        x_ND, shift_D, grad_ND, settings, flag, acts, products_SPEE, columns_S2D,
        N, D, C, *strides, blocks, pairs, slab_frames, SHIFTED=shifted, FRAMES=FRAMES, EDGE=edge, num_warps=WARPS,
    )  # fmt: skip
    _covariance_kernel[(P, parts)](
        acts, products_SPEE, columns_S2D, mean_D, cov_GCC, sums_3P,
        N, D, C, S, blocks, pairs, LOADED=LOADED, EDGE=edge, num_warps=WARPS,
    )  # fmt: skip
    _size_kernel[(P,)](
        acts, settings, flag, cov_GCC, sums_3P, sizes_P, weight_GCC,
        D, C, blocks, pairs, P * parts, EDGE=edge, num_warps=WARPS,
    )  # fmt: skip
    copied = grad_ND.data_ptr() != grad.data_ptr()  # a copy belongs to nobody else, so it may be overwritten
    out_ND = grad_ND if copied else torch.empty(N, D, dtype=grad.dtype, device=x.device)
    _apply_kernel[(groups * blocks, triton.cdiv(N, APPLIED))](
        x_ND, shift_D, grad_ND, acts, settings, mean_D, sums_3P, sizes_P, weight_GCC, out_ND,
        N, D, C, *strides, blocks, P * parts, P, grad_scale,
        SHIFTED=shifted, IN_PLACE=copied, FRAMES=APPLIED, EDGE=edge, num_warps=WARPS,
    )  # fmt: skip
    # The dimensions get their own order back; memory stays as it is.
    out = out_ND.reshape(*(x.shape[dim] for dim in order), D)
    return out.permute(*sorted(range(len(order)), key=order.__getitem__), -1)

"""These kernels compute the chunk-causal depthwise convolution. Their programs go from chunk to chunk.

    y_t = Σ_k causal_k·x_{t+k-M} + causal_bias + edge_p·(Σ_k inside_k·x_{t+k-M}·[same chunk] + inside_bias)

Here k runs to M in the causal sum and to K-1 = 2·M in the other. The place p of a frame t is its position in its chunk.
[same chunk] is 1 if both frames are in one chunk, else 0, and edge_p is 1 + left_p + right_{K-C+p}, in which left_p
counts for p < K and right_{K-C+p} for p >= C-K. So the frames at a place are filtered by K taps that do not depend on
the chunk, and the gradients of all weights follow from a few sums over the frames at each place.

Shapes: B batch, T frames, D channels, K taps, M = K // 2, L = M + 1, C frames of a chunk, S slabs of chunks,
W = L + 1 + K + 1 rows of taps and biases.
"""

# Triton unrolls loops over constants, so that tuples may grow in them.
# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT

# PLACES and CHANNELS are the largest sizes of a program's tile. A warp has one place and two channels per thread, so
# no two warps add to one sum. WARPS warps fill a GPU; more slabs would only mean more sums to add up in the end.
PLACES, CHANNELS, WARPS = 8, 64, 2112
MAX_REGISTERS = 128  # per thread, so that WARPS warps fit; registers that spill do so before the loops
SUM_ROWS, SUM_CHANNELS = 128, 32  # sizes of a tile in the kernel that adds up the slabs


@triton.jit(do_not_specialize=ANY_COUNT)
def _arrange_kernel(  # type: ignore[no-untyped-def]
    scale_ptr, causal_ptr, causal_bias_ptr, inside_ptr, inside_bias_ptr, weights_ptr, edge_ptr,
    D, C, K: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes the edge at each place (C, D), and (W, D): causal taps, causal bias, inside taps, inside bias."""
    L: tl.constexpr = K // 2 + 1
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = d < D
    if tl.program_id(0) < C:
        p = tl.program_id(0)
        left = tl.load(scale_ptr + d * K + p, mask=there & (p < K), other=0.0)
        right = tl.load(scale_ptr + (D + d) * K + K - C + p, mask=there & (K - C + p >= 0), other=0.0)
        tl.store(edge_ptr + p * D + d, 1.0 + (left + right), mask=there)
    else:
        k = tl.program_id(0) - C
        causal = tl.load(causal_ptr + d * L + k, mask=there & (k < L), other=0.0)
        causal += tl.load(causal_bias_ptr + d, mask=there & (k == L), other=0.0)
        inside = tl.load(inside_ptr + d * K + k, mask=there & (k < K), other=0.0)
        inside += tl.load(inside_bias_ptr + d, mask=there & (k == K), other=0.0)
        tl.store(weights_ptr + k * D + d, causal, mask=there & (k <= L))
        tl.store(weights_ptr + (L + 1 + k) * D + d, inside, mask=there)


@triton.jit
def _tile(C, D, PLACES: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the program's places and channels, a mask of those that exist, and their offsets inside a chunk."""
    p = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return p, d, (p < C)[:, None] & (d < D)[None, :], p[:, None] * D + d[None, :]


@triton.jit
def _chunk(pair, T, C, chunks, D: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns for a pair of a sequence and a chunk its first frame, its first element, and whether no masks are needed.

    Masks are half the work. They are not needed where all frames exist that the program's places see.
    """
    start = pair % chunks * C
    begin = start + tl.program_id(0) * PLACES - K // 2
    within = (begin >= 0) & (begin + PLACES + K - 1 <= T) & ((tl.program_id(0) + 1) * PLACES <= C)
    return start, ((pair // chunks).to(tl.int64) * T + start) * D, within & (D % CHANNELS == 0)


@triton.jit
def _frames(x_ptrs, offset: tl.constexpr, t, mask, T, D: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loads the frames t + offset in float32; x_ptrs points to the frames t. Frames outside the sequence are zeros."""
    if MASKED:
        there = mask & ((t + offset >= 0) & (t + offset < T))[:, None]
        return tl.load(x_ptrs + offset * D, mask=there, other=0.0).to(tl.float32)
    return tl.load(x_ptrs + offset * D).to(tl.float32)


@triton.jit
def _filtered(y, taps, x_ptrs, t, mask, T, D: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    for k in tl.static_range(K):
        y += taps[k] * _frames(x_ptrs, k - K // 2, t, mask, T, D, MASKED)
    return y


@triton.jit(do_not_specialize=ANY_COUNT)
def _convolve_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weights_ptr, edge_ptr, y_ptr, T, C, chunks, pairs, slab_pairs,
    D: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes y from x, or with BACKWARD dx from dy.

    Each place has its own K taps, which stay in registers while the program goes from chunk to chunk.
    """
    M: tl.constexpr = K // 2
    p, d, mask, place = _tile(C, D, PLACES, CHANNELS)
    inside_ptr = weights_ptr + (M + 2) * D
    edge = tl.load(edge_ptr + place, mask=mask, other=0.0)
    taps = ()
    for j in tl.static_range(K):
        k = K - 1 - j if BACKWARD else j
        source = p + (j - M)  # the place of the frame under the tap, if it is in this chunk
        same = mask & ((source >= 0) & (source < C))[:, None]
        scale = tl.load(edge_ptr + place + (j - M) * D, mask=same, other=0.0) if BACKWARD else tl.where(same, edge, 0.0)
        tap = scale * tl.load(inside_ptr + k * D + d, mask=d < D, other=0.0)[None, :]
        if k <= M:
            tap += tl.load(weights_ptr + k * D + d, mask=d < D, other=0.0)[None, :]
        taps += (tap,)
    bias = tl.zeros((PLACES, CHANNELS), tl.float32)
    if not BACKWARD:
        bias += tl.load(weights_ptr + (M + 1) * D + d, mask=d < D, other=0.0)[None, :]
        bias += tl.load(inside_ptr + K * D + d, mask=d < D, other=0.0)[None, :] * edge
    pair = tl.program_id(2) * slab_pairs
    last = tl.minimum(pair + slab_pairs, pairs)
    while pair < last:
        start, first, within = _chunk(pair, T, C, chunks, D, K, PLACES, CHANNELS)
        t = start + p
        if within:
            y = _filtered(bias, taps, x_ptr + first + place, t, mask, T, D, K, False)
        else:
            y = _filtered(bias, taps, x_ptr + first + place, t, mask, T, D, K, True)
        tl.store(y_ptr + first + place, y, mask=mask & (t < T)[:, None])
        pair += 1


@triton.jit
def _add_products(products, dy, x_ptrs, t, mask, T, D: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    sums = ()
    for k in tl.static_range(K):
        sums += (products[k] + dy * _frames(x_ptrs, k - K // 2, t, mask, T, D, MASKED),)
    return sums


@triton.jit(do_not_specialize=ANY_COUNT)
def _products_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, products_ptr, T, C, chunks, pairs, slab_pairs,
    D: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums P[p, k] = Σ dy_t·x_{t+k-M} and P[p, K] = Σ dy_t over the frames t at place p in the chunks of each slab.

    The gradients of all weights are sums of these: p and k alone say whether frame t+k-M is in the chunk of frame t.
    """
    p, d, mask, place = _tile(C, D, PLACES, CHANNELS)
    total = tl.zeros((PLACES, CHANNELS), tl.float32)
    products = ()
    for _ in tl.static_range(K):
        products += (total,)
    pair = tl.program_id(2) * slab_pairs
    last = tl.minimum(pair + slab_pairs, pairs)
    while pair < last:
        start, first, within = _chunk(pair, T, C, chunks, D, K, PLACES, CHANNELS)
        t = start + p
        dy = tl.load(dy_ptr + first + place, mask=mask & (t < T)[:, None], other=0.0).to(tl.float32)
        if within:
            products = _add_products(products, dy, x_ptr + first + place, t, mask, T, D, K, False)
        else:
            products = _add_products(products, dy, x_ptr + first + place, t, mask, T, D, K, True)
        total += dy
        pair += 1
    out = products_ptr + (tl.program_id(2) * C + p)[:, None] * ((K + 1) * D) + d[None, :]
    for k in tl.static_range(K):
        tl.store(out + k * D, products[k], mask=mask)
    tl.store(out + K * D, total, mask=mask)


@triton.jit
def _add_slabs(plain, weighted, product_ptrs, factor, slab, mask, slabs, slab_size, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds the products of the slabs slab, slab + STEP, … to two sums: to `plain`, and times a factor to `weighted`."""
    done = 0
    while done < slabs:
        there = mask & (slab + done < slabs)[:, None]
        product = tl.load(product_ptrs + done * slab_size, mask=there, other=0.0)
        plain += product
        weighted += product * factor
        done += STEP
    return plain, weighted


@triton.jit(do_not_specialize=ANY_COUNT)
def _weight_gradient_kernel(  # type: ignore[no-untyped-def]
    products_ptr, weights_ptr, edge_ptr, dscale_ptr, dcausal_ptr, dcausal_bias_ptr, dinside_ptr, dinside_bias_ptr,
    D, C, slabs, K: tl.constexpr, TAPS: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums the products into the gradients of one tap or of the biases, or into the gradient of the edge at one place.

    TAPS is the least power of 2 that is at least K + 1, PLACES is any number, and ROWS is a multiple of both.
    """
    M: tl.constexpr = K // 2
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    d_mask = (d < D)[None, :]
    row = tl.arange(0, ROWS)
    slab_size = C * (K + 1) * D
    plain = tl.zeros((ROWS, CHANNELS), tl.float32)
    weighted = plain
    if tl.program_id(1) <= K:
        k = tl.program_id(1)
        first = 0
        while first < C:
            p, slab = first + row % PLACES, row // PLACES
            mask = (p < C)[:, None] & d_mask
            same = ((p + k >= M) & (p + k < M + C)) | (k == K)
            edge = tl.load(edge_ptr + p[:, None] * D + d[None, :], mask=mask & same[:, None], other=0.0)
            product_ptrs = products_ptr + ((slab * C + p) * (K + 1) + k)[:, None] * D + d[None, :]
            plain, weighted = _add_slabs(
                plain, weighted, product_ptrs, edge, slab, mask, slabs, slab_size, ROWS // PLACES
            )
            first += PLACES
        causal, inside = tl.sum(plain, axis=0), tl.sum(weighted, axis=0)
        tl.store(dcausal_ptr + d * (M + 1) + k, causal, mask=(d < D) & (k <= M))
        tl.store(dcausal_bias_ptr + d, causal, mask=(d < D) & (k == K))
        tl.store(dinside_ptr + d * K + k, inside, mask=(d < D) & (k < K))
        tl.store(dinside_bias_ptr + d, inside, mask=(d < D) & (k == K))
        # Chunks shorter than the kernel do not use all numbers of the scale. The gradient of the others is 0.
        unused = tl.zeros((CHANNELS,), tl.float32)
        tl.store(dscale_ptr + d * K + k, unused, mask=(d < D) & (k < K) & (k >= C))
        tl.store(dscale_ptr + (D + d) * K + k, unused, mask=(d < D) & (k < K - C))
    else:
        place = tl.program_id(1) - (K + 1)
        ks, slab = row % TAPS, row // TAPS
        same = ((place + ks >= M) & (place + ks < M + C) & (ks < K)) | (ks == K)
        tap_ptrs = weights_ptr + (M + 2 + ks)[:, None] * D + d[None, :]
        tap = tl.load(tap_ptrs, mask=same[:, None] & d_mask, other=0.0)
        product_ptrs = products_ptr + ((slab * C + place) * (K + 1) + ks)[:, None] * D + d[None, :]
        mask = (ks <= K)[:, None] & d_mask
        _, weighted = _add_slabs(plain, weighted, product_ptrs, tap, slab, mask, slabs, slab_size, ROWS // TAPS)
        dedge = tl.sum(weighted, axis=0)
        tl.store(dscale_ptr + d * K + place, dedge, mask=(d < D) & (place < K))
        tl.store(dscale_ptr + (D + d) * K + K - C + place, dedge, mask=(d < D) & (K - C + place >= 0))


def _march(shape_BTD: torch.Size, C: int, K: int) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]:
    """Returns the grid, the sizes and the constants for the kernels whose programs go from chunk to chunk."""
    B, T, D = shape_BTD
    pairs, places = B * triton.cdiv(T, C), min(PLACES, triton.next_power_of_2(C))
    tiles = triton.cdiv(C, places), triton.cdiv(D, CHANNELS)
    slab_pairs = triton.cdiv(pairs, max(1, WARPS // (places * tiles[0] * tiles[1])))
    sizes = (T, C, triton.cdiv(T, C), pairs, slab_pairs)
    constants = dict(D=D, K=K, PLACES=places, CHANNELS=CHANNELS, num_warps=places, maxnreg=MAX_REGISTERS)
    return (*tiles, triton.cdiv(pairs, slab_pairs)), sizes, constants


class _ChunkCausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, chunk: int, *weights: Tensor) -> Tensor:
        _, D, K = weights[0].shape
        ctx.march, ctx.shapes = _march(x_BTD.shape, chunk, K), [w.shape for w in weights]
        grid, sizes, constants = ctx.march
        weights_WD, edge_CD = (torch.empty(rows, D, device=x_BTD.device) for rows in (K // 2 + K + 3, chunk))
        _arrange_kernel[(chunk + K + 1, triton.cdiv(D, CHANNELS))](
            *(w.contiguous() for w in weights), weights_WD, edge_CD, D, chunk, K=K, CHANNELS=CHANNELS, num_warps=1
        )
        y_BTD = torch.empty_like(x_BTD)
        _convolve_kernel[grid](x_BTD, weights_WD, edge_CD, y_BTD, *sizes, BACKWARD=False, **constants)
        ctx.save_for_backward(x_BTD, weights_WD, edge_CD)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weights_WD, edge_CD = ctx.saved_tensors
        grid, sizes, constants = ctx.march
        dy_BTD = grads[0].contiguous()
        dx_BTD = torch.empty_like(x_BTD)
        _convolve_kernel[grid](dy_BTD, weights_WD, edge_CD, dx_BTD, *sizes, BACKWARD=True, **constants)
        (C, D), K, slabs = edge_CD.shape, constants["K"], grid[2]
        products_SCKD = edge_CD.new_empty(slabs, C, K + 1, D)
        _products_kernel[grid](x_BTD, dy_BTD, products_SCKD, *sizes, **constants)
        dweights = [edge_CD.new_empty(shape) for shape in ctx.shapes]
        taps, places = triton.next_power_of_2(K + 1), min(triton.next_power_of_2(C), SUM_ROWS)
        _weight_gradient_kernel[(triton.cdiv(D, SUM_CHANNELS), K + 1 + C)](
            *(products_SCKD, weights_WD, edge_CD, *dweights, D, C, slabs),
            **dict(K=K, TAPS=taps, PLACES=places, ROWS=max(SUM_ROWS, taps), CHANNELS=SUM_CHANNELS, num_warps=8),
        )
        return dx_BTD, None, *dweights


def chunk_causal_conv(
    x_BTD: Tensor,
    chunk: int,
    scale_2DK: Tensor,
    causal_D1L: Tensor,
    causal_bias_D: Tensor,
    inside_D1K: Tensor,
    inside_bias_D: Tensor,
) -> Tensor:
    """Returns y (B, T, D) in the type of x. Sums are in float32.

    Args:
        x_BTD: in any floating-point type.
        chunk: C, in frames.
        scale_2DK: what is added to 1 near the left and near the right edge of a chunk. All weights are in float32.
        causal_D1L, causal_bias_D: weights of the causal convolution.
        inside_D1K, inside_bias_D: weights of the convolution inside the chunk.
    """
    weights = (scale_2DK, causal_D1L, causal_bias_D, inside_D1K, inside_bias_D)
    y_BTD: Tensor = _ChunkCausalConv.apply(x_BTD.contiguous(), chunk, *weights)
    return y_BTD

"""These kernels compute the chunk-causal depthwise convolution. Their programs go from chunk to chunk.

    y_t = Σ_k causal_k·x_{t+k-M} + causal_bias + edge_q·(Σ_k inside_k·x_{t+k-M}·[same chunk] + inside_bias)

Here k runs to M in the causal sum and to K-1 = 2·M in the other. The place q of a frame t is its position in its chunk.
[same chunk] is 1 if both frames are in one chunk, else 0, and edge_q is 1 + left_q + right_{K-C+q}, in which left_q
counts for q < K and right_{K-C+q} for q >= C-K. So the frames at a place are filtered by K taps that do not depend on
the chunk, and the gradients of all weights follow from a few sums over the frames at each place.

The size of a chunk is a number on the device, so that one captured graph serves chunks of all sizes. Chunks shorter
than a tile form groups of G chunks. The programs share the work by themselves: an item of work is a tile of the places
of a group, in a slab of groups.

Shapes: B batch, T frames, D channels, K taps, M = K // 2, L = M + 1, C frames of a chunk, S frames of a group, of which
P <= S can exist, N programs for each tile of channels, W = L + 1 + K + 1 + 2·K rows of taps, biases and edges.
"""

# Triton unrolls loops over constants, so that tuples may grow in them.
# mypy: disable-error-code="assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import ANY_COUNT

# PLACES and CHANNELS are the sizes of a program's tile. A warp has one place and two channels per thread, so no two
# warps add to one sum. WARPS warps fill a GPU; more programs would only mean more sums to add up in the end.
PLACES, CHANNELS, WARPS = 8, 64, 2112
MAX_REGISTERS = 128  # per thread, so that WARPS warps fit; registers that spill do so before the loops
SUM_ROWS, SUM_CHANNELS = 128, 32  # sizes of a tile in the kernel that adds up the slabs


@triton.jit(do_not_specialize=ANY_COUNT)
def _arrange_kernel(  # type: ignore[no-untyped-def]
    scale_ptr, causal_ptr, causal_bias_ptr, inside_ptr, inside_bias_ptr, weights_ptr,
    D, K: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Writes (W, D): causal taps, causal bias, inside taps, inside bias, left edge, right edge."""
    L: tl.constexpr = K // 2 + 1
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = d < D
    row = tl.program_id(0)
    inside, edge = row - (L + 1), row - (L + K + 2)
    x = tl.load(causal_ptr + d * L + row, mask=there & (row < L), other=0.0)
    x += tl.load(causal_bias_ptr + d, mask=there & (row == L), other=0.0)
    x += tl.load(inside_ptr + d * K + inside, mask=there & (inside >= 0) & (inside < K), other=0.0)
    x += tl.load(inside_bias_ptr + d, mask=there & (inside == K), other=0.0)
    x += tl.load(scale_ptr + (edge // K * D + d) * K + edge % K, mask=there & (edge >= 0), other=0.0)
    tl.store(weights_ptr + row * D + d, x, mask=there)


@triton.jit
def _sizes(chunk_ptr, T, programs, PLACES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns C, S, P, the number of tiles of a group's places, and the number of slabs."""
    C = tl.load(chunk_ptr)
    C = tl.where(C < 0, T, C)
    S = C * tl.maximum(PLACES // C, 1)
    P = tl.minimum(S, T)
    tiles = tl.cdiv(P, PLACES)
    return C, S, P, tiles, tl.maximum(programs // tiles, 1)


@triton.jit
def _edge(weights_ptr, q, d, C, mask, D: tl.constexpr, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns edge_q for places q and channels d, which broadcast."""
    left_ptr = weights_ptr + (K // 2 + K + 3) * D + d
    left = tl.load(left_ptr + q * D, mask=mask & (q < K), other=0.0)
    return 1.0 + (left + tl.load(left_ptr + (2 * K - C + q) * D, mask=mask & (q >= C - K), other=0.0))


@triton.jit
def _tile(tile, P, D, PLACES: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns a tile's places in a group and the program's channels, and a mask of those that exist."""
    p = tile * PLACES + tl.arange(0, PLACES)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return p, d, (p < P)[:, None] & (d < D)[None, :]


@triton.jit
def _group(pair, tile, T, S, P, groups, D: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns for a pair of a sequence and a group its first frame, its first element, and whether to do without masks.

    Masks are half the work. They are not needed where all frames exist that the program's places see.
    """
    start = pair % groups * S
    begin = start + tile * PLACES - K // 2
    within = (begin >= 0) & (begin + PLACES + K - 1 <= T) & ((tile + 1) * PLACES <= P)
    return start, ((pair // groups).to(tl.int64) * T + start) * D, within & (D % CHANNELS == 0)


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
    x_ptr, weights_ptr, y_ptr, chunk_ptr, B, T,
    D: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Computes y from x, or with BACKWARD dx from dy.

    Each place has its own K taps, which stay in registers while the program goes from group to group.
    """
    M: tl.constexpr = K // 2
    C, S, P, tiles, slabs = _sizes(chunk_ptr, T, tl.num_programs(0), PLACES)
    groups = tl.cdiv(T, S)
    slab_pairs = tl.cdiv(B * groups, slabs)
    inside_ptr = weights_ptr + (M + 2) * D
    item = tl.program_id(0)
    while item < tiles * slabs:
        tile = item % tiles
        p, d, mask = _tile(tile, P, D, PLACES, CHANNELS)
        q, d_row = (p % C)[:, None], d[None, :]
        edge = _edge(weights_ptr, q, d_row, C, mask, D, K)
        taps = ()
        for j in tl.static_range(K):
            k = K - 1 - j if BACKWARD else j
            source = q + (j - M)  # the place of the frame under the tap, if it is in this chunk
            same = mask & (source >= 0) & (source < C)
            scale = _edge(weights_ptr, source, d_row, C, same, D, K) if BACKWARD else edge
            tap = tl.where(same, scale, 0.0) * tl.load(inside_ptr + k * D + d, mask=d < D, other=0.0)[None, :]
            if k <= M:
                tap += tl.load(weights_ptr + k * D + d, mask=d < D, other=0.0)[None, :]
            taps += (tap,)
        bias = tl.zeros((PLACES, CHANNELS), tl.float32)
        if not BACKWARD:
            bias += tl.load(weights_ptr + (M + 1) * D + d, mask=d < D, other=0.0)[None, :]
            bias += tl.load(inside_ptr + K * D + d, mask=d < D, other=0.0)[None, :] * edge
        place = p[:, None] * D + d_row
        pair = item // tiles * slab_pairs
        last = tl.minimum(pair + slab_pairs, B * groups)
        while pair < last:
            start, first, within = _group(pair, tile, T, S, P, groups, D, K, PLACES, CHANNELS)
            t = start + p
            if within:
                y = _filtered(bias, taps, x_ptr + first + place, t, mask, T, D, K, False)
            else:
                y = _filtered(bias, taps, x_ptr + first + place, t, mask, T, D, K, True)
            tl.store(y_ptr + first + place, y, mask=mask & (t < T)[:, None])
            pair += 1
        item += tl.num_programs(0)


@triton.jit
def _add_products(products, dy, x_ptrs, t, mask, T, D: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    sums = ()
    for k in tl.static_range(K):
        sums += (products[k] + dy * _frames(x_ptrs, k - K // 2, t, mask, T, D, MASKED),)
    return sums


@triton.jit(do_not_specialize=ANY_COUNT)
def _products_kernel(  # type: ignore[no-untyped-def]
    x_ptr, dy_ptr, products_ptr, chunk_ptr, B, T,
    D: tl.constexpr, K: tl.constexpr, PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums Σ dy_t·x_{t+k-M} and, for k = K, Σ dy_t over the frames t at place p in the groups of each slab.

    The gradients of all weights are sums of these: p and k alone say whether frame t+k-M is in the chunk of frame t.
    They lie in slabs·P rows of (K + 1, D).
    """
    _C, S, P, tiles, slabs = _sizes(chunk_ptr, T, tl.num_programs(0), PLACES)
    groups = tl.cdiv(T, S)
    slab_pairs = tl.cdiv(B * groups, slabs)
    item = tl.program_id(0)
    while item < tiles * slabs:
        tile, slab = item % tiles, item // tiles
        p, d, mask = _tile(tile, P, D, PLACES, CHANNELS)
        place = p[:, None] * D + d[None, :]
        total = tl.zeros((PLACES, CHANNELS), tl.float32)
        products = ()
        for _k in tl.static_range(K):
            products += (total,)
        pair = slab * slab_pairs
        last = tl.minimum(pair + slab_pairs, B * groups)
        while pair < last:
            start, first, within = _group(pair, tile, T, S, P, groups, D, K, PLACES, CHANNELS)
            t = start + p
            dy = tl.load(dy_ptr + first + place, mask=mask & (t < T)[:, None], other=0.0).to(tl.float32)
            if within:
                products = _add_products(products, dy, x_ptr + first + place, t, mask, T, D, K, False)
            else:
                products = _add_products(products, dy, x_ptr + first + place, t, mask, T, D, K, True)
            total += dy
            pair += 1
        out = products_ptr + (slab * P + p)[:, None] * ((K + 1) * D) + d[None, :]
        for k in tl.static_range(K):
            tl.store(out + k * D, products[k], mask=mask)
        tl.store(out + K * D, total, mask=mask)
        item += tl.num_programs(0)


@triton.jit(do_not_specialize=ANY_COUNT)
def _weight_gradient_kernel(  # type: ignore[no-untyped-def]
    products_ptr, weights_ptr, chunk_ptr, dscale_ptr, dcausal_ptr, dcausal_bias_ptr, dinside_ptr, dinside_bias_ptr,
    T, programs, D: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums the products into the gradients of one tap or of the biases, or into the gradient of one place of an edge.

    TAPS is the least power of 2 that is at least K + 1, and ROWS is a multiple of it.
    """
    M: tl.constexpr = K // 2
    C, S, P, _tiles, slabs = _sizes(chunk_ptr, T, programs, PLACES)
    d = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    d_row, d_mask = d[None, :], (d < D)[None, :]
    row = tl.arange(0, ROWS)
    plain = tl.zeros((ROWS, CHANNELS), tl.float32)
    weighted = plain
    done = 0
    if tl.program_id(1) <= K:
        k = tl.program_id(1)
        while done < slabs * P:
            i = done + row
            q = (i % P % C)[:, None]
            mask = (i < slabs * P)[:, None] & d_mask
            same = mask & (((q + k >= M) & (q + k < M + C)) | (k == K))
            product = tl.load(products_ptr + (i * (K + 1) + k)[:, None] * D + d_row, mask=mask, other=0.0)
            plain += product
            weighted += tl.where(same, product * _edge(weights_ptr, q, d_row, C, same, D, K), 0.0)
            done += ROWS
        causal, inside = tl.sum(plain, axis=0), tl.sum(weighted, axis=0)
        tl.store(dcausal_ptr + d * (M + 1) + k, causal, mask=(d < D) & (k <= M))
        tl.store(dcausal_bias_ptr + d, causal, mask=(d < D) & (k == K))
        tl.store(dinside_ptr + d * K + k, inside, mask=(d < D) & (k < K))
        tl.store(dinside_bias_ptr + d, inside, mask=(d < D) & (k == K))
    else:
        edge = tl.program_id(1) - (K + 1)
        # Chunks shorter than the kernel do not use all numbers of the edges. The gradient of the others is 0.
        q = tl.where(edge < K, edge, C - 2 * K + edge)
        members = tl.where((q >= 0) & (q < C), slabs * (S // C), 0)  # each group of a slab has this place once a chunk
        ks = row % TAPS
        same = ((q + ks >= M) & (q + ks < M + C) & (ks < K)) | (ks == K)
        tap = tl.load(weights_ptr + (M + 2 + ks)[:, None] * D + d_row, mask=same[:, None] & d_mask, other=0.0)
        while done < members:
            member = done + row // TAPS
            p = q + member % (S // C) * C
            mask = ((ks <= K) & (member < members) & (p < P))[:, None] & d_mask
            i = member // (S // C) * P + p
            product = tl.load(products_ptr + (i * (K + 1) + ks)[:, None] * D + d_row, mask=mask, other=0.0)
            weighted += product * tap
            done += ROWS // TAPS
        tl.store(dscale_ptr + (edge // K * D + d) * K + edge % K, tl.sum(weighted, axis=0), mask=d < D)


class _ChunkCausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, chunk: Tensor, *weights: Tensor) -> Tensor:
        (B, T, D), K = x_BTD.shape, weights[0].shape[2]
        tiles = triton.cdiv(D, CHANNELS)
        weights_WD = torch.empty(K // 2 + 3 * K + 3, D, device=x_BTD.device)
        _arrange_kernel[(len(weights_WD), tiles)](
            *(w.contiguous() for w in weights), weights_WD, D, K=K, CHANNELS=CHANNELS, num_warps=1
        )
        programs = max(1, min(WARPS // PLACES // tiles, B * triton.cdiv(T, PLACES)))
        ctx.grid, ctx.shapes = (programs, tiles), [w.shape for w in weights]
        ctx.constants = dict(D=D, K=K, PLACES=PLACES, CHANNELS=CHANNELS, num_warps=PLACES, maxnreg=MAX_REGISTERS)
        y_BTD = torch.empty_like(x_BTD)
        _convolve_kernel[ctx.grid](x_BTD, weights_WD, y_BTD, chunk, B, T, BACKWARD=False, **ctx.constants)
        ctx.save_for_backward(x_BTD, weights_WD, chunk)
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weights_WD, chunk = ctx.saved_tensors
        (B, T, D), K, (programs, _) = x_BTD.shape, ctx.constants["K"], ctx.grid
        dy_BTD = grads[0].contiguous()
        dx_BTD = torch.empty_like(x_BTD)
        _convolve_kernel[ctx.grid](dy_BTD, weights_WD, dx_BTD, chunk, B, T, BACKWARD=True, **ctx.constants)
        products = weights_WD.new_empty(max(programs * PLACES, T), K + 1, D)
        _products_kernel[ctx.grid](x_BTD, dy_BTD, products, chunk, B, T, **ctx.constants)
        dweights = [weights_WD.new_empty(shape) for shape in ctx.shapes]
        taps = triton.next_power_of_2(K + 1)
        _weight_gradient_kernel[(triton.cdiv(D, SUM_CHANNELS), K + 1 + 2 * K)](
            *(products, weights_WD, chunk, *dweights, T, programs),
            **dict(D=D, K=K, TAPS=taps, PLACES=PLACES, ROWS=max(SUM_ROWS, taps), CHANNELS=SUM_CHANNELS, num_warps=8),
        )
        return dx_BTD, None, *dweights


def chunk_causal_conv(
    x_BTD: Tensor,
    chunk: Tensor,
    scale_2DK: Tensor,
    causal_D1L: Tensor,
    causal_bias_D: Tensor,
    inside_D1K: Tensor,
    inside_bias_D: Tensor,
) -> Tensor:
    """Returns y (B, T, D) in the type of x. Sums are in float32.

    Args:
        x_BTD: in any floating-point type.
        chunk: C, in frames, as one integer on the device; below 0 for all frames.
        scale_2DK: what is added to 1 near the left and near the right edge of a chunk. All weights are in float32.
        causal_D1L, causal_bias_D: weights of the causal convolution.
        inside_D1K, inside_bias_D: weights of the convolution inside the chunk.
    """
    weights = (scale_2DK, causal_D1L, causal_bias_D, inside_D1K, inside_bias_D)
    y_BTD: Tensor = _ChunkCausalConv.apply(x_BTD.contiguous(), chunk, *weights)
    return y_BTD

"""These kernels compute attention weights: one in the forward pass, three in the backward pass.

    weights_tk = softmax_k(query_t·key_k + (1 - skip)·pos_query_t·pos_key_{k-t+T-1})

Scores of hidden keys are -1000. The kernels read the projections as they lie in memory, with the heads' parts side by
side. Each query sees the keys of one span. A program skips blocks of keys that none of its queries sees. The backward
pass computes the scores again, so that they need not be kept. A query with an empty span gives all keys equal weights,
as equal scores of -1000 would.

Shapes: B batch, H heads, T queries, K keys, P = K + T - 1 relative positions, Q query dimension of all heads, D of one
head, Y position-query dimension of all heads, X of one head, S elements of a row of weights in memory: K rounded up to
a multiple of 16.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.dispatch import FEW_NUMBERS

# Sizes of a program's tile (PLACES are relative positions), and its warps. With these, hardly any registers spill.
QUERIES, KEYS, PLACES, WARPS = 64, 32, 32, 8
# Triton would turn a length of 1 into a constant, whose type is not the type that loops count in.
UNSPECIALIZED = (*FEW_NUMBERS, "T", "K")


def row_length(keys: int) -> int:
    """Returns the elements of a row of weights in memory: a multiple of 16, so that loads and products are aligned."""
    return -(-keys // 16) * 16


@triton.jit
def spans(first_ptr, end_ptr, b, t, T, K):  # type: ignore[no-untyped-def]
    """Returns the first visible key and the end of the visible keys of each query, then the extremes over the block."""
    inside = t < T
    first = tl.load(first_ptr + b * T + t, mask=inside, other=K)
    end = tl.load(end_ptr + b * T + t, mask=inside, other=0)
    return first, end, tl.min(first, axis=0), tl.max(end, axis=0)


@triton.jit
def _written_spans(first_ptr, end_ptr, acts_ptr, b, t, T, K):  # type: ignore[no-untyped-def]
    """Returns `spans` of the keys whose scores have a gradient: all keys if the penalty acts, since it acts on all."""
    acts = tl.load(acts_ptr)
    inside = t < T
    first = tl.where(acts > 0, 0, tl.load(first_ptr + b * T + t, mask=inside, other=K))
    end = tl.where(inside, tl.where(acts > 0, K, tl.load(end_ptr + b * T + t, mask=inside, other=0)), 0)
    return first, end, tl.min(first, axis=0), tl.max(end, axis=0)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    query, pos_query, key_ptr, pos_key_ptr, t, k, key_k, T, K,
    D: tl.constexpr, X: tl.constexpr, D_PAD: tl.constexpr, X_PAD: tl.constexpr,
):  # fmt: skip
    """Returns a tile of one head's scores before masking, and the keys (D, K) and position keys (T, K, X) for it."""
    d, x = tl.arange(0, D_PAD), tl.arange(0, X_PAD)
    key = tl.load(key_ptr + k[None, :] * key_k + d[:, None], mask=(k < K)[None, :] & (d < D)[:, None], other=0.0)
    inside = (t < T)[:, None] & (k < K)[None, :]
    place = k[None, :] - t[:, None] + T - 1
    pos_mask = inside[:, :, None] & (x < X)[None, None, :]
    pos_key = tl.load(pos_key_ptr + place[:, :, None] * X + x[None, None, :], mask=pos_mask, other=0.0).to(tl.float32)
    scores = tl.dot(query, key, input_precision="ieee") + tl.sum(pos_query[:, None, :] * pos_key, axis=2)
    return scores, key, pos_key


@triton.jit
def _start(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, pos_query_ptr, pos_key_ptr, skip_ptr,
    query_b, query_t, key_b, pos_query_b, pos_query_t, T, K,
    H: tl.constexpr, D: tl.constexpr, X: tl.constexpr, D_PAD: tl.constexpr, X_PAD: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Loads the program's queries, and finds where the keys of its batch element and head begin."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    t, d, x = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D_PAD), tl.arange(0, X_PAD)
    query_ptr += b.to(tl.int64) * query_b + h * D
    query_mask = (t < T)[:, None] & (d < D)[None, :]
    query = tl.load(query_ptr + t[:, None] * query_t + d[None, :], mask=query_mask, other=0.0)
    pos_query_ptr += b.to(tl.int64) * pos_query_b + h * X
    pos_query_mask = (t < T)[:, None] & (x < X)[None, :]
    pos_query = tl.load(pos_query_ptr + t[:, None] * pos_query_t + x[None, :], mask=pos_query_mask, other=0.0)
    pos_query = pos_query.to(tl.float32) * (1.0 - tl.load(skip_ptr))
    return b, t, query, pos_query, key_ptr + b.to(tl.int64) * key_b + h * D, pos_key_ptr + h * X * (K + T - 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, pos_query_ptr, pos_key_ptr, skip_ptr, first_ptr, end_ptr, weights_ptr, norm_ptr,
    query_b, query_t, key_b, key_k, pos_query_b, pos_query_t, T, K, S, H: tl.constexpr, D: tl.constexpr,
    X: tl.constexpr, D_PAD: tl.constexpr, X_PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    b, t, query, pos_query, key_ptr, pos_key_ptr = _start(
        query_ptr, key_ptr, pos_query_ptr, pos_key_ptr, skip_ptr,
        query_b, query_t, key_b, pos_query_b, pos_query_t, T, K, H, D, X, D_PAD, X_PAD, QUERIES,
    )  # fmt: skip
    first, end, low, high = spans(first_ptr, end_ptr, b, t, T, K)
    low = low // KEYS * KEYS
    top = tl.full((QUERIES,), -1e30, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    begin = low
    while begin < high:
        k = begin + tl.arange(0, KEYS)
        scores, _key, _pos_key = _scores(
            query, pos_query, key_ptr, pos_key_ptr, t, k, key_k, T, K, D, X, D_PAD, X_PAD
        )  # fmt: skip
        visible = (k[None, :] >= first[:, None]) & (k[None, :] < end[:, None])
        scores = tl.where(visible, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(scores - new_top[:, None]), axis=1)
        top = new_top
        begin += KEYS
    sightless = end <= first
    norm = tl.where(sightless, 0.0, top + tl.log(tl.where(sightless, 1.0, total)))
    bh = tl.program_id(1).to(tl.int64)
    tl.store(norm_ptr + bh * T + t, norm, mask=t < T)
    weights_ptr += bh * T * S
    hidden_weight = tl.where(sightless, 1.0 / K, 0.0)
    begin = low * 0
    while begin < K:
        k = begin + tl.arange(0, KEYS)
        weights = hidden_weight[:, None] + tl.zeros((QUERIES, KEYS), tl.float32)
        if (begin >= low) & (begin < high):
            scores, _key, _pos_key = _scores(
                query, pos_query, key_ptr, pos_key_ptr, t, k, key_k, T, K, D, X, D_PAD, X_PAD
            )  # fmt: skip
            visible = (k[None, :] >= first[:, None]) & (k[None, :] < end[:, None])
            weights += tl.exp(tl.where(visible, scores - norm[:, None], -float("inf")))
        tl.store(
            weights_ptr + t[:, None] * S + k[None, :], weights.to(weights_ptr.dtype.element_ty),
            mask=(t < T)[:, None] & (k < S)[None, :],  # also writes what lies between K and S, so that stores are wide
        )  # fmt: skip
        begin += KEYS


@triton.jit
def _dweights(  # type: ignore[no-untyped-def]
    dweights1_ptr, dweights2_ptr, dfirst_head_ptr, t, k, visible, T, K, H: tl.constexpr, FIRST_HEAD: tl.constexpr
):  # fmt: skip
    """Returns the gradient of a tile of weights, summed over all that use them; 0 where a key is hidden."""
    b, h, place = tl.program_id(1) // H, tl.program_id(1) % H, t[:, None] * K + k[None, :]
    of_head = tl.program_id(1).to(tl.int64) * T * K
    dweights = tl.load(dweights1_ptr + of_head + place, mask=visible, other=0.0).to(tl.float32)
    dweights += tl.load(dweights2_ptr + of_head + place, mask=visible, other=0.0).to(tl.float32)
    if FIRST_HEAD:
        pointers = dfirst_head_ptr + b.to(tl.int64) * T * K + place
        dweights += tl.load(pointers, mask=visible & (h == 0), other=0.0).to(tl.float32)
    return dweights


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _query_gradient_kernel(  # type: ignore[no-untyped-def]
    query_ptr, key_ptr, pos_query_ptr, pos_key_ptr, skip_ptr, first_ptr, end_ptr, weights_ptr, norm_ptr, acts_ptr,
    dweights1_ptr, dweights2_ptr, dfirst_head_ptr, dscores_ptr, dquery_ptr, dpos_query_ptr, query_b, query_t, key_b,
    key_k, pos_query_b, pos_query_t, T, K, S, limit, penalty, FIRST_HEAD: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, X: tl.constexpr, D_PAD: tl.constexpr, X_PAD: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of the scores, written where they may differ from 0, and of the program's queries."""
    b, t, query, pos_query, key_ptr, pos_key_ptr = _start(
        query_ptr, key_ptr, pos_query_ptr, pos_key_ptr, skip_ptr,
        query_b, query_t, key_b, pos_query_b, pos_query_t, T, K, H, D, X, D_PAD, X_PAD, QUERIES,
    )  # fmt: skip
    first, end, low, high = spans(first_ptr, end_ptr, b, t, T, K)
    low = low // KEYS * KEYS
    h, bh = tl.program_id(1) % H, tl.program_id(1).to(tl.int64)
    norm = tl.load(norm_ptr + bh * T + t, mask=t < T, other=0.0)
    delta = tl.zeros((QUERIES,), tl.float32)
    weights_ptr += bh * T * S
    begin = low
    while begin < high:
        k = begin + tl.arange(0, KEYS)
        visible = (k[None, :] >= first[:, None]) & (k[None, :] < end[:, None])
        dweights = _dweights(dweights1_ptr, dweights2_ptr, dfirst_head_ptr, t, k, visible, T, K, H, FIRST_HEAD)
        weights = tl.load(weights_ptr + t[:, None] * S + k[None, :], mask=visible, other=0.0).to(tl.float32)
        delta += tl.sum(weights * dweights, axis=1)
        begin += KEYS
    acts = tl.load(acts_ptr)
    if acts > 0:  # the penalty acts on the scores of hidden keys as well
        low, high = low * 0, high * 0 + K
    dquery = tl.zeros((QUERIES, D_PAD), tl.float32)
    dpos_query = tl.zeros((QUERIES, X_PAD), tl.float32)
    dscores_ptr += bh * T * S
    begin = low
    while begin < high:
        k = begin + tl.arange(0, KEYS)
        scores, key, pos_key = _scores(
            query, pos_query, key_ptr, pos_key_ptr, t, k, key_k, T, K, D, X, D_PAD, X_PAD
        )  # fmt: skip
        inside = (t < T)[:, None] & (k < K)[None, :]
        visible = (k[None, :] >= first[:, None]) & (k[None, :] < end[:, None])
        dweights = _dweights(dweights1_ptr, dweights2_ptr, dfirst_head_ptr, t, k, visible, T, K, H, FIRST_HEAD)
        weights = tl.exp(tl.where(visible, scores - norm[:, None], -float("inf")))
        dscores = weights * (dweights - delta[:, None])
        beyond = tl.where(scores > limit, 1.0, tl.where(scores < -limit, -1.0, 0.0))
        dscores += tl.where(inside, acts * penalty * beyond, 0.0)
        tl.store(
            dscores_ptr + t[:, None] * S + k[None, :], dscores.to(dscores_ptr.dtype.element_ty), mask=inside
        )  # fmt: skip
        dquery = tl.dot(dscores.to(key.dtype), tl.trans(key), dquery, input_precision="ieee")
        dpos_query += tl.sum(dscores[:, :, None] * pos_key, axis=1)
        begin += KEYS
    dpos_query *= 1.0 - tl.load(skip_ptr)
    row, d, x = b.to(tl.int64) * T + t, tl.arange(0, D_PAD), tl.arange(0, X_PAD)
    tl.store(
        dquery_ptr + (row * (H * D) + h * D)[:, None] + d[None, :], dquery.to(dquery_ptr.dtype.element_ty),
        mask=(t < T)[:, None] & (d < D)[None, :],
    )  # fmt: skip
    tl.store(
        dpos_query_ptr + (row * (H * X) + h * X)[:, None] + x[None, :],
        dpos_query.to(dpos_query_ptr.dtype.element_ty), mask=(t < T)[:, None] & (x < X)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _key_gradient_kernel(  # type: ignore[no-untyped-def]
    query_ptr, first_ptr, end_ptr, acts_ptr, dscores_ptr, dkey_ptr, query_b, query_t, T, K, S,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Computes dkey_k = Σ_t dscores_tk·query_t over the blocks of queries that see a key of the program's block."""
    b, h, bh = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(1).to(tl.int64)
    start, d = tl.program_id(0) * KEYS, tl.arange(0, D_PAD)
    k = start + tl.arange(0, KEYS)
    query_ptr += b.to(tl.int64) * query_b + h * D
    dscores_ptr += bh * T * S
    dkey = tl.zeros((KEYS, D_PAD), tl.float32)
    begin = start * 0
    while begin < T:
        t = begin + tl.arange(0, QUERIES)
        first, end, low, high = _written_spans(first_ptr, end_ptr, acts_ptr, b, t, T, K)
        if (low < start + KEYS) & (high > start):
            written = (k[None, :] >= first[:, None]) & (k[None, :] < end[:, None])
            dscores = tl.load(dscores_ptr + t[:, None] * S + k[None, :], mask=written, other=0.0)
            query_mask = (t < T)[:, None] & (d < D)[None, :]
            query = tl.load(query_ptr + t[:, None] * query_t + d[None, :], mask=query_mask, other=0.0)
            dkey = tl.dot(tl.trans(dscores), query, dkey, input_precision="ieee")
        begin += QUERIES
    row = b.to(tl.int64) * K + k
    tl.store(
        dkey_ptr + (row * (H * D) + h * D)[:, None] + d[None, :], dkey.to(dkey_ptr.dtype.element_ty),
        mask=(k < K)[:, None] & (d < D)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _position_gradient_kernel(  # type: ignore[no-untyped-def]
    pos_query_ptr, skip_ptr, first_ptr, end_ptr, acts_ptr, dscores_ptr, dpos_key_ptr, pos_query_b, pos_query_t,
    T, K, S, H: tl.constexpr, X: tl.constexpr, X_PAD: tl.constexpr, QUERIES: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Computes dpos_key_p = Σ_t dscores_{t,p+t-T+1}·pos_query_t, separately for each batch element."""
    b, h, bh = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(1).to(tl.int64)
    start, x = tl.program_id(0) * PLACES, tl.arange(0, X_PAD)
    P = K + T - 1
    place = start + tl.arange(0, PLACES)
    pos_query_ptr += b.to(tl.int64) * pos_query_b + h * X
    dscores_ptr += bh * T * S
    dpos_key = tl.zeros((X_PAD, PLACES), tl.float32)
    # The range of queries that have keys at these positions.
    begin = tl.maximum(T - start - PLACES, 0) // QUERIES * QUERIES
    stop = tl.minimum(P - start, T)
    while begin < stop:
        t = begin + tl.arange(0, QUERIES)
        first, end, low, high = _written_spans(first_ptr, end_ptr, acts_ptr, b, t, T, K)
        least = start + begin - (T - 1)  # the first key of the tile
        if (low < least + PLACES + QUERIES) & (high > least):
            k = place[None, :] + t[:, None] - (T - 1)
            written = (k >= first[:, None]) & (k < end[:, None])
            dscores = tl.load(dscores_ptr + t[:, None] * S + k, mask=written, other=0.0)
            pos_query_mask = (x < X)[:, None] & (t < T)[None, :]
            pos_query = tl.load(pos_query_ptr + t[None, :] * pos_query_t + x[:, None], mask=pos_query_mask, other=0.0)
            dpos_key = tl.dot(pos_query, dscores, dpos_key, input_precision="ieee")
        begin += QUERIES
    keep = 1.0 - tl.load(skip_ptr)
    pointers = dpos_key_ptr + (bh * P + place)[None, :] * X + x[:, None]
    tl.store(pointers, keep * dpos_key, mask=(x < X)[:, None] & (place < P)[None, :])


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BTQ: Tensor, key_BKQ: Tensor, pos_query_BTY: Tensor, pos_key_HPX: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        first_BT, end_BT, skip, ctx.acts, ctx.limit, ctx.penalty = rest
        (B, T, Q), K, (H, _, X) = query_BTQ.shape, key_BKQ.shape[1], pos_key_HPX.shape
        ctx.sizes = dict(T=T, K=K, S=row_length(K), H=H, QUERIES=QUERIES, num_warps=WARPS)
        ctx.content = dict(D=Q // H, D_PAD=max(16, triton.next_power_of_2(Q // H)))
        ctx.position = dict(X=X, X_PAD=triton.next_power_of_2(X))
        ctx.strides = [stride for x in (query_BTQ, key_BKQ, pos_query_BTY) for stride in x.stride()[:2]]
        weights_BHTS = query_BTQ.new_empty(B, H, T, ctx.sizes["S"])
        norm_BHT = query_BTQ.new_empty(B, H, T, dtype=torch.float32)
        inputs = (query_BTQ, key_BKQ, pos_query_BTY, pos_key_HPX, skip, first_BT, end_BT)
        _forward_kernel[(triton.cdiv(T, QUERIES), B * H)](
            *inputs, weights_BHTS, norm_BHT, *ctx.strides, **ctx.sizes, **ctx.content, **ctx.position, KEYS=KEYS
        )
        # skip and acts may be views of a tensor that other modules write to, which autograd would refuse to save.
        ctx.skip = skip
        ctx.save_for_backward(query_BTQ, key_BKQ, pos_query_BTY, pos_key_HPX, first_BT, end_BT, weights_BHTS, norm_BHT)
        ctx.set_materialize_grads(False)
        return weights_BHTS[..., :K], weights_BHTS[..., :K], weights_BHTS[:, 0, :, :K]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query_BTQ, key_BKQ, pos_query_BTY, pos_key_HPX, *span, weights_BHTS, norm_BHT = ctx.saved_tensors
        (B, T, _), (H, P, X), K = query_BTQ.shape, pos_key_HPX.shape, ctx.sizes["K"]
        shapes = ((B, H, T, K), (B, H, T, K), (1,))
        dweights = [
            query_BTQ.new_zeros(shape) if grad is None else grad.contiguous()
            for grad, shape in zip(grads, shapes, strict=True)
        ]
        dscores_BHTS = query_BTQ.new_empty(B, H, T, ctx.sizes["S"])
        dquery_BTQ, dkey_BKQ, dpos_query_BTY = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query_BTQ, key_BKQ, pos_query_BTY)
        )
        dpos_key_BHPX = pos_key_HPX.new_empty(B, H, P, X, dtype=torch.float32)
        _query_gradient_kernel[(triton.cdiv(T, QUERIES), B * H)](
            query_BTQ, key_BKQ, pos_query_BTY, pos_key_HPX, ctx.skip, *span, weights_BHTS, norm_BHT, ctx.acts,
            *dweights, dscores_BHTS, dquery_BTQ, dpos_query_BTY, *ctx.strides, limit=ctx.limit, penalty=ctx.penalty,
            FIRST_HEAD=grads[2] is not None, **ctx.sizes, **ctx.content, **ctx.position, KEYS=KEYS, maxnreg=128,
        )  # fmt: skip
        _key_gradient_kernel[(triton.cdiv(K, KEYS), B * H)](
            query_BTQ, *span, ctx.acts, dscores_BHTS, dkey_BKQ, *ctx.strides[:2],
            **ctx.sizes, **ctx.content, KEYS=KEYS,
        )  # fmt: skip
        _position_gradient_kernel[(triton.cdiv(P, PLACES), B * H)](
            pos_query_BTY, ctx.skip, *span, ctx.acts, dscores_BHTS, dpos_key_BHPX, *ctx.strides[4:],
            **ctx.sizes, X=X, X_PAD=max(16, ctx.position["X_PAD"]), PLACES=PLACES,
        )  # fmt: skip
        dpos_key_HPX = dpos_key_BHPX.sum(dim=0).to(pos_key_HPX.dtype)
        return dquery_BTQ, dkey_BKQ, dpos_query_BTY, dpos_key_HPX, *([None] * 6)


def attention_weights(
    query_BTQ: Tensor,
    key_BKQ: Tensor,
    pos_query_BTY: Tensor,
    pos_key_HPX: Tensor,
    span_2BT: Tensor,
    skip: Tensor,
    acts: Tensor,
    limit: float,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the attention weights in the type of the queries.

    Args:
        query_BTQ, key_BKQ, pos_query_BTY: the heads' parts lie side by side; the last stride is 1, others are free.
        pos_key_HPX: keys of the relative positions in ascending order; contiguous.
        span_2BT: the first visible key of each query, and the end of its visible keys; int32, contiguous.
        skip: 1 to leave the positions out, else 0; a scalar on the device.
        acts: 1 to add the gradient of the penalty, else 0; a scalar on the device.
        limit, penalty: the penalty is penalty · Σ max(0, |score| - limit).

    Returns:
        The weights (B, H, T, K) twice, and the weights of the first head (B, T, K). All are views of one memory, whose
        rows lie a multiple of 16 elements apart. They are three outputs because three modules use them: the backward
        pass adds up the three gradients. It does not read gradients of the weights of hidden keys.
    """
    weights: tuple[Tensor, Tensor, Tensor] = _AttentionWeights.apply(
        query_BTQ, key_BKQ, pos_query_BTY, pos_key_HPX, *span_2BT, skip, acts, limit, penalty
    )
    return weights

"""Attention weights from the two products that make the scores, in one kernel each way.

    weights_k = softmax_k(content_tk + position_t,k-t+T-1), with masked scores -1000

PyTorch reads and writes scores ten times for it: the shift of the positions, the sum, a cast, two masks, the softmax
and a cast back. The backward pass makes the softmax anew from the same products.

Shapes: B batch, H heads, T queries, K keys, P = K + T - 1 relative positions.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MASKED_SCORE = tl.constexpr(-1000.0)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    content_ptr, position_ptr, chunk_ptr, padding_ptr, chunk_t, chunk_k, padding_b, padding_k,
    row, b, t, k, T, K, CHUNKED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A row of scores before the masks, and where it is masked."""
    inside = k < K
    scores = tl.load(content_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
    shifted = row * (K + T - 1) + k - t + T - 1
    scores += tl.load(position_ptr + shifted, mask=inside, other=0.0).to(tl.float32)
    hidden = k < 0
    if CHUNKED:
        hidden = hidden | (tl.load(chunk_ptr + t * chunk_t + k * chunk_k, mask=inside, other=0) != 0)
    if PADDED:
        hidden = hidden | (tl.load(padding_ptr + b * padding_b + k * padding_k, mask=inside, other=0) != 0)
    return scores, hidden, inside


@triton.jit
def _softmax(scores, hidden, inside):  # type: ignore[no-untyped-def]
    scores = tl.where(inside, tl.where(hidden, MASKED_SCORE, scores), -float("inf"))
    e = tl.exp(scores - tl.max(scores, axis=0))
    return e / tl.sum(e, axis=0)


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    content_ptr, position_ptr, chunk_ptr, padding_ptr, weights_ptr, chunk_t, chunk_k, padding_b, padding_k,
    H, T, K, CHUNKED: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t, k = row // (H * T), row % T, tl.arange(0, KEYS)
    scores, hidden, inside = _scores(
        content_ptr, position_ptr, chunk_ptr, padding_ptr, chunk_t, chunk_k, padding_b, padding_k,
        row, b, t, k, T, K, CHUNKED, PADDED,
    )  # fmt: skip
    tl.store(weights_ptr + row * K + k, _softmax(scores, hidden, inside), mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    content_ptr, position_ptr, chunk_ptr, padding_ptr, dweights_ptr, penalty_ptr, dcontent_ptr, dposition_ptr,
    chunk_t, chunk_k, padding_b, padding_k, limit,
    H, T, K, CHUNKED: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t, k = row // (H * T), row % T, tl.arange(0, KEYS)
    scores, hidden, inside = _scores(
        content_ptr, position_ptr, chunk_ptr, padding_ptr, chunk_t, chunk_k, padding_b, padding_k,
        row, b, t, k, T, K, CHUNKED, PADDED,
    )  # fmt: skip
    weights = _softmax(scores, hidden, inside)
    dweights = tl.load(dweights_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
    dscores = weights * (dweights - tl.sum(weights * dweights, axis=0))
    dscores = tl.where(hidden, 0.0, dscores)
    beyond = tl.where(scores > limit, 1.0, tl.where(scores < -limit, -1.0, 0.0))
    dscores += tl.load(penalty_ptr) * beyond
    tl.store(dcontent_ptr + row * K + k, dscores, mask=inside)
    P = K + T - 1
    first = T - 1 - t  # position of the first key; those before it, and t after the last key, are of no key
    tl.store(dposition_ptr + row * P + first + k, dscores, mask=inside)
    zeros = tl.zeros((KEYS,), tl.float32)
    done = 0
    while done < T - 1:
        i = done + k
        place = tl.where(i < first, i, i + K)
        tl.store(dposition_ptr + row * P + place, zeros, mask=i < T - 1)
        done += KEYS


class _AttentionWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, content_BHTK: Tensor, position_BHTP: Tensor, *rest: Any) -> Tensor:
        chunk_mask_TK, padding_mask_BK, limit, penalty = rest
        B, H, T, K = content_BHTK.shape
        chunk = content_BHTK.new_zeros(1, 1) if chunk_mask_TK is None else chunk_mask_TK.view(torch.uint8)
        padding = content_BHTK.new_zeros(1, 1) if padding_mask_BK is None else padding_mask_BK.view(torch.uint8)
        ctx.strides = (*chunk.stride(), *padding.stride())
        ctx.sizes = dict(
            H=H,
            T=T,
            K=K,
            CHUNKED=chunk_mask_TK is not None,
            PADDED=padding_mask_BK is not None,
            KEYS=triton.next_power_of_2(K),
        )
        weights_BHTK = torch.empty_like(content_BHTK)
        _forward_kernel[(B * H * T,)](
            content_BHTK, position_BHTP, chunk, padding, weights_BHTK, *ctx.strides, **ctx.sizes
        )
        ctx.save_for_backward(content_BHTK, position_BHTP, chunk, padding, penalty)
        ctx.limit = limit
        return weights_BHTK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        content_BHTK, position_BHTP, chunk, padding, penalty = ctx.saved_tensors
        dcontent_BHTK, dposition_BHTP = torch.empty_like(content_BHTK), torch.empty_like(position_BHTP)
        B, H, T, _ = content_BHTK.shape
        _backward_kernel[(B * H * T,)](
            content_BHTK, position_BHTP, chunk, padding, grads[0].contiguous(), penalty,
            dcontent_BHTK, dposition_BHTP, *ctx.strides, ctx.limit, **ctx.sizes,
        )  # fmt: skip
        return dcontent_BHTK, dposition_BHTP, None, None, None, None


def attention_weights(
    content_BHTK: Tensor,
    position_BHTP: Tensor,
    chunk_mask_TK: Tensor | None,
    padding_mask_BK: Tensor | None,
    limit: float,
    penalty: Tensor,
) -> Tensor:
    """Weights (B, H, T, K) in the type of the scores.

    Args:
        content_BHTK: scores of keys; T is at least 2 (Triton fails to compile the backward pass for T = 1).
        position_BHTP: scores of relative positions, ascending.
        chunk_mask_TK, padding_mask_BK: True where a key is hidden; of any strides, or None.
        limit, penalty: the gradient of penalty · Σ max(0, |score| - limit) is added; penalty is a scalar on the device.
    """
    weights_BHTK: Tensor = _AttentionWeights.apply(
        content_BHTK.contiguous(), position_BHTP.contiguous(), chunk_mask_TK, padding_mask_BK, limit, penalty
    )
    return weights_BHTK

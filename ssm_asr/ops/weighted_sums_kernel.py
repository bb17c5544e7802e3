"""These kernels sum values with attention weights: one in the forward pass, two in the backward pass.

    mixed_t = Σ_k weights_tk·value_k for each head

A program reads only blocks of keys that some of its queries sees, because all other weights are 0. The exception is a
query that sees no key: it gives all keys equal weights (see ssm_asr.ops.attention_kernel). Values are read and written
as in projections, with the heads' parts side by side.

Shapes: B batch, H heads, T queries, K keys, V value dimension of all heads, D of one head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssm_asr.ops.attention_kernel import UNSPECIALIZED, spans

QUERIES, KEYS, WARPS = 64, 64, 4  # sizes of a program's tile, and its warps


@triton.jit
def _read_keys(first_ptr, end_ptr, b, t, T, K):  # type: ignore[no-untyped-def]
    """Returns the first key with a weight and the end of the keys with weights, over a block of queries."""
    first, end, low, high = spans(first_ptr, end_ptr, b, t, T, K)
    blind = tl.max(tl.where(t < T, tl.where(end <= first, 1, 0), 0), axis=0)
    return tl.where(blind > 0, 0, low), tl.where(blind > 0, K, high)


@triton.jit
def _part(ptr, b, h, row, length, row_stride, d, D):  # type: ignore[no-untyped-def]
    """Returns pointers to rows of one head's part of a tensor (B, length, H·D), and their mask.

    Batch elements must follow each other in memory.
    """
    pointers = ptr + b.to(tl.int64) * length * row_stride + row[:, None] * row_stride + h * D + d[None, :]
    return pointers, (row < length)[:, None] & (d < D)[None, :]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward_kernel(  # type: ignore[no-untyped-def]
    weights_ptr, value_ptr, first_ptr, end_ptr, mixed_ptr, weights_b, weights_h, weights_t, T, K,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    t, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D_PAD)
    weights_ptr += b.to(tl.int64) * weights_b + h.to(tl.int64) * weights_h
    low, high = _read_keys(first_ptr, end_ptr, b, t, T, K)
    mixed = tl.zeros((QUERIES, D_PAD), tl.float32)
    begin = low // KEYS * KEYS
    while begin < high:
        k = begin + tl.arange(0, KEYS)
        inside = (t < T)[:, None] & (k < K)[None, :]
        weights = tl.load(weights_ptr + t[:, None] * weights_t + k[None, :], mask=inside, other=0.0)
        pointers, mask = _part(value_ptr, b, h, k, K, H * D, d, D)
        mixed = tl.dot(weights, tl.load(pointers, mask=mask, other=0.0), mixed, input_precision="ieee")
        begin += KEYS
    pointers, mask = _part(mixed_ptr, b, h, t, T, H * D, d, D)
    tl.store(pointers, mixed.to(mixed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _value_gradient_kernel(  # type: ignore[no-untyped-def]
    weights_ptr, dmixed_ptr, first_ptr, end_ptr, dvalue_ptr, weights_b, weights_h, weights_t, T, K,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    b, h, start = tl.program_id(1) // H, tl.program_id(1) % H, tl.program_id(0) * KEYS
    k, d = start + tl.arange(0, KEYS), tl.arange(0, D_PAD)
    weights_ptr += b.to(tl.int64) * weights_b + h.to(tl.int64) * weights_h
    dvalue = tl.zeros((KEYS, D_PAD), tl.float32)
    begin = start * 0
    while begin < T:
        t = begin + tl.arange(0, QUERIES)
        low, high = _read_keys(first_ptr, end_ptr, b, t, T, K)
        if (low < start + KEYS) & (high > start):
            inside = (t < T)[:, None] & (k < K)[None, :]
            weights = tl.load(weights_ptr + t[:, None] * weights_t + k[None, :], mask=inside, other=0.0)
            pointers, mask = _part(dmixed_ptr, b, h, t, T, H * D, d, D)
            dmixed = tl.load(pointers, mask=mask, other=0.0)
            dvalue = tl.dot(tl.trans(weights), dmixed, dvalue, input_precision="ieee")
        begin += QUERIES
    pointers, mask = _part(dvalue_ptr, b, h, k, K, H * D, d, D)
    tl.store(pointers, dvalue.to(dvalue_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _weights_gradient_kernel(  # type: ignore[no-untyped-def]
    dmixed_ptr, value_ptr, first_ptr, end_ptr, dweights_ptr, T, K,
    H: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    t, d = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES), tl.arange(0, D_PAD)
    _first, _end, low, high = spans(first_ptr, end_ptr, b, t, T, K)
    pointers, mask = _part(dmixed_ptr, b, h, t, T, H * D, d, D)
    dmixed = tl.load(pointers, mask=mask, other=0.0)
    dweights_ptr += tl.program_id(1).to(tl.int64) * T * K
    begin = low // KEYS * KEYS
    while begin < high:
        k = begin + tl.arange(0, KEYS)
        pointers, mask = _part(value_ptr, b, h, k, K, H * D, d, D)
        dweights = tl.dot(dmixed, tl.trans(tl.load(pointers, mask=mask, other=0.0)), input_precision="ieee")
        inside = (t < T)[:, None] & (k < K)[None, :]
        dweights = dweights.to(dweights_ptr.dtype.element_ty)
        tl.store(dweights_ptr + t[:, None] * K + k[None, :], dweights, mask=inside)
        begin += KEYS


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_BHTK: Tensor, value_BKV: Tensor, first_BT: Tensor, end_BT: Tensor) -> Tensor:
        (B, H, T, K), V = weights_BHTK.shape, value_BKV.shape[2]
        ctx.sizes = dict(
            T=T, K=K, H=H, D=V // H, D_PAD=max(16, triton.next_power_of_2(V // H)),
            QUERIES=QUERIES, KEYS=KEYS, num_warps=WARPS,
        )  # fmt: skip
        mixed_BTV = value_BKV.new_empty(B, T, V)
        _forward_kernel[(triton.cdiv(T, QUERIES), B * H)](
            weights_BHTK, value_BKV, first_BT, end_BT, mixed_BTV, *weights_BHTK.stride()[:3], **ctx.sizes
        )
        ctx.save_for_backward(weights_BHTK, value_BKV, first_BT, end_BT)
        return mixed_BTV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights_BHTK, value_BKV, first_BT, end_BT = ctx.saved_tensors
        (B, H, T, K), dmixed_BTV = weights_BHTK.shape, grads[0].contiguous()
        dvalue_BKV = torch.empty_like(value_BKV)
        _value_gradient_kernel[(triton.cdiv(K, KEYS), B * H)](
            weights_BHTK, dmixed_BTV, first_BT, end_BT, dvalue_BKV, *weights_BHTK.stride()[:3], **ctx.sizes
        )
        dweights_BHTK = weights_BHTK.new_empty(B, H, T, K)
        _weights_gradient_kernel[(triton.cdiv(T, QUERIES), B * H)](
            dmixed_BTV, value_BKV, first_BT, end_BT, dweights_BHTK, **ctx.sizes
        )
        return dweights_BHTK, dvalue_BKV, None, None


def weighted_sums(weights_BHTK: Tensor, value_BKV: Tensor, span_2BT: Tensor) -> Tensor:
    """Returns the weighted sums (B, T, V) in the type of the values.

    The gradient of the weights is meant for `attention_weights` alone. For keys that a query does not see, it holds
    whatever was in memory; `attention_weights` does not read it there.

    Args:
        weights_BHTK: in the type of the values; the last stride is 1, others are free.
        value_BKV: the heads' parts lie side by side.
        span_2BT: the first visible key of each query, and the end of its visible keys; int32, contiguous.
    """
    mixed_BTV: Tensor = _WeightedSums.apply(weights_BHTK, value_BKV.contiguous(), *span_2BT)
    return mixed_BTV

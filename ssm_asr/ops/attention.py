"""Attention with relative positions, masked by chunks: which keys a query may see, the weights, the weighted sums.

Source: Yao et al. (arXiv 2310.11230), section 3.2. Left context may be any number of frames, 0 included.

Shapes: B batch, T frames (queries), L left-context frames kept from before, K = L + T keys, P = K + T - 1 relative
positions, H heads, Q query dim of all heads, Y position-query dim of all heads, X of one, V value dim of all heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ssm_asr.ops import dispatch
from ssm_asr.ops.numbers import Number, known_zero, on_device
from ssm_asr.ops.penalty import penalize_large
from ssm_asr.ops.precision import at_least_float32

MASKED_SCORE = -1000.0
LARGE_SCORE, LARGE_SCORE_PENALTY = 25.0, 1e-4
MOST_FRAMES = 2**30  # more than any sequence has, with room in 32 bits


class Context(NamedTuple):
    """Which keys each query may see. Both masks are True where a key is hidden.

    Attributes:
        chunk_mask_TK: hidden by the chunks and the left context, the same for the whole batch; None hides nothing, and
            stands beside a span, which says it all.
        padding_mask_BK: hidden as padding or, in streaming, as not yet filled; or None.
        span_2BT: of whole sequences, for kernels: the first visible key of each query and the end of those visible (no
            more than K), int32; where the end is not behind the first, none is visible.
    """

    chunk_mask_TK: Tensor | None
    padding_mask_BK: Tensor | None
    span_2BT: Tensor | None = None

    def every(self, factor: int) -> "Context":
        """The context of a stack that runs at a `factor` times lower frame rate."""
        chunk_TK, padding_BK, span_2BT = self
        return Context(
            chunk_TK if chunk_TK is None else chunk_TK[::factor, ::factor],
            padding_BK if padding_BK is None else padding_BK[:, ::factor],
            span_2BT if span_2BT is None else (span_2BT[..., ::factor] + factor - 1) // factor,
        )


def visible_left_context(chunk: int, left_context: int) -> int:
    """Left-context frames that a chunk sees: whole chunks, at least one, but none if the left context is 0.

    A left context of -1 is all frames. A chunk of -1 holds all frames, and so has none to its left.
    """
    if chunk < 0 or not left_context:
        return 0
    return chunk * (max(1, left_context // chunk) if left_context > 0 else MOST_FRAMES // chunk)


def context_of_sequences(
    x_BTD: Tensor, lens_B: Tensor, chunk: int, left_context: int | Tensor, *, spans: bool = True
) -> Context:
    """The context of whole sequences, of which chunks see themselves and their left context.

    Args:
        x_BTD: the sequences, for their number of frames and their device.
        lens_B: how many frames of each are not padding.
        chunk: in frames; -1 for all.
        left_context: in frames; -1 for all. A tensor is a number on the device that `visible_left_context` gave.
        spans: whether `attention_weights` and `weighted_sums` use the context, which then carries what they need.
    """
    T, device = x_BTD.shape[1], x_BTD.device
    padding_mask_BK = torch.arange(T, device=device) >= lens_B[:, None]
    if spans and dispatch.use_kernels(x_BTD):
        return Context(None, padding_mask_BK, visible_span(lens_B, T, chunk, left_context))
    return Context(chunk_mask(T, chunk, left_context, device), padding_mask_BK)


def context_of_chunk(frames: int, left_context: int, processed_B: Tensor | None) -> Context:
    """The context of a chunk of `frames` after the left context, which fills from its end as a stream grows older.

    Args:
        processed_B: frames that each stream has had before this chunk; may be None without left context.
    """
    if not left_context:
        return Context(None, None)
    assert processed_B is not None, "with left context, streams have an age"
    # The chunk itself (age <= 0) is always visible.
    age_K = torch.arange(left_context, -frames, -1, device=processed_B.device)
    return Context(None, age_K > processed_B[:, None])


def chunk_mask(frames: int, chunk: int, left_context: int | Tensor, device: torch.device) -> Tensor | None:
    """`Context.chunk_mask_TK` of whole sequences; None if all frames are visible. As for `context_of_sequences`."""
    if chunk < 0:
        return None
    chunk_T = torch.arange(frames, device=device) // chunk
    age_TK = chunk_T[:, None] - chunk_T
    return (age_TK < 0) | (age_TK > _visible(chunk, left_context) // chunk)


def visible_span(lens_B: Tensor, frames: int, chunk: int, left_context: int | Tensor) -> Tensor:
    """`Context.span_2BT` of whole sequences. As for `context_of_sequences`."""
    left = _visible(chunk, left_context)
    chunk = chunk if chunk > 0 else frames
    frame_T = torch.arange(frames, device=lens_B.device, dtype=torch.int32)
    start_T = frame_T - frame_T % chunk
    end_BT = torch.minimum((start_T + chunk).clamp(max=frames), lens_B[:, None].to(torch.int32))
    return torch.stack([(start_T - left).clamp(min=0).expand_as(end_BT), end_BT])


def _visible(chunk: int, left_context: int | Tensor) -> int | Tensor:
    return left_context if isinstance(left_context, Tensor) else visible_left_context(chunk, left_context)


def attention_weights(
    query_BTQ: Tensor,
    key_BKQ: Tensor,
    pos_query_BTY: Tensor,
    pos_key_PY: Tensor,
    heads: int,
    context: Context,
    skip_positions: Number,
    penalize: Number,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax of q·k + position_q·position_k, without 1/sqrt(dim), over the keys that the context shows.

    Args:
        query_BTQ, key_BKQ, pos_query_BTY: the heads' parts side by side.
        pos_key_PY: keys of the relative positions -(K-1) … T-1, in this order.
        heads: H.
        context: which keys each query sees.
        skip_positions: 1 to leave the positions out, else 0.
        penalize: 1 to add the gradient of LARGE_SCORE_PENALTY · Σ max(0, |score| - LARGE_SCORE), else 0.

    Returns:
        The weights (B, H, T, K) once for each of two users, and those of the first head (B, T, K) for a third, so that
        a kernel can add up what gradients come back; in the type of the queries.
    """
    B, T, _ = query_BTQ.shape
    if context.span_2BT is not None:
        from ssm_asr.ops import attention_kernel  # only where Triton is installed

        pos_key_HPX = pos_key_PY.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()
        skip, acts = (on_device(number, query_BTQ.device) for number in (skip_positions, penalize))
        return attention_kernel.attention_weights(
            query_BTQ,
            key_BKQ,
            pos_query_BTY,
            pos_key_HPX,
            context.span_2BT,
            skip,
            acts,
            LARGE_SCORE,
            LARGE_SCORE_PENALTY,
        )
    query_BHTD = query_BTQ.reshape(B, T, heads, -1).transpose(1, 2)
    key_BHDK = key_BKQ.reshape(B, key_BKQ.shape[1], heads, -1).permute(0, 2, 3, 1)
    position_BHTP = None
    if isinstance(skip_positions, Tensor) or not skip_positions:
        pos_query_BHTX = pos_query_BTY.reshape(B, T, heads, -1).transpose(1, 2)
        pos_key_HXP = pos_key_PY.reshape(-1, heads, pos_key_PY.shape[1] // heads).permute(1, 2, 0)
        if isinstance(skip_positions, Tensor):
            pos_query_BHTX = pos_query_BHTX * (1 - skip_positions)
        position_BHTP = pos_query_BHTX @ pos_key_HXP
    penalty = LARGE_SCORE_PENALTY * penalize
    weights_BHTK = weights_of_scores(query_BHTD @ key_BHDK, position_BHTP, context, penalty).to(query_BTQ.dtype)
    return weights_BHTK, weights_BHTK, weights_BHTK[:, 0]


def weights_of_scores(
    scores_BHTK: Tensor, position_BHTP: Tensor | None, context: Context, penalty: Number = 0.0
) -> Tensor:
    """Softmax of the scores plus those of relative positions, if any, in float32 at least; scores over a limit are
    penalised in training."""
    if position_BHTP is not None:
        scores_BHTK = scores_BHTK + shift_relative(position_BHTP)
    if scores_BHTK.requires_grad and not known_zero(penalty):
        scores_BHTK = penalize_large(scores_BHTK, LARGE_SCORE, penalty)
    return hidden(at_least_float32(scores_BHTK), context).softmax(dim=-1)


def hidden(scores_BHTK: Tensor, context: Context) -> Tensor:
    """The scores, with those of hidden keys so low that they weigh nothing."""
    if context.chunk_mask_TK is not None:
        scores_BHTK = scores_BHTK.masked_fill(context.chunk_mask_TK, MASKED_SCORE)
    if context.padding_mask_BK is not None:
        scores_BHTK = scores_BHTK.masked_fill(context.padding_mask_BK[:, None, None], MASKED_SCORE)
    return scores_BHTK


def shift_relative(scores_BHTP: Tensor) -> Tensor:
    """Reorders scores of relative positions to scores of keys: out[…, i, j] = in[…, i, j - i + T - 1].

    In row-major order that element is i·(P-1) + j + T - 1: the same data, read in rows of P - 1 from T - 1 on.
    """
    B, H, T, P = scores_BHTP.shape
    if T == 1:
        return scores_BHTP
    keys = P - T + 1
    flat = scores_BHTP.reshape(B, H, T * P)[:, :, T - 1 : T - 1 + T * (P - 1)]
    return flat.reshape(B, H, T, P - 1)[..., :keys]


def weighted_sums(weights_BHTK: Tensor, value_BKV: Tensor, context: Context) -> Tensor:
    """Sums of each head's values by its weights: (B, T, V), the heads' parts side by side."""
    if context.span_2BT is not None:
        from ssm_asr.ops import weighted_sums_kernel  # only where Triton is installed

        return weighted_sums_kernel.weighted_sums(weights_BHTK.to(value_BKV.dtype), value_BKV, context.span_2BT)
    B, H, T, _ = weights_BHTK.shape
    value_BHKD = value_BKV.reshape(B, value_BKV.shape[1], H, -1).transpose(1, 2)
    return (weights_BHTK @ value_BHKD).transpose(1, 2).reshape(B, T, value_BKV.shape[2])

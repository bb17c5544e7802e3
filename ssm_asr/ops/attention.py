"""This module computes attention with relative positions, masked by chunks.

It says which keys a query may see, and computes the attention weights and the weighted sums of values.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.2. The left context may have any number of frames, 0
included.

Shapes: B batch, T frames (queries), L left-context frames kept from earlier chunks, K = L + T keys, P = K + T - 1
relative positions, H heads, Q query dimension of all heads, Y position-query dimension of all heads, X position-query
dimension of one head, V value dimension of all heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ssm_asr.ops import dispatch
from ssm_asr.ops.devices import to_device
from ssm_asr.ops.numbers import Count, Number, known_zero, on_device
from ssm_asr.ops.penalty import penalize_large
from ssm_asr.ops.precision import at_least_float32

MASKED_SCORE = -1000.0
LARGE_SCORE, LARGE_SCORE_PENALTY = 25.0, 1e-4
MOST_FRAMES = 2**30  # more than any sequence has, and few enough for sums with it to fit into 32 bits


class Context(NamedTuple):
    """Says which keys each query may see. Both masks are True where a key is hidden.

    Attributes:
        chunk_mask_TK: True where the chunks and the left context hide a key, for all sequences alike. None hides
            nothing. It is also None if there is a span, which contains what the mask would say.
        padding_mask_BK: True where a key is padding or, in streaming, lies in a part of the left context that is not
            filled yet. None hides nothing.
        span_2BT: for kernels on whole sequences, the first visible key of each query, and the end of its visible keys,
            which is one past the last and at most K; int32. A query whose end is not above its first key sees no key.
    """

    chunk_mask_TK: Tensor | None
    padding_mask_BK: Tensor | None
    span_2BT: Tensor | None = None

    def every(self, factor: int) -> "Context":
        """Returns the context for a stack whose frame rate is lower by `factor`."""
        chunk_TK, padding_BK, span_2BT = self
        return Context(
            chunk_TK if chunk_TK is None else chunk_TK[::factor, ::factor],
            padding_BK if padding_BK is None else padding_BK[:, ::factor],
            span_2BT if span_2BT is None else (span_2BT[..., ::factor] + factor - 1) // factor,
        )


def visible_left_context(chunk: int, left_context: int) -> int:
    """Returns how many frames of left context a chunk sees.

    Args:
        chunk: in frames. A chunk of -1 holds all frames, so it sees none to its left.
        left_context: in frames; -1 for all. It is rounded down to whole chunks, but to no less than one chunk. 0 is
            none.
    """
    if chunk < 0 or not left_context:
        return 0
    return chunk * (max(1, left_context // chunk) if left_context > 0 else MOST_FRAMES // chunk)


def context_on_device(chunk: int, left_context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns a chunk and the left context that it sees as numbers on the device, without waiting for it.

    Operations that get these numbers do the same for all chunks, so that one captured graph serves all of them.
    """
    numbers = torch.tensor([chunk, visible_left_context(chunk, left_context)], dtype=torch.int32)
    chunk_number, left_number = to_device(numbers, device)
    return chunk_number, left_number


def context_of_sequences(
    x_BTD: Tensor, lens_B: Tensor, chunk: Count, left_context: Count, *, spans: bool = True
) -> Context:
    """Returns the context of whole sequences, in which each chunk sees itself and its left context.

    Args:
        x_BTD: the sequences; their number of frames, their type and their device are used.
        lens_B: how many frames of each sequence are not padding.
        chunk: in frames; -1 for all.
        left_context: in frames; -1 for all. Either both are integers, or both are from `context_on_device`.
        spans: whether the context is for `attention_weights` and `weighted_sums`, which take spans where they run by
            kernels. False always makes masks.
    """
    T, device = x_BTD.shape[1], x_BTD.device
    padding_mask_BK = torch.arange(T, device=device) >= lens_B[:, None]
    if spans and dispatch.use_kernels(x_BTD):
        return Context(None, padding_mask_BK, visible_span(lens_B, T, chunk, left_context))
    return Context(chunk_mask(T, chunk, left_context, device), padding_mask_BK)


def context_of_chunk(frames: int, left_context: int, processed_B: Tensor | None) -> Context:
    """Returns the context of one chunk of a stream. The left context fills up from its end as the stream goes on.

    Args:
        frames: frames of the chunk.
        left_context: frames kept from earlier chunks.
        processed_B: how many frames each stream had before this chunk. It may be None if there is no left context.
    """
    if not left_context:
        return Context(None, None)
    assert processed_B is not None, "with left context, streams have an age"
    # Frames of the chunk itself have an age of 0 or less, and are always visible.
    age_K = torch.arange(left_context, -frames, -1, device=processed_B.device)
    return Context(None, age_K > processed_B[:, None])


def chunk_mask(frames: int, chunk: Count, left_context: Count, device: torch.device) -> Tensor | None:
    """Returns `Context.chunk_mask_TK` for whole sequences, or None if the host knows that the chunk holds all frames.

    `context_of_sequences` explains the arguments.
    """
    if not isinstance(chunk, Tensor) and chunk < 0:
        return None
    chunk = _frames_of(chunk, frames)
    chunk_T = torch.arange(frames, device=device) // chunk
    age_TK = chunk_T[:, None] - chunk_T
    return (age_TK < 0) | (age_TK > _visible(chunk, left_context) // chunk)


def visible_span(lens_B: Tensor, frames: int, chunk: Count, left_context: Count) -> Tensor:
    """Returns `Context.span_2BT` for whole sequences; `context_of_sequences` explains the arguments."""
    left = _visible(chunk, left_context)
    chunk = _frames_of(chunk, frames)
    frame_T = torch.arange(frames, device=lens_B.device, dtype=torch.int32)
    start_T = frame_T - frame_T % chunk
    end_BT = torch.minimum((start_T + chunk).clamp(max=frames), lens_B[:, None].to(torch.int32))
    return torch.stack([(start_T - left).clamp(min=0).expand_as(end_BT), end_BT])


def _visible(chunk: Count, left_context: Count) -> Count:
    if isinstance(chunk, Tensor) or isinstance(left_context, Tensor):
        return left_context
    return visible_left_context(chunk, left_context)


def _frames_of(chunk: Count, frames: int) -> Count:
    """Returns the frames of a chunk, which are all frames for a chunk of -1."""
    if isinstance(chunk, Tensor):
        return torch.where(chunk < 0, frames, chunk)
    return frames if chunk < 0 else chunk


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
    """Computes the attention weights: the softmax of query·key + position query·position key over the visible keys.

    The scores are not divided by the root of the dimension.

    Args:
        query_BTQ, key_BKQ, pos_query_BTY: the heads' parts lie side by side.
        pos_key_PY: keys of the relative positions -(K-1) … T-1, in this order.
        heads: H.
        context: which keys each query sees.
        skip_positions: 1 to leave the relative positions out, else 0.
        penalize: 1 to add the gradient of LARGE_SCORE_PENALTY · Σ max(0, |score| - LARGE_SCORE), else 0.

    Returns:
        The weights (B, H, T, K) twice, for two modules, and the weights (B, T, K) of the first head, for a third. They
        have the type of the queries. Each module gets an output of its own because a kernel then adds up the three
        gradients itself.
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
    """Computes the attention weights from scores, in float32 at least.

    Args:
        scores_BHTK: query·key.
        position_BHTP: scores of the relative positions, which are added; None adds nothing.
        context: which keys each query sees.
        penalty: weight of the penalty on absolute scores above LARGE_SCORE; it acts on gradients alone.

    Returns:
        The weights (B, H, T, K).
    """
    if position_BHTP is not None:
        scores_BHTK = scores_BHTK + shift_relative(position_BHTP)
    if scores_BHTK.requires_grad and not known_zero(penalty):
        scores_BHTK = penalize_large(scores_BHTK, LARGE_SCORE, penalty)
    return hidden(at_least_float32(scores_BHTK), context).softmax(dim=-1)


def hidden(scores_BHTK: Tensor, context: Context) -> Tensor:
    """Returns the scores with MASKED_SCORE at hidden keys, so that these get no weight beside visible ones."""
    if context.chunk_mask_TK is not None:
        scores_BHTK = scores_BHTK.masked_fill(context.chunk_mask_TK, MASKED_SCORE)
    if context.padding_mask_BK is not None:
        scores_BHTK = scores_BHTK.masked_fill(context.padding_mask_BK[:, None, None], MASKED_SCORE)
    return scores_BHTK


def shift_relative(scores_BHTP: Tensor) -> Tensor:
    """Turns scores of relative positions (B, H, T, P) into scores of keys (B, H, T, K).

    The result is out[…, i, j] = in[…, i, j - i + T - 1]. In row-major order this element of the input has the index
    i·(P-1) + j + T - 1. So the result is found by reading the input in rows of P - 1 elements, starting at T - 1.
    """
    B, H, T, P = scores_BHTP.shape
    if T == 1:
        return scores_BHTP
    keys = P - T + 1
    flat = scores_BHTP.reshape(B, H, T * P)[:, :, T - 1 : T - 1 + T * (P - 1)]
    return flat.reshape(B, H, T, P - 1)[..., :keys]


def weighted_sums(weights_BHTK: Tensor, value_BKV: Tensor, context: Context) -> Tensor:
    """Sums each head's values with its weights.

    Args:
        weights_BHTK: one of the outputs of `attention_weights`.
        value_BKV: the heads' parts lie side by side.
        context: the context that the weights were made with.

    Returns:
        (B, T, V), the heads' parts side by side.
    """
    if context.span_2BT is not None:
        from ssm_asr.ops import weighted_sums_kernel  # only where Triton is installed

        return weighted_sums_kernel.weighted_sums(weights_BHTK.to(value_BKV.dtype), value_BKV, context.span_2BT)
    B, H, T, _ = weights_BHTK.shape
    value_BHKD = value_BKV.reshape(B, value_BKV.shape[1], H, -1).transpose(1, 2)
    return (weights_BHTK @ value_BHKD).transpose(1, 2).reshape(B, T, value_BKV.shape[2])

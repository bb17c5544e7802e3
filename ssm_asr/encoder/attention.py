"""Self-attention of the Zipformer: weights are computed once a layer and used by three modules.

Source: Yao et al. (arXiv 2310.11230), section 3.2. Left context may be any number of frames, 0 included.

Shapes: B batch, T frames (queries), L left-context frames kept from before, K = L + T keys, P = K + T - 1 relative
positions, H heads, Q query dim of all heads, V value dim of all heads, D channels, E position-encoding dim.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssm_asr.encoder.modules import Linear, scaled_linear
from ssm_asr.encoder.regularize import Balancer, Dropout, Schedule, Scheduled, Whiten, never, penalize_large
from ssm_asr.ops.precision import at_least_float32

MASKED_SCORE = -1000.0
LARGE_SCORE, LARGE_SCORE_PENALTY = 25.0, 1e-4
MOST_FRAMES = 2**30  # more than any sequence has, with room in 32 bits


class Context(NamedTuple):
    """Which keys each query may see. Both masks are True where a key is hidden.

    Attributes:
        chunk_mask_TK: hidden by the chunks and the left context, the same for the whole batch; or None, also where
            there is a span.
        padding_mask_BK: hidden since it is padding or, in streaming, not yet filled; or None.
        span_2BT: what the masks say of whole sequences, for kernels: the first visible key of each query and the end
            of those visible (no more than K), int32; where the end is not behind the first, none is visible.
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

    All frames if left_context is -1; none if chunk is, since all of them are in one chunk.
    """
    if chunk < 0 or not left_context:
        return 0
    return chunk * (max(1, left_context // chunk) if left_context > 0 else MOST_FRAMES // chunk)


def chunk_mask(frames: int, chunk: int, left_context: int | Tensor, device: torch.device) -> Tensor | None:
    """The (T, T) mask of chunk-wise attention, True where hidden: each chunk sees itself and its left context.

    All frames are visible if chunk is -1, and all past chunks if left_context is -1. Where left_context is a tensor, it
    is already what `visible_left_context` says, as a number on the device.
    """
    if chunk < 0:
        return None
    chunk_T = torch.arange(frames, device=device) // chunk
    age_TK = chunk_T[:, None] - chunk_T
    return (age_TK < 0) | (age_TK > _visible_left_context(chunk, left_context) // chunk)


def visible_span(lens_B: Tensor, frames: int, chunk: int, left_context: int | Tensor) -> Tensor:
    """`Context.span_2BT` of sequences with so many valid frames each; the rest as for `chunk_mask`."""
    left = _visible_left_context(chunk, left_context)
    chunk = chunk if chunk > 0 else frames
    frame_T = torch.arange(frames, device=lens_B.device, dtype=torch.int32)
    start_T = frame_T - frame_T % chunk
    end_BT = torch.minimum((start_T + chunk).clamp(max=frames), lens_B[:, None].to(torch.int32))
    return torch.stack([(start_T - left).clamp(min=0).expand_as(end_BT), end_BT])


def _visible_left_context(chunk: int, left_context: int | Tensor) -> int | Tensor:
    return left_context if isinstance(left_context, Tensor) else visible_left_context(chunk, left_context)


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


class RelativePositions(nn.Module):
    """Encodings of the relative positions key - query, finer near 0 (section 3.2).

    A position x is compressed to sign(x)·c·(log(|x| + c) - log c) with c = sqrt(E), mapped to an angle by
    atan(x / (E/2π)), and encoded by cosines (even columns) and sines (odd) of its multiples; the last column is 1.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"position encoding of dim {dim}: give an even number")
        self.dim = dim
        self.dropout = Dropout(0.15)

    def forward(self, like_BTD: Tensor, left_context: int = 0) -> Tensor:
        """Encodings (P, E) in ascending order of position, -(K-1) … T-1, for the queries of `like_BTD`."""
        frames = like_BTD.shape[1]
        return self.dropout(self.table(frames, left_context, like_BTD.device).to(like_BTD.dtype))

    def table(self, frames: int, left_context: int, device: torch.device) -> Tensor:
        """The encodings (P, E) in float32 without dropout."""
        position_P = torch.arange(1 - frames - left_context, frames, device=device, dtype=torch.float32)
        compression = math.sqrt(self.dim)
        compressed_P = position_P.sign() * compression * torch.log1p(position_P.abs() / compression)
        angle_P = torch.atan(compressed_P / (self.dim / (2 * math.pi)))
        angles = angle_P[:, None] * torch.arange(1, self.dim // 2 + 1, device=device)
        table_PE = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)
        table_PE[:, -1] = 1.0
        return table_PE


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


class AttentionWeights(Scheduled):
    """The attention weights of a layer: softmax of q·k + p·linear_pos(positions), without 1/sqrt(dim)."""

    def __init__(self, channels: int, pos_dim: int, heads: int, query_head_dim: int, pos_head_dim: int) -> None:
        super().__init__()
        self.heads, self.query_head_dim, self.pos_head_dim = heads, query_head_dim, pos_head_dim
        self.query_dim = heads * query_head_dim
        # The initial scale stands for the usual division of the scores.
        self.in_proj = scaled_linear(channels, (2 * query_head_dim + pos_head_dim) * heads, scale=query_head_dim**-0.25)
        self.linear_pos = scaled_linear(pos_dim, heads * pos_head_dim, scale=0.05, bias=False)
        self.whiten_keys = Whiten(Schedule((0, 3.0), (20000, 6.0)), groups=heads, grad_scale=0.025)
        self.balance_keys = Balancer(positive=(0.4, 0.6), prob=0.025)
        self.pos_skip_rate = Schedule((0, 0.5), (4000, 0.0))

    def forward(
        self, x_BTD: Tensor, pos_PE: Tensor, context: Context, keys_BLQ: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Weights, and the keys (B, K, Q) of which streaming keeps the last L.

        The weights (B, H, T, K) are there once for each of two modules, and those of the first head (B, T, K) for a
        third, so that a kernel can add up what gradients come back.

        Args:
            keys_BLQ: keys of the left context in streaming.
        """
        B, T, _ = x_BTD.shape
        query_BTQ, key_BTQ, pos_query = self.in_proj(x_BTD).split(
            [self.query_dim, self.query_dim, self.heads * self.pos_head_dim], dim=-1
        )
        key_BKQ = self.whiten_keys(self.balance_keys(key_BTQ))
        if keys_BLQ is not None:
            key_BKQ = torch.cat([keys_BLQ, key_BKQ], dim=1)
        skip, penalize = self.chance(self.pos_skip_rate), self.chance(0.1)
        if context.span_2BT is not None:
            from ssm_asr.ops.attention_kernel import attention_weights  # only where Triton is installed

            pos_key_HPX = self.linear_pos(pos_PE).reshape(-1, self.heads, self.pos_head_dim).transpose(0, 1)
            skip, penalize = (
                x if isinstance(x, Tensor) else torch.full((), x, device=x_BTD.device) for x in (skip, penalize)
            )
            weights = attention_weights(
                query_BTQ, key_BKQ, pos_query, pos_key_HPX.contiguous(), context.span_2BT, skip, penalize,
                LARGE_SCORE, LARGE_SCORE_PENALTY,
            )  # fmt: skip
            return weights, key_BKQ
        query = query_BTQ.reshape(B, T, self.heads, -1).transpose(1, 2)
        key = key_BKQ.reshape(B, key_BKQ.shape[1], self.heads, -1).permute(0, 2, 3, 1)
        position_BHTP = None
        if isinstance(skip, Tensor) or not skip:
            pos_query = pos_query.reshape(B, T, self.heads, -1).transpose(1, 2)
            pos_key = self.linear_pos(pos_PE).reshape(-1, self.heads, self.pos_head_dim).permute(1, 2, 0)
            pos_query = pos_query * (1 - skip) if isinstance(skip, Tensor) else pos_query
            position_BHTP = pos_query @ pos_key
        penalty = LARGE_SCORE_PENALTY * penalize
        weights_BHTK = weights_of_scores(query @ key, position_BHTP, context, penalty).to(x_BTD.dtype)
        return (weights_BHTK, weights_BHTK, weights_BHTK[:, 0]), key_BKQ


def weights_of_scores(
    scores_BHTK: Tensor, position_BHTP: Tensor | None, context: Context, penalty: float | Tensor
) -> Tensor:
    """Softmax of the scores plus those of relative positions, if any; scores over a limit are penalised in training."""
    if position_BHTP is not None:
        scores_BHTK = scores_BHTK + shift_relative(position_BHTP)
    if scores_BHTK.requires_grad and not never(penalty):
        scores_BHTK = penalize_large(scores_BHTK, LARGE_SCORE, penalty)
    scores_BHTK = at_least_float32(scores_BHTK)
    if context.chunk_mask_TK is not None:
        scores_BHTK = scores_BHTK.masked_fill(context.chunk_mask_TK, MASKED_SCORE)
    if context.padding_mask_BK is not None:
        scores_BHTK = scores_BHTK.masked_fill(context.padding_mask_BK[:, None, None], MASKED_SCORE)
    return scores_BHTK.softmax(dim=-1)


class SelfAttention(nn.Module):
    """Linear to the heads' values, weighted sums over keys, Linear back."""

    def __init__(self, channels: int, heads: int, value_head_dim: int) -> None:
        super().__init__()
        self.heads, self.value_dim = heads, heads * value_head_dim
        self.in_proj = Linear(channels, self.value_dim)
        self.out_proj = scaled_linear(self.value_dim, channels, 0.05)
        self.whiten = Whiten(Schedule((0, 7.5), (20000, 22.5)))

    def forward(
        self, x_BTD: Tensor, weights_BHTK: Tensor, values_BLV: Tensor | None = None, span_2BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output (B, T, D), and the values (B, K, V) of which streaming keeps the last L.

        Args:
            values_BLV: values of the left context in streaming.
            span_2BT: that of the context of the weights.
        """
        B, T, _ = x_BTD.shape
        value_BKV = self.in_proj(x_BTD)
        if span_2BT is not None:
            from ssm_asr.ops.weighted_sums_kernel import weighted_sums  # only where Triton is installed

            mixed = weighted_sums(weights_BHTK.to(value_BKV.dtype), value_BKV, span_2BT)
            return self.whiten(self.out_proj(mixed)), value_BKV
        if values_BLV is not None:
            value_BKV = torch.cat([values_BLV, value_BKV], dim=1)
        value = value_BKV.reshape(B, value_BKV.shape[1], self.heads, -1).transpose(1, 2)
        mixed = (weights_BHTK @ value).transpose(1, 2).reshape(B, T, self.value_dim)
        return self.whiten(self.out_proj(mixed)), value_BKV


class NonlinAttention(Scheduled):
    """x·tanh(s), mixed over time by one head's weights, times y; s, x and y are projections of the input."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.in_proj = Linear(channels, 3 * hidden)
        self.balance_gate = Balancer(
            positive=(Schedule((0, 0.25), (20000, 0.05)), Schedule((0, 0.75), (20000, 0.95))), abs=(0.5, 5.0)
        )
        self.whiten_x = Whiten(Schedule((0, 5.0), (20000, 10.0)))
        self.out_proj = scaled_linear(hidden, channels, 0.05)
        self.whiten_out = Whiten(Schedule((0, 5.0), (20000, 15.0)))
        self.constant_rate = Schedule((0, 0.25), (4000, 0.025))

    def forward(self, x_BTD: Tensor, weights_BTK: Tensor, gated_BLN: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output (B, T, D), and the gated inputs (B, K, hidden) of which streaming keeps the last L."""
        gate, x, y = self.in_proj(x_BTD).chunk(3, dim=-1)
        x = self.whiten_x(x)
        settings = self.balance_gate.settings(gate)
        if settings is not None and gated_BLN is None:
            from ssm_asr.ops.gates_kernel import gated, mixed  # only where Triton is installed

            gated_BKN = gated((x, gate), "tanh", None, settings, self.balance_gate.grad_scale)
            mixed_BTN = mixed(weights_BTK.to(gated_BKN.dtype), gated_BKN, self.chance(self.constant_rate))
            return self.whiten_out(self.out_proj(gated((mixed_BTN, y), "identity"))), gated_BKN
        gated_BKN = x * torch.tanh(self.balance_gate(gate))
        if gated_BLN is not None:
            gated_BKN = torch.cat([gated_BLN, gated_BKN], dim=1)
        constant = self.chance(self.constant_rate)
        if not never(constant):
            visible = (weights_BTK > 0).to(weights_BTK.dtype)
            even_BTK = visible / visible.sum(dim=-1, keepdim=True)
            weights_BTK = torch.where(constant > 0, even_BTK, weights_BTK) if isinstance(constant, Tensor) else even_BTK
        return self.whiten_out(self.out_proj((weights_BTK @ gated_BKN) * y)), gated_BKN

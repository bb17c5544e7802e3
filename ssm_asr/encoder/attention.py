"""Self-attention of the Zipformer: each layer computes its attention weights once, and three of its modules use them.

Source: Yao et al., "Zipformer" (arXiv 2310.11230), section 3.2.

Shapes: B batch, T frames (queries), L left-context frames kept from earlier chunks, K = L + T keys, P = K + T - 1
relative positions, H heads, Q query channels of all heads, V value channels of all heads, D channels, E channels of a
position encoding.
"""

import math

import torch
from torch import Tensor, nn

from ssm_asr.encoder.modules import Linear, scaled_linear
from ssm_asr.encoder.regularize import Balancer, Dropout, Schedule, Scheduled, Whiten
from ssm_asr.ops.attention import Context, attention_weights, weighted_sums


class RelativePositions(nn.Module):
    """Encodes relative positions (key minus query), with the finest resolution near 0 (section 3.2).

    A position x is compressed to y = sign(x)·c·(log(|x| + c) - log c) with c = sqrt(E), and y is mapped to the angle
    atan(y / (E/2π)). The even columns hold the cosines of the angle's multiples 1 … E/2, the odd columns their sines;
    the last column is replaced by 1.

    Args:
        dim: E.

    Raises:
        ValueError: if E is odd.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"position encoding of dim {dim}: give an even number")
        self.dim = dim
        self.dropout = Dropout(0.15)

    def forward(self, like_BTD: Tensor, left_context: int = 0) -> Tensor:
        """Returns the encodings (P, E) of the positions -(K-1) … T-1, in this order.

        Args:
            like_BTD: the frames that ask; their number T, device and type are used, their values are not.
            left_context: L.
        """
        frames = like_BTD.shape[1]
        return self.dropout(self.table(frames, left_context, like_BTD.device).to(like_BTD.dtype))

    def table(self, frames: int, left_context: int, device: torch.device) -> Tensor:
        """Returns the encodings (P, E) in float32, without dropout, for T = `frames` and L = `left_context`."""
        position_P = torch.arange(1 - frames - left_context, frames, device=device, dtype=torch.float32)
        compression = math.sqrt(self.dim)
        compressed_P = position_P.sign() * compression * torch.log1p(position_P.abs() / compression)
        angle_P = torch.atan(compressed_P / (self.dim / (2 * math.pi)))
        angles = angle_P[:, None] * torch.arange(1, self.dim // 2 + 1, device=device)
        table_PE = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)
        table_PE[:, -1] = 1.0
        return table_PE


class AttentionWeights(Scheduled):
    """Computes the attention weights of a layer: softmax of q·k + p·linear_pos(positions), without 1/sqrt(dim).

    q, k and p are the queries, keys and position queries, all projected from the input.
    """

    def __init__(self, channels: int, pos_dim: int, heads: int, query_head_dim: int, pos_head_dim: int) -> None:
        super().__init__()
        self.heads, self.query_head_dim, self.pos_head_dim = heads, query_head_dim, pos_head_dim
        self.query_dim = heads * query_head_dim
        # Queries and keys are initialised smaller instead of dividing the scores by sqrt(query_head_dim).
        self.in_proj = scaled_linear(channels, (2 * query_head_dim + pos_head_dim) * heads, scale=query_head_dim**-0.25)
        self.linear_pos = scaled_linear(pos_dim, heads * pos_head_dim, scale=0.05, bias=False)
        self.whiten_keys = Whiten(Schedule((0, 3.0), (20000, 6.0)), groups=heads, grad_scale=0.025)
        self.balance_keys = Balancer(positive=(0.4, 0.6), prob=0.025)
        self.pos_skip_rate = Schedule((0, 0.5), (4000, 0.0))

    def forward(
        self, x_BTD: Tensor, pos_PE: Tensor, context: Context, keys_BLQ: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Returns the three weights of `ssm_asr.ops.attention.attention_weights`, and the keys (B, K, Q).

        Args:
            x_BTD: frames of the queries.
            pos_PE: encodings from `RelativePositions`.
            context: which keys each query sees.
            keys_BLQ: in streaming, the keys of the left context: the last L keys that the previous chunk returned.
        """
        query_BTQ, key_BTQ, pos_query = self.in_proj(x_BTD).split(
            [self.query_dim, self.query_dim, self.heads * self.pos_head_dim], dim=-1
        )
        key_BKQ = self.whiten_keys(self.balance_keys(key_BTQ))
        if keys_BLQ is not None:
            key_BKQ = torch.cat([keys_BLQ, key_BKQ], dim=1)
        skip, penalize = self.chance(self.pos_skip_rate), self.chance(0.1)
        weights = attention_weights(
            query_BTQ, key_BKQ, pos_query, self.linear_pos(pos_PE), self.heads, context, skip, penalize
        )
        return weights, key_BKQ


class SelfAttention(nn.Module):
    """Projects frames to the values of all heads, sums the values by attention weights, and projects back."""

    def __init__(self, channels: int, heads: int, value_head_dim: int) -> None:
        super().__init__()
        self.value_dim = heads * value_head_dim
        self.in_proj = Linear(channels, self.value_dim)
        self.out_proj = scaled_linear(self.value_dim, channels, 0.05)
        self.whiten = Whiten(Schedule((0, 7.5), (20000, 22.5)))

    def forward(
        self, x_BTD: Tensor, weights_BHTK: Tensor, context: Context, values_BLV: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the output (B, T, D) and the values (B, K, V).

        Args:
            x_BTD: the frames whose values are summed.
            weights_BHTK: weights from `AttentionWeights`.
            context: the context from which the weights were computed.
            values_BLV: in streaming, the values of the left context: the last L values that the previous chunk
                returned.
        """
        value_BKV = self.in_proj(x_BTD)
        if values_BLV is not None:
            value_BKV = torch.cat([values_BLV, value_BKV], dim=1)
        return self.whiten(self.out_proj(weighted_sums(weights_BHTK, value_BKV, context))), value_BKV

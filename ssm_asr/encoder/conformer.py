"""The Conformer encoder, for whole utterances, chunk-masked and streaming.

Its convolution module mixes frames by a convolution, a state-space model, both, or neither. Pairs of 50 Hz frames are
joined at the input, so that all layers run at 25 Hz.

Sources: Gulati et al., "Conformer" (arXiv 2005.08100); for the mixers Shan et al. (arXiv 2309.08551); for the attention
with relative positions Dai et al., "Transformer-XL" (arXiv 1901.02860), section 3.3.

Shapes: B batch, T frames (at 25 Hz unless stated), E channels of the front end, D channels, L left-context
frames kept from earlier chunks, K = L + T keys, P = K + T - 1 relative positions, H heads, Q channels of a head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ssm_asr.encoder.attention import RelativePositions
from ssm_asr.encoder.batch_norm import MaskedBatchNorm
from ssm_asr.encoder.contract import MOST_CHANNELS, MOST_HEADS, MOST_LAYERS, MOST_TAPS, Encoder, EncoderConfig
from ssm_asr.encoder.mixer import MIXERS
from ssm_asr.fields import setting
from ssm_asr.ops.attention import Context, context_of_chunk, context_of_sequences, hidden, shift_relative
from ssm_asr.ops.numbers import Count
from ssm_asr.ops.precision import at_least_float32
from ssm_asr.ssm.s4d import PARAMETERISATIONS

# The front end's frames at 50 Hz become frames at 25 Hz.
SUBSAMPLING = 2


@dataclass
class ConformerConfig(EncoderConfig):
    """These settings give the size and shape of a Conformer. The defaults are size L of Gulati et al."""

    kind: str = "conformer"
    layers: int = setting(17, least=1, most=MOST_LAYERS)
    dim: int = setting(512, least=2, most=MOST_CHANNELS)
    heads: int = setting(8, least=1, most=MOST_HEADS)
    feedforward_dim: int = setting(2048, least=1, most=MOST_CHANNELS)
    # The front end makes 50 Hz frames of this width.
    embed_dim: int = setting(512, least=1, most=MOST_CHANNELS)
    mixer: str = setting("conv", choices=tuple(MIXERS))
    # The convolutions of the mixers conv and com have so many taps.
    conv_kernel: int = setting(32, least=2, most=MOST_TAPS)
    # The state-space models of dir, com and rep have so many real numbers a channel as their state.
    ssm_states: int = setting(4, least=1, most=MOST_CHANNELS)
    # They are real, or lin: complex pairs.
    ssm_param: str = setting("real", choices=PARAMETERISATIONS)
    # The mixer rep has so many taps.
    rep_length: int = setting(16, least=2, most=MOST_TAPS)
    dropout: float = setting(0.1, least=0, most=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        multiple = 2 * self.heads
        self.require(self.dim % multiple == 0, "dim", f"a multiple of {multiple}, twice model.encoder.heads")
        paired = self.ssm_param != "lin" or self.ssm_states % 2 == 0
        self.require(paired, "ssm_states", "an even number for ssm_param lin")

    @property
    def causal(self) -> bool:
        """Every Conformer can stream."""
        return True

    @property
    def downsampling(self) -> tuple[int, ...]:
        """All layers run at 25 Hz."""
        return (SUBSAMPLING,)


class LayerState(NamedTuple):
    """The state of a layer between chunks: keys and values of the left context at 25 Hz, and the mixer's state."""

    key_BLD: Tensor
    value_BLD: Tensor
    mixer: Any  # each kind of mixer has a type of its own


class RelativeAttention(nn.Module):
    """Multi-head self-attention with the scores ((q + u)·k + (q + v)·linear_pos(position)) / sqrt(Q).

    u and v are learned biases of each head, of content and of position.

    Source: Dai et al. (arXiv 1901.02860), section 3.3.

    Args:
        dim: D, a multiple of `heads`.
        heads: H.
        dropout: rate at which attention weights are dropped.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        self.content_bias_HQ = nn.Parameter(torch.empty(heads, dim // heads))
        self.position_bias_HQ = nn.Parameter(torch.empty(heads, dim // heads))
        nn.init.xavier_uniform_(self.content_bias_HQ)
        nn.init.xavier_uniform_(self.position_bias_HQ)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self, x_BTD: Tensor, pos_PD: Tensor, context: Context, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output (B, T, D), the keys and the values, (B, K, D) each.

        Args:
            x_BTD: frames of the queries.
            pos_PD: encodings from `RelativePositions`.
            context: which keys each query sees.
            past: in streaming, keys and values (B, L, D) of the left context: the last L that the previous chunk
                returned.
        """
        B, T, D = x_BTD.shape
        query_BTD, key_BKD, value_BKD = self.in_proj(x_BTD).chunk(3, dim=-1)
        if past is not None:
            key_BKD, value_BKD = torch.cat([past[0], key_BKD], dim=1), torch.cat([past[1], value_BKD], dim=1)
        query_BTHQ = query_BTD.reshape(B, T, self.heads, -1)
        by_content = (query_BTHQ + self.content_bias_HQ).transpose(1, 2)
        by_position = (query_BTHQ + self.position_bias_HQ).transpose(1, 2)
        key, value = (x.reshape(B, x.shape[1], self.heads, -1).transpose(1, 2) for x in (key_BKD, value_BKD))
        position = self.linear_pos(pos_PD).reshape(-1, self.heads, D // self.heads).transpose(0, 1)

        scores_BHTK = by_content @ key.transpose(2, 3) + shift_relative(by_position @ position.transpose(1, 2))
        scores_BHTK = hidden(at_least_float32(scores_BHTK) * key.shape[-1] ** -0.5, context)
        weights_BHTK = self.dropout(scores_BHTK.softmax(dim=-1).to(value.dtype))
        mixed_BTD = (weights_BHTK @ value).transpose(1, 2).reshape(B, T, D)
        return self.out_proj(mixed_BTD), key_BKD, value_BKD


class ConvolutionModule(nn.Module):
    """Applies LayerNorm, a linear layer to 2D channels, a GLU, the mixer, batch norm, SiLU and a linear layer."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.in_proj = nn.Linear(config.dim, 2 * config.dim)
        self.mixer = MIXERS[config.mixer](config)
        self.batch_norm = MaskedBatchNorm(config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x_BTD: Tensor, padding_mask_BT: Tensor | None) -> Tensor:
        """Maps whole sequences (B, T, D) -> (B, T, D); the mask is True at padding.

        Only batch norm needs the mask: the mixer is causal, so that padding, which comes last, touches no valid frame.
        """
        return self._finish(self.mixer(self._gated(x_BTD)), padding_mask_BT)

    def stream(self, x_BTD: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Maps one chunk, given the mixer's state; returns the output (B, T, D) and the mixer's new state."""
        mixed_BDT, state = self.mixer.stream(self._gated(x_BTD), state)
        return self._finish(mixed_BDT, None), state

    def _gated(self, x_BTD: Tensor) -> Tensor:
        return nn.functional.glu(self.in_proj(self.norm(x_BTD)), dim=-1).transpose(1, 2)

    def _finish(self, mixed_BDT: Tensor, padding_mask_BT: Tensor | None) -> Tensor:
        normed_BDT = self.batch_norm(mixed_BDT, padding_mask_BT)
        return self.out_proj(nn.functional.silu(normed_BDT).transpose(1, 2))


def feed_forward(dim: int, hidden: int, dropout: float) -> nn.Sequential:
    """Makes a feed-forward module: LayerNorm, a linear layer, SiLU, dropout and a linear layer, (…, D) -> (…, D)."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.SiLU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
    )


class ConformerLayer(nn.Module):
    """A Conformer layer: feed-forward, attention, convolution module, feed-forward, and LayerNorm at the end.

    The output of each module is added to its input; the feed-forward modules count half.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.feedforward_dim
        self.dim = dim
        self.feed_forward1 = feed_forward(dim, hidden, config.dropout)
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = RelativeAttention(dim, config.heads, config.dropout)
        self.conv_module = ConvolutionModule(config)
        self.feed_forward2 = feed_forward(dim, hidden, config.dropout)
        self.norm_out = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)

    def init_state(self, batch_size: int, left_context: int, device: torch.device | None = None) -> LayerState:
        """Returns the state at the start of `batch_size` streams; left_context is in frames at 25 Hz."""
        key_BLD = torch.zeros(batch_size, left_context, self.dim, device=device)
        mixer = self.conv_module.mixer.init_state(batch_size, device)
        return LayerState(key_BLD, torch.zeros_like(key_BLD), mixer)

    def forward(self, x_BTD: Tensor, pos_PD: Tensor, context: Context) -> Tensor:
        """Maps whole sequences (B, T, D) -> (B, T, D); `context` says which keys attention sees."""
        x_BTD = x_BTD + 0.5 * self.dropout(self.feed_forward1(x_BTD))
        mixed_BTD, _, _ = self.attention(self.norm_attention(x_BTD), pos_PD, context)
        x_BTD = x_BTD + self.dropout(mixed_BTD)
        x_BTD = x_BTD + self.dropout(self.conv_module(x_BTD, context.padding_mask_BK))
        return self._finish(x_BTD)

    def stream(self, x_BTD: Tensor, pos_PD: Tensor, context: Context, state: LayerState) -> tuple[Tensor, LayerState]:
        """Maps one chunk (B, T, D) -> (B, T, D), and returns it with the new state."""
        frames = x_BTD.shape[1]
        x_BTD = x_BTD + 0.5 * self.dropout(self.feed_forward1(x_BTD))
        past = state.key_BLD, state.value_BLD
        mixed_BTD, key_BKD, value_BKD = self.attention(self.norm_attention(x_BTD), pos_PD, context, past)
        x_BTD = x_BTD + self.dropout(mixed_BTD)
        mixed_BTD, mixer = self.conv_module.stream(x_BTD, state.mixer)
        new_state = LayerState(key_BKD[:, frames:], value_BKD[:, frames:], mixer)
        return self._finish(x_BTD + self.dropout(mixed_BTD)), new_state

    def _finish(self, x_BTD: Tensor) -> Tensor:
        return self.norm_out(x_BTD + 0.5 * self.dropout(self.feed_forward2(x_BTD)))


class Conformer(Encoder):
    """The encoder: it maps 50 Hz frames of `embed_dim` channels to 25 Hz frames of `dim` channels.

    Attributes:
        out_channels: D, the width of the output.
    """

    config: ConformerConfig

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.dim
        self.subsampling = nn.Linear(SUBSAMPLING * config.embed_dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.positions = RelativePositions(config.dim)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.layers))

    def init_state(
        self, batch_size: int, left_context: int, device: torch.device | None = None
    ) -> tuple[LayerState, ...]:
        """Returns the state of every layer at the start of `batch_size` streams; left_context is in frames at 50 Hz."""
        return tuple(layer.init_state(batch_size, left_context // SUBSAMPLING, device) for layer in self._layers())

    def forward(self, x_BTE: Tensor, lens_B: Tensor, chunk: Count, left_context: Count) -> tuple[Tensor, Tensor]:
        """Encodes whole sequences, masked to what streaming sees.

        Args:
            x_BTE: T frames at 50 Hz.
            lens_B: how many frames of each sequence are not padding.
            chunk: in frames at 50 Hz; -1 is the whole sequence.
            left_context: in frames at 50 Hz, -1 for all. Both may be tensors, as `context_of_sequences` takes them.

        Returns:
            The output (B, (T+1)//2, D), and the lengths (B,) in frames at 25 Hz.
        """
        frame_T = torch.arange(x_BTE.shape[1], device=x_BTE.device)
        context = context_of_sequences(x_BTE, lens_B, chunk, left_context, spans=False).every(SUBSAMPLING)
        # In a sequence of odd length the last frame is paired with itself, not with padding.
        valid_BT = torch.minimum(frame_T, lens_B[:, None] - 1).clamp(min=0)
        x_BTD = self._join_frames(x_BTE.gather(1, valid_BT[..., None].expand_as(x_BTE)))
        pos_PD = self.positions(x_BTD)
        for layer in self._layers():
            x_BTD = layer(x_BTD, pos_PD, context)
        return x_BTD, (lens_B + 1) // SUBSAMPLING

    def stream(
        self, x_BTE: Tensor, state: tuple[LayerState, ...], processed_B: Tensor | None
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Encodes one chunk; returns half as many frames (B, T/2, D), and the new state.

        Args:
            x_BTE: an even number T of frames at 50 Hz.
            state: the state that the previous chunk returned; it is not changed.
            processed_B: frames at 50 Hz that each stream has had before, int64; may be None without left context.
        """
        x_BTD, left_context = self._join_frames(x_BTE), state[0].key_BLD.shape[1]
        pos_PD = self.positions(x_BTD, left_context)
        processed_B = None if processed_B is None else processed_B // SUBSAMPLING
        context = context_of_chunk(x_BTD.shape[1], left_context, processed_B)
        new_states = []
        for layer, layer_state in zip(self._layers(), state, strict=True):
            x_BTD, layer_state = layer.stream(x_BTD, pos_PD, context, layer_state)
            new_states.append(layer_state)
        return x_BTD, tuple(new_states)

    def _layers(self) -> list[ConformerLayer]:
        return cast(list[ConformerLayer], self.layers)

    def _join_frames(self, x_BTE: Tensor) -> Tensor:
        """Projects each pair of 50 Hz frames to one frame of the layers: (B, T, E) -> (B, (T+1)//2, D)."""
        missing = -x_BTE.shape[1] % SUBSAMPLING
        if missing:
            x_BTE = torch.cat([x_BTE, x_BTE[:, -1:].expand(-1, missing, -1)], dim=1)
        B, T, E = x_BTE.shape
        return self.dropout(self.subsampling(x_BTE.reshape(B, T // SUBSAMPLING, SUBSAMPLING * E)))

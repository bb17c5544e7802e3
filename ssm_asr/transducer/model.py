"""The transducer: front end, encoder, predictor and joiner, with the losses that train it.

Shapes: B batch, T feature frames (100 Hz), S output frames (25 Hz), D encoder width, U tokens, V vocabulary,
J joiner dim, F mels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssm_asr import units
from ssm_asr.encoder.contract import MOST_CHANNELS, EncoderConfig
from ssm_asr.encoder.modules import scaled_linear
from ssm_asr.encoder.registry import make_encoder
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP, ConvSubsampling
from ssm_asr.encoder.zipformer import DROPOUT, ZipformerConfig
from ssm_asr.fields import Section, setting
from ssm_asr.ops.attention import visible_left_context
from ssm_asr.ops.devices import to_device
from ssm_asr.transducer.predictor import PREDICTOR_GROUP, Joiner, Predictor
from ssm_asr.transducer.pruned_loss import LatticeLosses, Lattices, vocabulary_projection


@dataclass
class ModelConfig(Section, name="model"):
    """These settings say everything about the model but the size of its vocabulary."""

    encoder: EncoderConfig = field(default_factory=ZipformerConfig)
    predictor_dim: int = setting(512, least=PREDICTOR_GROUP, most=MOST_CHANNELS, multiple_of=PREDICTOR_GROUP)
    joiner_dim: int = setting(512, least=1, most=MOST_CHANNELS)
    # The predictor sees the last so many tokens.
    context_size: int = setting(2, least=1, most=100)
    # A CTC head is trained beside the transducer.
    ctc: bool = False
    rnnt_type: str = setting("regular", choices=("regular", "modified", "constrained"))
    # The pruned loss keeps so many cells of the lattice a frame.
    prune_range: int = setting(5, least=1, most=1000)
    # The simple loss is smoothed by these shares of what the predictor and the encoder say alone.
    lm_scale: float = setting(0.25, least=0, most=1)
    am_scale: float = setting(0.0, least=0, most=1)
    # This is added to a symbol's log-probability for each frame that it comes earlier.
    delay_penalty: float = setting(0.0, least=0, most=10)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.lm_scale + self.am_scale <= 1, "am_scale", "at most 1 - model.lm_scale")


class StreamState(NamedTuple):
    """All that a stream carries from chunk to chunk."""

    embed_BCTW: Tensor
    encoder: Any
    processed: tuple[Tensor, ...]  # (B,) int64: frames at 50 Hz that the encoder has had; empty without left context


class Losses(NamedTuple):
    """One value an utterance; ctc_B is None without a CTC head."""

    simple_B: Tensor
    pruned_B: Tensor
    ctc_B: Tensor | None


class Passes(NamedTuple):
    """How the two heavy passes of `Transducer.forward` run: by the model's methods, or by forms that stand in for them.

    Attributes:
        encode: stands in for `Transducer.encode`.
        losses: stands in for `Transducer.transducer_losses`.
        left_on_device: whether `encode` takes the visible left context as a number on the device.
        every_frame: whether `losses` computes all padded frames, so that shapes depend on the batch's shape alone.
    """

    encode: Callable[..., tuple[Tensor, ...]]
    losses: Callable[..., tuple[Tensor, ...]]
    left_on_device: bool = False
    every_frame: bool = False


class Transducer(nn.Module):
    """The whole model. Parameter names are those of published Zipformer transducers."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        encoder = config.encoder
        self.encoder_embed = ConvSubsampling(encoder.embed_dim, encoder.embed_channels, DROPOUT)
        self.encoder = make_encoder(encoder)
        width = self.encoder.out_channels
        self.decoder = Predictor(vocab_size, config.predictor_dim, config.context_size)
        self.joiner = Joiner(width, config.predictor_dim, config.joiner_dim, vocab_size)
        self.simple_am_proj = scaled_linear(width, vocab_size, 0.25)
        self.simple_lm_proj = scaled_linear(config.predictor_dim, vocab_size, 0.25)
        if config.ctc:
            # Dropout and log-softmax hold no weights, but give the Linear its published name, ctc_output.1.
            self.ctc_output = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, vocab_size), nn.LogSoftmax(dim=-1))

    def encode(
        self, features_BTF: Tensor, lens_B: Tensor, chunk: int = -1, left_context: int | Tensor = -1
    ) -> tuple[Tensor, Tensor]:
        """Whole utterances -> (B, S, D) and lengths, masked as streaming would be.

        Args:
            chunk, left_context: in frames of 20 ms, -1 for all there is; a tensor as for `context_of_sequences`.
        """
        x_BTD, lens_B = self.encoder_embed(features_BTF, lens_B)
        return self.encoder(x_BTD, lens_B, chunk, left_context)

    def init_state(self, batch_size: int, left_context: int, device: torch.device | None = None) -> StreamState:
        """The state at the start of `batch_size` streams, left_context in frames of 20 ms."""
        return StreamState(
            self.encoder_embed.init_state(batch_size, device),
            self.encoder.init_state(batch_size, left_context, device),
            (torch.zeros(batch_size, dtype=torch.int64, device=device),) if left_context else (),
        )

    def stream(self, features_BTF: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """One chunk: 2C + 13 feature frames -> (B, C/2, D) and the new state. The next chunk starts 2C frames later.

        Raises:
            ValueError: if C is not a multiple of the encoder's `chunk_multiple`.
        """
        frames, rest = divmod(int(features_BTF.shape[1]) - CHUNK_OVERLAP, 2)  # a constant in an exported model
        factor = self.config.encoder.chunk_multiple
        if rest or frames <= 0 or frames % factor:
            raise ValueError(
                f"{features_BTF.shape[1]} feature frames a chunk: give 2C + {CHUNK_OVERLAP}, C a multiple of {factor}"
            )
        x_BTD, embed = self.encoder_embed.stream(features_BTF, state.embed_BCTW)
        processed_B = state.processed[0] if state.processed else None
        out_BSD, encoder = self.encoder.stream(x_BTD, state.encoder, processed_B)
        return out_BSD, StreamState(embed, encoder, tuple(count_B + frames for count_B in state.processed))

    def forward(
        self,
        features_BTF: Tensor,
        feature_lens_B: Tensor,
        tokens_BU: Tensor,
        token_lens_B: Tensor,
        chunk: int = -1,
        left_context: int = -1,
        passes: Passes | None = None,
    ) -> Losses:
        """The losses of a batch, -log p(tokens), one an utterance; infinite where no alignment exists.

        Args:
            features_BTF: log-mels, padded.
            feature_lens_B, token_lens_B: valid frames and tokens; on the CPU they save waits for the device.
            tokens_BU: ids, padded with any valid id.
            chunk, left_context: as for `encode`.
            passes: what runs in the place of the model's own methods; None runs these.
        """
        passes = passes or Passes(self.encode, self.transducer_losses)
        lens_B = to_device(feature_lens_B, features_BTF.device)
        left: int | Tensor = left_context
        if passes.left_on_device:
            left = to_device(torch.tensor(visible_left_context(chunk, left_context)), features_BTF.device)
        encoder_out_BSD, _ = passes.encode(features_BTF, lens_B, chunk, left)
        frames_B = units.output_frames(feature_lens_B)
        config, size = self.config, (encoder_out_BSD.shape[1], tokens_BU.shape[1])
        lattices = Lattices.of(
            frames_B,
            token_lens_B,
            *size,
            config.prune_range,
            config.rnnt_type,
            features_BTF.device,
            every_frame=passes.every_frame,
        )
        simple_B, pruned_B = passes.losses(encoder_out_BSD, tokens_BU, *lattices)
        ctc_B = self._ctc_loss(encoder_out_BSD, frames_B, tokens_BU, token_lens_B) if config.ctc else None
        return Losses(simple_B, pruned_B, ctc_B)

    def transducer_losses(
        self, encoder_out_BSD: Tensor, tokens_BU: Tensor, *lattices: Any, backend: str = "torch"
    ) -> tuple[Tensor, Tensor]:
        """Simple and pruned loss of each utterance, for the fields of `Lattices`.

        Raises:
            ValueError: as `pruned_loss.require_backend`.
        """
        decoder_out_BUD = self.decoder(nn.functional.pad(tokens_BU, (1, 0)))
        config = self.config
        return LatticeLosses(
            vocabulary_projection(self.simple_am_proj, encoder_out_BSD, backend),
            vocabulary_projection(self.simple_lm_proj, decoder_out_BUD, backend),
            self.joiner.encoder_proj(encoder_out_BSD),
            self.joiner.decoder_proj(decoder_out_BUD),
            self.joiner,
            tokens_BU,
            Lattices(*lattices),
            config.lm_scale,
            config.am_scale,
            config.rnnt_type,
            config.delay_penalty,
        ).of_utterances(backend)

    def _ctc_loss(self, encoder_out_BSD: Tensor, frames_B: Tensor, tokens_BU: Tensor, lens_B: Tensor) -> Tensor:
        log_probs_SBV = self.ctc_output(encoder_out_BSD).float().transpose(0, 1)
        # An infinite loss of ctc_loss itself would have NaN gradients, whatever it is multiplied by.
        ctc_B = nn.functional.ctc_loss(log_probs_SBV, tokens_BU, frames_B, lens_B, reduction="none", zero_infinity=True)
        frames_B, lens_B = (to_device(x_B, tokens_BU.device) for x_B in (frames_B, lens_B))
        # Between two equal tokens there must be a blank.
        positions_U = torch.arange(tokens_BU.shape[1], device=tokens_BU.device)[1:]
        repeated_BU = (tokens_BU[:, 1:] == tokens_BU[:, :-1]) & (positions_U < lens_B[:, None])
        return ctc_B.masked_fill(frames_B < lens_B + repeated_BU.sum(dim=1), math.inf)

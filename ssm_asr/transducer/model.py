"""The transducer: front end, encoder, predictor and joiner, with the losses that train them.

Shapes: B batch, T feature frames (100 Hz), S output frames (25 Hz), D encoder channels, U tokens, V vocabulary, F mels.
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
from ssm_asr.ops.attention import context_on_device
from ssm_asr.ops.devices import to_device
from ssm_asr.ops.numbers import Count
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
    """The state of streams between chunks.

    Attributes:
        embed_BCTW: the state of the front end.
        encoder: the state of the encoder.
        processed: one tensor (B,), int64: frames at 50 Hz that the encoder has had; empty without left context.
    """

    embed_BCTW: Tensor
    encoder: Any
    processed: tuple[Tensor, ...]


class Losses(NamedTuple):
    """The losses of a batch in nats, one value for each utterance; ctc_B is None without a CTC head."""

    simple_B: Tensor
    pruned_B: Tensor
    ctc_B: Tensor | None


class Passes(NamedTuple):
    """The functions that compute the two heavy passes of `Transducer.forward`, such as captured CUDA graphs.

    Attributes:
        encode: is called in place of `Transducer.encode`.
        losses: is called in place of `Transducer.transducer_losses`.
        context_on_device: whether `encode` takes chunk and left context as numbers on the device.
        every_frame: whether `losses` computes all padded frames, so that its shapes depend only on the batch's shape.
    """

    encode: Callable[..., tuple[Tensor, ...]]
    losses: Callable[..., tuple[Tensor, ...]]
    context_on_device: bool = False
    every_frame: bool = False


class Transducer(nn.Module):
    """The whole model. Its parameters have the names that published Zipformer transducers give them.

    Args:
        config: everything about the model but the size of the vocabulary.
        vocab_size: V, with the blank.
    """

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
            # As the second of three modules the linear layer has its name in published checkpoints, ctc_output.1.
            self.ctc_output = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, vocab_size), nn.LogSoftmax(dim=-1))

    def encode(
        self, features_BTF: Tensor, lens_B: Tensor, chunk: Count = -1, left_context: Count = -1
    ) -> tuple[Tensor, Tensor]:
        """Encodes whole utterances, masked to what streaming sees.

        Args:
            features_BTF: log-mels, padded.
            lens_B: lengths in feature frames.
            chunk: in frames of 20 ms; -1 is the whole utterance.
            left_context: in frames of 20 ms, -1 for all. Both may be tensors, as `context_of_sequences` takes them.

        Returns:
            The output (B, S, D), and the lengths (B,) in output frames.
        """
        x_BTD, lens_B = self.encoder_embed(features_BTF, lens_B)
        return self.encoder(x_BTD, lens_B, chunk, left_context)

    def init_state(self, batch_size: int, left_context: int, device: torch.device | None = None) -> StreamState:
        """Returns the state at the start of `batch_size` streams; left_context is in frames of 20 ms."""
        return StreamState(
            self.encoder_embed.init_state(batch_size, device),
            self.encoder.init_state(batch_size, left_context, device),
            (torch.zeros(batch_size, dtype=torch.int64, device=device),) if left_context else (),
        )

    def stream(self, features_BTF: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Encodes one chunk of C frames of 20 ms; returns the output (B, C/2, D) and the new state.

        Args:
            features_BTF: T = 2C + 13 feature frames; the next chunk starts 2C feature frames later.
            state: the state that the previous chunk returned; it is not changed.

        Raises:
            ValueError: if T is not 2C + 13 for a C that is a multiple of the encoder's `chunk_multiple`.
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
        """Computes the losses of a batch: -log p(tokens) of each utterance, infinite where no alignment exists.

        Args:
            features_BTF: log-mels, padded.
            feature_lens_B: lengths in feature frames. If they are on the CPU, the host need not wait for a GPU.
            tokens_BU: token ids, padded with any valid id.
            token_lens_B: lengths in tokens, on the CPU for the same reason.
            chunk, left_context: see `encode`; numbers of frames only.
            passes: functions to call in place of the model's own methods; None calls the methods.

        Raises:
            ValueError: as in `Lattices.from_lengths`.
        """
        passes = passes or Passes(self.encode, self.transducer_losses)
        lens_B = to_device(feature_lens_B, features_BTF.device)
        context: tuple[Count, Count] = chunk, left_context
        if passes.context_on_device:
            context = context_on_device(chunk, left_context, features_BTF.device)
        encoder_out_BSD, _ = passes.encode(features_BTF, lens_B, *context)
        frames_B = units.output_frames(feature_lens_B)
        config, size = self.config, (encoder_out_BSD.shape[1], tokens_BU.shape[1])
        lattices = Lattices.from_lengths(
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
        """Computes the simple and the pruned loss (B,) of each utterance.

        Args:
            encoder_out_BSD: output of the encoder.
            tokens_BU: token ids, padded with any valid id.
            lattices: the fields of `Lattices`, one by one, because `Graphs` looks for tensors among the arguments.
            backend: "torch" or "k2".

        Raises:
            ValueError: as in `pruned_loss.require_backend`.
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
        ).compute(backend)

    def _ctc_loss(self, encoder_out_BSD: Tensor, frames_B: Tensor, tokens_BU: Tensor, lens_B: Tensor) -> Tensor:
        """Computes the CTC loss (B,) of each utterance; it is infinite where no alignment exists."""
        log_probs_SBV = self.ctc_output(encoder_out_BSD).float().transpose(0, 1)
        # Without zero_infinity an infinite loss would have NaN gradients, even if it is masked out afterwards.
        ctc_B = nn.functional.ctc_loss(log_probs_SBV, tokens_BU, frames_B, lens_B, reduction="none", zero_infinity=True)
        frames_B, lens_B = (to_device(x_B, tokens_BU.device) for x_B in (frames_B, lens_B))
        # An alignment needs a frame for each token, and one more for the blank between two equal tokens.
        positions_U = torch.arange(tokens_BU.shape[1], device=tokens_BU.device)[1:]
        repeated_BU = (tokens_BU[:, 1:] == tokens_BU[:, :-1]) & (positions_U < lens_B[:, None])
        return ctc_B.masked_fill(frames_B < lens_B + repeated_BU.sum(dim=1), math.inf)

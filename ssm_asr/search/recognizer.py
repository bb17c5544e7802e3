"""Streaming recognition, as in production: audio in as it comes, text out chunk by chunk, many streams in one batch.

Shapes: B streams, S samples, T feature frames, F mels, C chunk in encoder frames (20 ms).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssm_asr import units
from ssm_asr.checkpoint import Loaded
from ssm_asr.data.features import OnlineFbank
from ssm_asr.encoder.state import select_states, stack_states
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.ops.attention import visible_left_context
from ssm_asr.search import make_search
from ssm_asr.search.scorer import TransducerScorer
from ssm_asr.transducer.model import EncoderConfig, StreamState, Transducer


def streaming_context(encoder: EncoderConfig, chunk: int, left_context: int) -> int:
    """The left context that chunks really see, in frames of 20 ms like the arguments.

    Raises:
        ValueError: if the model cannot stream, or not with this chunk or left context.
    """
    factor = encoder.chunk_multiple
    if not encoder.causal:
        raise ValueError("this model was trained without chunks (encoder.causal=false); decode it without --chunk")
    if chunk <= 0 or chunk % factor:
        raise ValueError(f"chunk of {chunk} frames: give a multiple of {factor} (frames of 20 ms)")
    if left_context < 0:
        raise ValueError(f"left context of {left_context} frames: with chunks, give 0 or more (frames of 20 ms)")
    return visible_left_context(chunk, left_context)


def pad_to_chunks(features_TF: Tensor, chunk: int) -> Tensor:
    """Features of a whole utterance, padded with silence to the 2·C·n + 13 frames that n whole chunks take."""
    chunks = -(-max(1, units.embed_frames(features_TF.shape[0])) // chunk)
    missing = 2 * chunk * chunks + CHUNK_OVERLAP - features_TF.shape[0]
    return torch.nn.functional.pad(features_TF, (0, 0, 0, missing), value=units.LOG_MEL_SILENCE)


def encode_as_streamed(
    model: Transducer, features_BTF: Tensor, lens_B: Tensor, chunk: int, left_context: int
) -> tuple[Tensor, list[int]]:
    """Encodes whole utterances so that each frame comes out as it would from streaming, whatever else is in the batch.

    Streaming pads an utterance to whole chunks, so this does too; the frames of that padding are not counted. Without
    chunks, an utterance gets as much as fills the last frame of the coarsest stack, which else took it from the batch.

    Args:
        chunk, left_context: in frames of 20 ms; chunk -1 for the whole utterance.

    Returns:
        Encoder output (B, S, D) and the number of valid frames of each utterance.
    """
    lens = lens_B.tolist()
    unit = chunk if chunk > 0 else model.config.encoder.chunk_multiple
    rows = [pad_to_chunks(row[:length].cpu(), unit) for row, length in zip(features_BTF, lens, strict=True)]
    # Without chunks, what is beyond the last of these frames counts as padding, as it would in a longer batch.
    beyond = 0 if chunk > 0 else CHUNK_OVERLAP - units.feature_frames(0)
    lens_B = torch.tensor([len(row) - beyond for row in rows])
    features_BTF = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=units.LOG_MEL_SILENCE).to(
        features_BTF.device
    )
    encoder_out, _ = model.encode(features_BTF, lens_B.to(features_BTF.device), chunk, left_context)
    return encoder_out, [units.output_frames(length) for length in lens]


def encode_by_chunks(model: Transducer, features_TF: Tensor, chunk: int, left_context: int) -> Tensor:
    """Encodes one whole utterance as streaming does, chunk after chunk with explicit state.

    Args:
        left_context: in frames of 20 ms like chunk, as `streaming_context` gives it.

    Returns:
        Encoder output (S, D), the frames of the last chunk's padding cut off.
    """
    padded_TF = pad_to_chunks(features_TF, chunk)
    state = model.init_state(1, left_context, features_TF.device)
    parts = []
    for start in range(0, len(padded_TF) - CHUNK_OVERLAP, 2 * chunk):
        out_BSD, state = model.stream(padded_TF[None, start : start + 2 * chunk + CHUNK_OVERLAP], state)
        parts.append(out_BSD[0])
    return torch.cat(parts)[: units.output_frames(len(features_TF))]


class Stream:
    """One audio stream: features that wait to be encoded, the model's state, the search's state."""

    def __init__(self, state: StreamState, search_state: Any) -> None:
        self.state, self.search_state = state, search_state
        self.frames_left: int | None = None  # output frames to come; None while audio may still come
        self._fbank = OnlineFbank()
        self._pending: list[Tensor] = []
        self._received = 0  # feature frames, padding not counted
        self._encoded = 0  # feature frames

    def accept(self, samples_S: np.ndarray | Tensor) -> None:
        """Takes more audio: 16 kHz mono, in [-1, 1], any number of samples."""
        if self.frames_left is not None:
            raise ValueError("audio after finish(): open a new stream")
        self._add(self._fbank.push(samples_S))

    def finish(self, chunk: int) -> None:
        """Says that the audio has ended: the rest is padded with silence to a whole chunk."""
        if self.frames_left is not None:
            raise ValueError("finish() was called before: a stream ends once")
        self._add(self._fbank.finish())
        self.frames_left = max(0, units.output_frames(self._received) - self._encoded // units.SUBSAMPLING)
        chunks = -(-self.frames_left * units.OUTPUT_SUBSAMPLING // chunk)
        needed = 2 * chunk * chunks + CHUNK_OVERLAP if chunks else 0
        missing = needed - self.waiting
        if missing > 0:
            self._pending.append(torch.full((missing, units.NUM_MELS), units.LOG_MEL_SILENCE))

    @property
    def waiting(self) -> int:
        """Feature frames that are not encoded yet."""
        return sum(len(part) for part in self._pending)

    def take(self, frames: int, hop: int) -> Tensor:
        """The next `frames` feature frames (T, F), of which the first `hop` will not be needed again."""
        if len(self._pending) > 1:
            self._pending = [torch.cat(self._pending)]
        features_TF = self._pending[0]
        self._pending = [features_TF[hop:]]
        self._encoded += hop
        return features_TF[:frames]

    def _add(self, features_TF: Tensor) -> None:
        if len(features_TF):
            self._pending.append(features_TF)
            self._received += len(features_TF)


class StreamingRecognizer:
    """Decodes any number of streams with one model.

    Args:
        chunk, left_context: in frames of 20 ms; what the checkpoint's configuration says if None.

    Raises:
        ValueError: if the model cannot stream, or not with this chunk.
    """

    def __init__(
        self,
        loaded: Loaded,
        chunk: int | None = None,
        left_context: int | None = None,
        method: str | None = None,
        beam: int | None = None,
    ) -> None:
        decode = loaded.experiment.decode
        self.chunk = decode.chunk_frames if chunk is None else chunk
        self.left_context = streaming_context(
            loaded.experiment.model.encoder,
            self.chunk,
            decode.left_context_frames if left_context is None else left_context,
        )
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.device = next(loaded.model.parameters()).device
        self._scorer = TransducerScorer(loaded.model, loaded.tokenizer.unk_id)
        self.method, self.beam = method or decode.method, decode.beam if beam is None else beam
        self._search = make_search(self.method, self._scorer, self.beam)

    @property
    def frames_needed(self) -> int:
        """Feature frames that a chunk takes."""
        return 2 * self.chunk + CHUNK_OVERLAP

    def open(self) -> Stream:
        """A new stream, everything at zero."""
        return Stream(self.model.init_state(1, self.left_context, self.device), self._search.start())

    def finish(self, stream: Stream) -> None:
        """Ends a stream; its last chunks are then ready."""
        stream.finish(self.chunk)

    def ready(self, stream: Stream) -> bool:
        """Whether a chunk of the stream can be decoded now."""
        return stream.waiting >= self.frames_needed and stream.frames_left != 0

    @torch.inference_mode()
    def decode(self, streams: list[Stream]) -> None:
        """Decodes one chunk of each stream, all in one batch.

        Raises:
            ValueError: if a stream is not ready.
        """
        if not all(self.ready(stream) for stream in streams):
            raise ValueError("a stream without a whole chunk to decode: ask ready() first")
        features_BTF = torch.stack([stream.take(self.frames_needed, 2 * self.chunk) for stream in streams])
        state = stack_states([stream.state for stream in streams])
        encoder_out, state = self.model.stream(features_BTF.to(self.device), state)
        lens = []
        for b, stream in enumerate(streams):
            frames = encoder_out.shape[1]
            if stream.frames_left is not None:
                frames = min(frames, stream.frames_left)
                stream.frames_left -= frames
            lens.append(frames)
            stream.state = select_states(state, [b])
        states = self._search.step(self._scorer.project(encoder_out), lens, [stream.search_state for stream in streams])
        for stream, search_state in zip(streams, states, strict=True):
            stream.search_state = search_state

    def tokens(self, stream: Stream) -> tuple[int, ...]:
        """The tokens recognised so far."""
        return self._search.tokens(stream.search_state)

    def text(self, stream: Stream) -> str:
        """What has been recognised so far."""
        return self.tokenizer.decode(self.tokens(stream))

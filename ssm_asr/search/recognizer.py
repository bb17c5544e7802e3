"""Streaming recognition as in production: audio goes in as it comes, and text comes out chunk by chunk.

Any number of streams share one model and are decoded in one batch.

Shapes: B streams, S samples, T feature frames, F mels, C chunk in encoder frames (20 ms).
"""

from typing import Any

import torch
from torch import Tensor

from ssm_asr.checkpoint import Loaded
from ssm_asr.encoder.state import Row, join_rows, leaves, rebuild
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.ops.capture import Captured, Outputs
from ssm_asr.search import make_search
from ssm_asr.search.audio_stream import AudioStream
from ssm_asr.search.encoding import streaming_context
from ssm_asr.search.result import Result, make_result
from ssm_asr.search.scorer import TransducerScorer


class Recognizer:
    """A model with a search over its output.

    Attributes:
        model, tokenizer: what the checkpoint holds.
        device: the device that the model computes on.
        chunk, left_context: in frames of 20 ms, -1 for all there is.
        method, beam: the search and its number of hypotheses.
    """

    chunk: int
    left_context: int

    def __init__(self, loaded: Loaded, method: str | None, beam: int | None) -> None:
        decode = loaded.experiment.decode
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.device = next(loaded.model.parameters()).device
        self.method, self.beam = method or decode.method, decode.beam if beam is None else beam
        self._scorer = TransducerScorer(loaded.model, loaded.tokenizer.unk_id)
        self._search = make_search(self.method, self._scorer, self.beam)

    def _result_of(self, search_state: Any) -> Result:
        """The text, tokens and times of a search state."""
        search = self._search
        return make_result(self.tokenizer, search.tokens(search_state), search.emitted_frames(search_state))


class StreamingRecognizer(Recognizer):
    """Decodes any number of streams with one model.

    Args:
        chunk, left_context: in frames of 20 ms; the checkpoint's configuration gives them if None.
        method, beam: the search and its number of hypotheses; the configuration gives them if None.

    Raises:
        ValueError: if the model cannot stream, or not with this chunk or left context, or there is no such search.
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
        super().__init__(loaded, method, beam)
        self._new = self.model.init_state(1, self.left_context, self.device)
        self._encode = Captured(self._encode_chunk)

    @property
    def frames_needed(self) -> int:
        """The number of feature frames that a chunk takes."""
        return 2 * self.chunk + CHUNK_OVERLAP

    def open(self) -> AudioStream:
        """Opens a new stream, whose states are all zeros."""
        return AudioStream(Row(self._new, 0), self._search.start())

    def finish(self, stream: AudioStream) -> None:
        """Ends a stream, after which its last chunks are ready.

        Raises:
            ValueError: if it has ended before.
        """
        stream.finish(self.chunk)

    def ready(self, stream: AudioStream) -> bool:
        """Tells whether a chunk of the stream can be decoded now."""
        return stream.waiting >= self.frames_needed and stream.frames_left != 0

    @torch.inference_mode()
    def decode(self, streams: list[AudioStream]) -> None:
        """Decodes one chunk of each stream, all in one batch.

        Raises:
            ValueError: if a stream is not ready.
        """
        if not all(self.ready(stream) for stream in streams):
            raise ValueError("a stream without a whole chunk to decode: ask ready() first")
        if not streams:
            return
        streams = sorted(streams, key=lambda stream: (id(stream.state.batch), stream.state.place))
        # On a GPU the numbers of streams are few, so that one of few graphs serves: rows after the streams are idle.
        count = 1 << (len(streams) - 1).bit_length() if self.device.type == "cuda" else len(streams)
        idle = count - len(streams)
        features = [stream.take(self.frames_needed, 2 * self.chunk) for stream in streams]
        state = join_rows([stream.state for stream in streams] + [streams[-1].state] * idle)
        features_BTF = torch.stack(features + features[-1:] * idle).to(self.device)
        encoder_out_BSJ, *tensors = self._encode(features_BTF, *(tensor for _, tensor in leaves(state)))
        state = rebuild(state, iter(tensors))
        lens = [0] * count
        for b, stream in enumerate(streams):
            lens[b] = encoder_out_BSJ.shape[1]
            if stream.frames_left is not None:
                lens[b] = min(lens[b], stream.frames_left)
                stream.frames_left -= lens[b]
            stream.state = Row(state, b)
        search_states = [stream.search_state for stream in streams] + [self._search.start()] * idle
        for stream, search_state in zip(streams, self._search.step(encoder_out_BSJ, lens, search_states), strict=False):
            stream.search_state = search_state

    def _encode_chunk(self, features_BTF: Tensor, *tensors: Tensor) -> Outputs:
        """Returns the projected encoder output of a chunk and the tensors of the new state, given those of the old."""
        out_BSD, state = self.model.stream(features_BTF, rebuild(self._new, iter(tensors)))
        return self._scorer.project(out_BSD), *(tensor for _, tensor in leaves(state))

    def decode_ready(self, streams: list[AudioStream]) -> int:
        """Decodes until none of the streams is ready, and returns the number of batches that it took."""
        batches = 0
        while ready := [stream for stream in streams if self.ready(stream)]:
            self.decode(ready)
            batches += 1
        return batches

    def tokens(self, stream: AudioStream) -> tuple[int, ...]:
        """Returns the ids of the tokens recognised so far."""
        return self._search.tokens(stream.search_state)

    def text(self, stream: AudioStream) -> str:
        """Returns the text recognised so far."""
        return self.tokenizer.decode(self.tokens(stream))

    def result(self, stream: AudioStream) -> Result:
        """Returns the text, tokens and times of what was recognised so far."""
        return self._result_of(stream.search_state)

    def settled_text(self, stream: AudioStream) -> str:
        """Returns the beginning of the text that no later audio can change: with greedy search, all of it."""
        return self.tokenizer.decode(self.tokens(stream)[: self._search.settled(stream.search_state)])

"""Recognition of whole utterances, many in one batch, without chunks or as streaming would be.

Shapes: B utterances, T feature frames, F mels, S output frames, D encoder width, J joiner dim.
"""

from typing import Any

import torch
from torch import Tensor

from ssm_asr import units
from ssm_asr.checkpoint import Loaded
from ssm_asr.ops.capture import Captured, Outputs
from ssm_asr.search.encoding import encode_as_streamed, encode_by_chunks, streaming_context
from ssm_asr.search.recognizer import Recognizer
from ssm_asr.search.result import Result

# The memory of one pass grows with the square of an utterance's length. Longer utterances go chunk after chunk.
LONGEST_IN_ONE_PASS = 60_000 // units.FRAME_SHIFT_MS  # feature frames: 60 s


class OfflineRecognizer(Recognizer):
    """Recognises utterances whose audio is all there.

    With a chunk, the encoder is masked to chunks, so that the result is the one of streaming. Without, each frame sees
    the whole utterance.

    Args:
        chunk, left_context: in frames of 20 ms, -1 for all there is. If None, the checkpoint's configuration
            gives them; a model that is not causal then sees whole utterances.
        method, beam: the search and its number of hypotheses; the configuration gives them if None.

    Raises:
        ValueError: if the model cannot do this chunk or left context, or there is no such search.
    """

    def __init__(
        self,
        loaded: Loaded,
        chunk: int | None = None,
        left_context: int | None = None,
        method: str | None = None,
        beam: int | None = None,
    ) -> None:
        self.chunk, self.left_context = _visible(loaded, chunk, left_context)
        super().__init__(loaded, method, beam)
        self._encode_projected = Captured(self._project_encoded)

    @torch.inference_mode()
    def recognise(self, features_BTF: Tensor, lens_B: Tensor) -> list[Result]:
        """Recognises a batch of utterances; what else is in the batch changes no result, but for rounding.

        Args:
            features_BTF: log-mel features, padded at their ends, on any device.
            lens_B: the number of feature frames of each utterance, int64.
        """
        encoder_out_BSJ, lens = self._encode(features_BTF.to(self.device), lens_B)
        starts = [self._search.start() for _ in lens]
        states = self._search.step(encoder_out_BSJ, lens, starts)
        return [self._result_of(state) for state in states]

    def _encode(self, features_BTF: Tensor, lens_B: Tensor) -> tuple[Tensor, list[int]]:
        """Projected encoder output (B, S, J), and the number of valid frames of each utterance."""
        can_stream = self.chunk > 0 and self.left_context >= 0
        if not can_stream or features_BTF.shape[1] <= LONGEST_IN_ONE_PASS:
            return encode_as_streamed(
                self.model, features_BTF, lens_B, self.chunk, self.left_context, self._encode_projected
            )
        parts = [
            self._scorer.project(encode_by_chunks(self.model, features_TF[:length], self.chunk, self.left_context))
            for features_TF, length in zip(features_BTF, lens_B.tolist(), strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True), [len(part_SJ) for part_SJ in parts]

    def _project_encoded(self, *arguments: Any) -> Outputs:
        """Calls `model.encode`, and projects its output."""
        return (self._scorer.project(self.model.encode(*arguments)[0]),)


def _visible(loaded: Loaded, chunk: int | None, left_context: int | None) -> tuple[int, int]:
    """The chunk and the left context that it sees, in frames of 20 ms; -1 for all there is."""
    decode, encoder = loaded.experiment.decode, loaded.experiment.model.encoder
    if chunk is None:
        chunk = decode.chunk_frames if encoder.causal else -1
    if chunk == -1:
        if left_context not in (None, -1):
            raise ValueError(
                f"left context of {left_context} frames: whole utterances are decoded, which see all there is; "
                "give none, or a chunk"
            )
        return -1, -1
    left_context = decode.left_context_frames if left_context is None else left_context
    visible = streaming_context(encoder, chunk, 0 if left_context == -1 else left_context)
    return chunk, -1 if left_context == -1 else visible

"""One stream of audio on its way through a recogniser.

Shapes: S samples, T feature frames, F mels, C chunk in encoder frames (20 ms).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssm_asr import units
from ssm_asr.data.features import OnlineFbank
from ssm_asr.data.samples import check_samples
from ssm_asr.encoder.state import Row
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP


class AudioStream:
    """One audio stream: the features that wait to be encoded, the model's state and the search's state.

    Attributes:
        state: the model's state; the recogniser replaces it after every chunk.
        search_state: the search's state; the recogniser replaces it, too.
        frames_left: the output frames that are still to come after `finish`; None while more audio may come.
    """

    def __init__(self, state: Row, search_state: Any) -> None:
        self.state, self.search_state = state, search_state
        self.frames_left: int | None = None
        self._fbank = OnlineFbank()
        self._pending: list[Tensor] = []
        self._received = 0  # feature frames, without padding
        self._encoded = 0  # feature frames

    def accept(self, samples_S: np.ndarray | Tensor) -> None:
        """Takes more audio.

        Args:
            samples_S: any number of samples of one channel at 16 kHz, floats in [-1, 1].

        Raises:
            ValueError: if the samples cannot be used, or the stream has ended.
        """
        if self.frames_left is not None:
            raise ValueError("audio after finish(): open a new stream")
        self._add(self._fbank.push(check_samples(samples_S)))

    def accept_features(self, features_TF: Tensor) -> None:
        """Takes all features of a recording instead of its samples; `finish` must follow.

        Raises:
            ValueError: if the stream has ended.
        """
        if self.frames_left is not None:
            raise ValueError("features after finish(): open a new stream")
        self._add(features_TF)

    def finish(self, chunk: int) -> None:
        """Takes note that the audio has ended, and pads it with silence to a whole chunk.

        Args:
            chunk: in frames of 20 ms.

        Raises:
            ValueError: if the stream has ended before.
        """
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
        """The number of feature frames that are not encoded yet."""
        return sum(len(part) for part in self._pending)

    def take(self, frames: int, hop: int) -> Tensor:
        """Returns the next `frames` feature frames (T, F), and forgets the first `hop` of them."""
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

"""The front door of the library: it loads a checkpoint, transcribes recordings and recognises live audio.

    model = ssm_asr.load("averaged.pt")
    print(model.transcribe("a.wav").text)
    with model.stream(chunk="320ms") as stream:
        for block in blocks:
            print(stream.push(block).text)

Shapes: S samples.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, overload

import numpy as np
import torch

from ssm_asr import units
from ssm_asr.checkpoint import Loaded, load_model
from ssm_asr.data.features import AudioError, OnlineFbank, read_audio
from ssm_asr.data.samples import check_samples
from ssm_asr.ops.devices import find_device
from ssm_asr.search.offline import OfflineRecognizer
from ssm_asr.search.recognizer import StreamingRecognizer
from ssm_asr.search.result import Result

Audio = str | Path | np.ndarray | torch.Tensor  # a file, or samples of one channel at 16 kHz, floats in [-1, 1]
Time = str | int  # "320ms", "0.32s", or a number of frames of 20 ms

BATCH_S = 200.0  # audio in one batch, padding included
WINDOW_S = 600.0  # audio that is held at a time, from which batches of like lengths are made


def load(path: str | Path, device: str | torch.device = "auto") -> "Model":
    """Loads the model of a checkpoint. No code from the file is run.

    Args:
        path: a checkpoint of `ssm-asr average`, `train` or `import-icefall`.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.

    Raises:
        ValueError: if the file is missing, damaged or something else, or there is no such device.
    """
    return Model(load_model(path, find_device(str(device))))


class Model:
    """A model that recognises speech, with its tokens and the settings it was trained with.

    Attributes:
        loaded: the PyTorch module, the configuration and the tokenizer of the checkpoint.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return next(self.loaded.model.parameters()).device

    @property
    def causal(self) -> bool:
        """Whether the model can stream. One that cannot transcribes whole utterances."""
        return self.loaded.experiment.model.encoder.causal

    @overload
    def transcribe(
        self,
        audio: list[Audio],
        chunk: Time | None = ...,
        left: Time | None = ...,
        method: str | None = ...,
        beam: int | None = ...,
    ) -> list[Result]: ...

    @overload
    def transcribe(
        self,
        audio: Audio,
        chunk: Time | None = ...,
        left: Time | None = ...,
        method: str | None = ...,
        beam: int | None = ...,
    ) -> Result: ...

    def transcribe(
        self,
        audio: Audio | list[Audio],
        chunk: Time | None = "auto",
        left: Time | None = "auto",
        method: str | None = None,
        beam: int | None = None,
    ) -> Result | list[Result]:
        """Transcribes a recording, or a list of them in batches.

        With a chunk, the result is the one of streaming with this chunk. Without, each frame sees the whole recording,
        and memory grows with the square of its length: cut a long one, or give a chunk, with which memory does not.

        Args:
            audio: a mono file of any rate, an array of samples at 16 kHz in [-1, 1], or a list of either.
            chunk: "320ms", "0.32s", a number of frames of 20 ms, or None for whole recordings. "auto" is the chunk of
                the checkpoint's configuration, or None for a model that is not causal.
            left: the left context that each chunk sees, written as chunk is; None is all that came before. "auto" is
                the left context of the checkpoint's configuration.
            method: greedy or beam; the checkpoint's configuration says which if None.
            beam: the number of hypotheses that beam search keeps; the configuration says how many if None.

        Raises:
            AudioError: for audio that cannot be used; its message is one line.
            ValueError: if the model cannot do this chunk or left context, or there is no such search.
        """
        results = []
        recordings = audio if isinstance(audio, list) else [audio]
        for result in self.transcribe_each(recordings, chunk, left, method, beam):
            if isinstance(result, AudioError):
                raise result
            results.append(result)
        return results if isinstance(audio, list) else results[0]

    def transcribe_each(
        self,
        audio: Iterable[Audio],
        chunk: Time | None = "auto",
        left: Time | None = "auto",
        method: str | None = None,
        beam: int | None = None,
    ) -> Iterator[Result | AudioError]:
        """Transcribes any number of recordings, and yields their results in order, as they come.

        At most 10 minutes of audio are read ahead, or one recording. For audio that cannot be used, its error comes
        instead of a result, and the others go on. `transcribe` explains the arguments.

        Raises:
            ValueError: if the model cannot do this chunk or left context, or there is no such search.
        """
        recognizer = OfflineRecognizer(self.loaded, _frames(chunk), _frames(left), method, beam)
        return (result for window in _windows(audio) for result in _recognise(recognizer, window))

    def stream(
        self, chunk: Time = "auto", left: Time = "auto", method: str | None = None, beam: int | None = None
    ) -> "Stream":
        """Opens a stream of live audio. `transcribe` explains the arguments.

        Raises:
            ValueError: if the model cannot stream, or not with this chunk or left context, or there is no such search.
        """
        return Stream(self.recognizer(chunk, left, method, beam))

    def recognizer(
        self, chunk: Time = "auto", left: Time = "auto", method: str | None = None, beam: int | None = None
    ) -> StreamingRecognizer:
        """Makes a recogniser that decodes many streams in one batch. `transcribe` explains the arguments.

        Raises:
            ValueError: if the model cannot stream, or not with this chunk or left context, or there is no such search.
        """
        return StreamingRecognizer(self.loaded, _frames(chunk), _frames(left), method, beam)


class Stream:
    """A stream of live audio. As a context manager, it ends the stream when the block is left without an error.

    Attributes:
        result: what was recognised so far.
    """

    def __init__(self, recognizer: StreamingRecognizer) -> None:
        self.result = Result()
        self._recognizer, self._stream = recognizer, recognizer.open()

    def push(self, samples: np.ndarray | torch.Tensor) -> Result:
        """Takes more audio, and returns what was recognised so far.

        Args:
            samples: any number of samples of one channel at 16 kHz, floats in [-1, 1].

        Raises:
            ValueError: if the samples cannot be used, or the stream has ended.
        """
        self._stream.accept(samples)
        return self._decode()

    def finish(self) -> Result:
        """Ends the stream, and returns all that was recognised. A stream that has ended stays as it is."""
        if self._stream.frames_left is None:
            self._recognizer.finish(self._stream)
        return self._decode()

    @property
    def settled_text(self) -> str:
        """The beginning of the text that no later audio can change: with greedy search, all of it."""
        return self._recognizer.settled_text(self._stream)

    def _decode(self) -> Result:
        if self._recognizer.decode_ready([self._stream]):
            self.result = self._recognizer.result(self._stream)
        return self.result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()


def _frames(time: Time | None) -> int | None:
    """A time as recognisers take it, in frames of 20 ms: None for the checkpoint's, -1 for all there is."""
    if time is None:
        return -1
    return None if time == "auto" else units.parse_frames(time)


def _windows(audio: Iterable[Audio]) -> Iterator[list[np.ndarray | AudioError]]:
    """The samples (S,) of recordings, a few minutes of them at a time; errors stand for those that cannot be used."""
    window: list[np.ndarray | AudioError] = []
    held_s = 0.0
    for n, item in enumerate(audio):
        try:
            samples_S = read_audio(item) if isinstance(item, str | Path) else check_samples(item, f"audio {n}")
        except AudioError as error:
            window.append(error)
            continue
        window.append(samples_S)
        held_s += len(samples_S) / units.SAMPLE_RATE_HZ
        if held_s >= WINDOW_S:
            yield window
            window, held_s = [], 0.0
    yield window


def _recognise(recognizer: OfflineRecognizer, window: list[np.ndarray | AudioError]) -> Iterator[Result | AudioError]:
    """The results of a window in its order; it is recognised in batches of like lengths."""
    recordings = {n: samples for n, samples in enumerate(window) if isinstance(samples, np.ndarray)}
    results: dict[int, Result] = {}
    for batch in _batches({n: len(samples_S) / units.SAMPLE_RATE_HZ for n, samples_S in recordings.items()}):
        features = [_features(recordings[n]) for n in batch]
        features_BTF = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=units.LOG_MEL_SILENCE)
        lens_B = torch.tensor([len(features_TF) for features_TF in features])
        results |= zip(batch, recognizer.recognise(features_BTF, lens_B), strict=True)
    for n, samples in enumerate(window):
        yield samples if isinstance(samples, AudioError) else results[n]


def _batches(lengths_s: dict[int, float]) -> Iterator[list[int]]:
    """The keys in batches, long recordings first; a batch, padded to its longest, has at most BATCH_S or is single."""
    batch: list[int] = []
    for n in sorted(lengths_s, key=lambda n: -lengths_s[n]):
        if batch and (len(batch) + 1) * lengths_s[batch[0]] > BATCH_S:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _features(samples_S: np.ndarray) -> torch.Tensor:
    """The features (T, F) of a recording, computed as a stream computes them."""
    fbank = OnlineFbank()
    return torch.cat([fbank.push(samples_S), fbank.finish()])

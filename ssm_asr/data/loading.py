"""Loads what batches are made of: samples or stored features, and what augmentation does to them; it runs in workers.

Shapes: B utterances, S samples, T feature frames (10 ms), F mel bins, U tokens.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import ssm_asr.data.shar  # noqa: F401  it registers the reader by which workers read features
from ssm_asr.data.augment import Augmentation, Drawer
from ssm_asr.data.config import DataConfig
from ssm_asr.data.errors import CutError
from ssm_asr.data.fbank import batch_fbank, change_speed, num_frames
from ssm_asr.data.features import cut_source, reading
from ssm_asr.data.filtering import text_of
from ssm_asr.data.tokens import Tokenizer
from ssm_asr.units import SAMPLE_RATE_HZ

NOISES_KEPT = 256  # of 10 s each, they take 82 MB of each worker
MOST_BYTES_SENT = 100_000  # larger tensors go to another process in shared memory, which costs it an open file each


class Audio(NamedTuple):
    """The samples of a batch.

    Attributes:
        samples_BS: as they were read, padded with zeros.
        speeds: factors by which utterances are to be made faster, each with the numbers of these utterances.
        num_samples_B: int64, as many samples each utterance then has.
        longest: as many samples the longest then is to have, which may be one more than it has.
    """

    samples_BS: Tensor
    speeds: list[tuple[float, Tensor]]
    num_samples_B: Tensor
    longest: int


class RawBatch(NamedTuple):
    """A batch whose features are still to be computed, or to be augmented.

    Attributes:
        sound: samples, or stored features_BTF.
        frames_B: int64, the lengths of the utterances.
        augmentation: what is to be done to the features.
        least_frames: the batch is padded to at least this many feature frames.
        tokens_BU, token_lens_B, ids, texts: as in a `Batch`.
    """

    sound: Audio | Tensor
    frames_B: Tensor
    augmentation: Augmentation | None
    least_frames: int
    tokens_BU: Tensor
    token_lens_B: Tensor
    ids: list[str]
    texts: list[str]

    def __reduce__(self) -> tuple[Any, ...]:
        """Sends small tensors as numpy arrays, since the receiver opens a connection for each tensor."""
        return _received, tuple(map_parts(value, _as_sent) for value in self)


def _as_sent(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) and value.nbytes <= MOST_BYTES_SENT else value


def _as_received(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _received(*values: Any) -> RawBatch:
    return RawBatch(*(map_parts(value, _as_received) for value in values))


def map_parts(values: Any, function: Callable[[Any], Any]) -> Any:
    """Returns named tuples, and lists and tuples in them, with a function of each part that is none of these."""
    if hasattr(values, "_fields"):
        return type(values)(*(map_parts(value, function) for value in values))
    if isinstance(values, (list, tuple)):
        return type(values)(map_parts(value, function) for value in values)
    return function(values)


class NoiseDraw(NamedTuple):
    """This noise is to be mixed into one utterance."""

    number: int  # among all noises
    snr_db: float


class Job(NamedTuple):
    """A job holds all that a worker needs to make one batch.

    Attributes:
        cuts: the utterances.
        noises: one for each cut.
        key: the seed of the augmentation.
        augmented: whether there is any.
        least_frames: the batch is padded to at least this many feature frames.
    """

    cuts: list[Cut]
    noises: list[NoiseDraw | None]
    key: tuple[int, ...]
    augmented: bool
    least_frames: int = 0


def load_audio(cuts: Iterable[Cut]) -> tuple[Audio, list[int]]:
    """Reads the samples of cuts.

    Returns:
        The samples, and the number of feature frames of each cut.

    Raises:
        CutError: if the samples of a cut cannot be read.
    """
    rows, factors, kept, made = [], [], [], []
    for cut in cuts:
        samples_S, factor = cut_source(cut)
        rows.append(torch.from_numpy(np.ascontiguousarray(samples_S, dtype=np.float32)))
        factors.append(factor)
        kept.append(cut.num_samples)
        made.append(min(cut.num_samples, -(-len(samples_S) * SAMPLE_RATE_HZ // round(SAMPLE_RATE_HZ * factor))))
    speeds = [
        (factor, torch.tensor([row for row, of_row in enumerate(factors) if of_row == factor]))
        for factor in sorted(set(factors))
    ]
    audio = Audio(pad_sequence(rows, batch_first=True), speeds, torch.tensor(made), max(kept))
    return audio, [num_frames(count) for count in kept]


def audio_features(audio: Audio) -> Tensor:
    """Returns features_BTF of samples, on the device of these; what follows the end of an utterance has no meaning."""
    samples_BS = audio.samples_BS.new_zeros(len(audio.samples_BS), audio.longest)
    for factor, rows_N in audio.speeds:
        changed_NS = change_speed(audio.samples_BS[rows_N], factor)[:, : audio.longest]
        samples_BS[rows_N, : changed_NS.shape[1]] = changed_NS
    return batch_fbank(samples_BS, audio.num_samples_B)


def load_features(cut: Cut) -> Tensor:
    """Returns features_TF of a cut: the stored ones if there are any, else they are computed from its audio.

    Raises:
        CutError: if they cannot be read.
    """
    if cut.has_features:
        with reading(cut):
            return torch.from_numpy(np.ascontiguousarray(cut.load_features(), dtype=np.float32))
    audio, (frames,) = load_audio([cut])
    return audio_features(audio)[0, :frames]


class Loader:
    """Turns jobs into raw batches.

    Args:
        tokenizer: makes the tokens.
        config: says how to augment.
        noises: what `NoiseDraw.number` counts.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, noises: list[Cut]) -> None:
        self._tokenizer, self._config, self._noises = tokenizer, config, noises
        self._kept_noises: dict[int, Tensor] = {}

    def load(self, job: Job) -> RawBatch:
        """Loads one batch."""
        sound, frames = self._sound(job.cuts)
        texts, ids = [text_of(cut) for cut in job.cuts], [cut.id for cut in job.cuts]
        augmentation = self._draw(job, frames) if job.augmented else None
        if augmentation is not None and augmentation.joining is not None:
            groups = augmentation.joining.groups
            texts = [" ".join(texts[i] for i in group) for group in groups]
            ids = ["+".join(ids[i] for i in group) for group in groups]
        tokens = [torch.tensor(self._tokenizer.encode(text), dtype=torch.int64) for text in texts]
        return RawBatch(
            sound,
            torch.tensor(frames),
            augmentation,
            job.least_frames,
            pad_sequence(tokens, batch_first=True, padding_value=0),
            torch.tensor([len(tokens_U) for tokens_U in tokens]),
            ids,
            texts,
        )

    def load_readable(self, job: Job) -> tuple[RawBatch | None, list[str]]:
        """Loads the cuts of a job without augmentation that can be read.

        Returns:
            The batch, None if there is no such cut, and what is wrong with each of the others.
        """
        readable, faults = [], []
        for cut in job.cuts:
            try:
                self._sound([cut])
                readable.append(cut)
            except CutError as error:
                faults.append(str(error))
        rest = job._replace(cuts=readable, noises=[None] * len(readable))
        return self.load(rest) if readable else None, faults

    def _sound(self, cuts: list[Cut]) -> tuple[Audio | Tensor, list[int]]:
        """Returns samples, unless a cut has stored features, and the feature frames of each cut."""
        if any(cut.has_features for cut in cuts):
            features = [load_features(cut) for cut in cuts]
            return pad_sequence(features, batch_first=True), [len(features_TF) for features_TF in features]
        return load_audio(cuts)

    def _draw(self, job: Job, frames: list[int]) -> Augmentation:
        drawer = Drawer(self._config, np.random.default_rng(job.key), max(frames))
        for count, noise in zip(frames, job.noises, strict=True):
            drawer.utterance(count, (self._noise(noise.number), noise.snr_db) if noise else None)
        return drawer.finish()

    def _noise(self, number: int) -> Tensor:
        noise_TF = self._kept_noises.get(number)
        if noise_TF is None:
            noise_TF = load_features(self._noises[number])
            if len(self._kept_noises) < NOISES_KEPT:
                self._kept_noises[number] = noise_TF
        return noise_TF

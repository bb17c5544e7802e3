"""Audio -> log-mel filter bank features.

Shapes: S samples, T feature frames (10 ms), F mel bins.
"""

import logging
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import soundfile
import torch
from lhotse import Fbank, FbankConfig
from lhotse.cut import Cut
from lhotse.features import FeatureExtractor
from lhotse.features.kaldifeat import (
    KaldifeatFbank,
    KaldifeatFbankConfig,
    KaldifeatFrameOptions,
    KaldifeatMelOptions,
)

from ssm_asr.units import FRAME_LENGTH_MS, FRAME_SHIFT_MS, NUM_MELS, SAMPLE_RATE_HZ


class AudioError(ValueError):
    """Audio that cannot be used; the message is one line with file, reason and detail.

    Attributes:
        reason: one of a few fixed phrases, so that reasons can be counted.
        detail: numbers and remedy.
    """

    def __init__(self, path: Path | str, reason: str, detail: str = "") -> None:
        super().__init__(f"{path}: {reason}" + (f": {detail}" if detail else ""))
        self.reason = reason
        self.detail = detail


class CutError(ValueError):
    """A cut whose audio or features cannot be read; the message is one line."""


def reason_of(error: Exception) -> str:
    """What lhotse says first; a page on the cut and its callers may follow."""
    return str(error).strip().partition("\n")[0].removesuffix(" Details:") or type(error).__name__


@contextmanager
def reading(cut: Cut) -> Iterator[None]:
    """Within it, what goes wrong is said in one line, not in lhotse's hundred.

    Raises:
        CutError: instead of any other exception.
    """
    try:
        yield
    except Exception as error:
        raise CutError(f"cut {cut.id}: {reason_of(error)}; if files were moved, prepare the corpus anew") from None


def cut_samples(cut: Cut) -> np.ndarray:
    """Samples (S,) of a cut's first channel.

    Raises:
        CutError: if they cannot be read.
    """
    with reading(cut):
        samples_1S: np.ndarray = cut.load_audio()
    return samples_1S[0]


def make_fbank(device: str = "cpu") -> FeatureExtractor:
    """The feature extractor of every recipe: lhotse's Fbank with its defaults, `NUM_MELS` bins.

    On a GPU, kaldifeat computes the same features where it is installed.
    """
    if device != "cpu" and has_kaldifeat():
        return KaldifeatFbank(
            KaldifeatFbankConfig(
                frame_opts=KaldifeatFrameOptions(
                    sampling_rate=SAMPLE_RATE_HZ,
                    frame_length=FRAME_LENGTH_MS / 1000,
                    frame_shift=FRAME_SHIFT_MS / 1000,
                ),
                mel_opts=KaldifeatMelOptions(num_bins=NUM_MELS),
                device=device,
            )
        )
    return Fbank(
        FbankConfig(
            sampling_rate=SAMPLE_RATE_HZ,
            num_filters=NUM_MELS,
            frame_length=FRAME_LENGTH_MS / 1000,
            frame_shift=FRAME_SHIFT_MS / 1000,
            device=device,
        )
    )


def has_kaldifeat() -> bool:
    """Whether kaldifeat can be imported; one that was built for another PyTorch is found but cannot."""
    try:
        import kaldifeat  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


class OnlineFbank:
    """The features of `make_fbank` for audio that arrives piece by piece.

    The first frame is centred 5 ms into the audio and each frame is 25 ms long, so frame t is ready once
    t * 10 + 17.5 ms of audio were pushed; `finish` mirrors the last samples for the frames that stick out
    at the end, as the offline extractor does. Values agree with it to 1e-3 (float32 rounding of two FFTs).
    """

    def __init__(self, sample_rate_hz: int = SAMPLE_RATE_HZ) -> None:
        config = make_fbank().config
        options = kaldi_native_fbank.FbankOptions()
        options.frame_opts.samp_freq = sample_rate_hz
        options.frame_opts.frame_length_ms = FRAME_LENGTH_MS
        options.frame_opts.frame_shift_ms = FRAME_SHIFT_MS
        options.frame_opts.dither = config.dither
        options.frame_opts.preemph_coeff = config.preemph_coeff
        options.frame_opts.remove_dc_offset = config.remove_dc_offset
        options.frame_opts.window_type = config.window_type
        options.frame_opts.snip_edges = config.snip_edges
        options.mel_opts.num_bins = NUM_MELS
        options.mel_opts.low_freq = config.low_freq
        options.mel_opts.high_freq = config.high_freq
        self._extractor = kaldi_native_fbank.OnlineFbank(options)
        self._sample_rate_hz = sample_rate_hz
        self._num_taken = 0
        self._finished = False

    def push(self, samples_S: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Add samples in [-1, 1] and return the frames that became ready, features_TF (T may be 0).

        Raises:
            ValueError: if the samples are not one-dimensional, or `finish` was called before.
        """
        if self._finished:
            raise ValueError("audio pushed after finish(): make a new OnlineFbank for a new utterance")
        samples_S = np.asarray(samples_S, dtype=np.float32)
        if samples_S.ndim != 1:
            raise ValueError(f"samples of shape {samples_S.shape}: push one channel, shape (num_samples,)")
        self._extractor.accept_waveform(self._sample_rate_hz, samples_S)
        return self._take()

    def finish(self) -> torch.Tensor:
        """Say that no audio follows and return the remaining frames, features_TF (T may be 0)."""
        if not self._finished:
            self._extractor.input_finished()
            self._finished = True
        return self._take()

    def _take(self) -> torch.Tensor:
        num_new = self._extractor.num_frames_ready - self._num_taken
        frames = [self._extractor.get_frame(self._num_taken + k).copy() for k in range(num_new)]
        self._extractor.pop(num_new)  # live audio can last for hours
        self._num_taken += num_new
        return torch.from_numpy(np.stack(frames)) if frames else torch.empty(0, NUM_MELS)


def load_samples(path: Path | str) -> tuple[np.ndarray, int]:
    """Decode a whole audio file.

    Returns:
        samples_SC float32 with one column per channel, and the sample rate in Hz.

    Raises:
        AudioError: if the file is missing, no audio, empty, truncated, or holds NaN or infinite samples.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(path, "no such file")
    if path.stat().st_size == 0:
        raise AudioError(path, "empty audio", "0 bytes")
    try:
        with soundfile.SoundFile(path) as audio:
            sample_rate_hz, num_expected = audio.samplerate, audio.frames
            samples_SC = audio.read(dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        if not os.access(path, os.R_OK):
            raise AudioError(path, "permission denied") from error
        raise AudioError(path, "truncated or no audio", error.error_string) from error
    if len(samples_SC) < num_expected or _riff_is_cut(path):
        raise AudioError(path, "truncated audio", "the header announces more than the file holds")
    if len(samples_SC) == 0:
        raise AudioError(path, "empty audio", "0 samples")
    if not np.isfinite(samples_SC).all():
        raise AudioError(path, "NaN or infinite samples", f"{(~np.isfinite(samples_SC)).sum()} of them")
    return samples_SC, sample_rate_hz


def read_audio(path: Path | str) -> np.ndarray:
    """Samples of a mono file at `SAMPLE_RATE_HZ`.

    A file at another rate is resampled, with a warning: recognition works, but differs slightly from
    audio recorded at the right rate. Several channels are refused: a guess could pick the wrong speaker.

    Returns:
        samples_S float32 in [-1, 1].

    Raises:
        AudioError: as `load_samples`, and for more than one channel or less audio than one frame.
    """
    samples_SC, rate_hz = load_samples(path)
    if samples_SC.shape[1] != 1:
        raise not_mono(path, samples_SC.shape[1])
    samples_S = samples_SC[:, 0]
    if rate_hz != SAMPLE_RATE_HZ:
        logging.warning("%s: resampled from %d to %d Hz", path, rate_hz, SAMPLE_RATE_HZ)
        # This import would take a quarter of the time in which a program starts, and few files need it.
        from scipy.signal import resample_poly

        common = gcd(rate_hz, SAMPLE_RATE_HZ)
        samples_S = resample_poly(samples_S, SAMPLE_RATE_HZ // common, rate_hz // common).astype(np.float32)
    if len(samples_S) * 1000 < FRAME_LENGTH_MS * SAMPLE_RATE_HZ:
        raise AudioError(path, "shorter than one frame", f"{len(samples_S)} samples, {FRAME_LENGTH_MS} ms needed")
    return samples_S


def not_mono(path: Path | str, num_channels: int) -> AudioError:
    """The error for a file with several channels."""
    remedy = f"take the first with: sox {path} mono.wav remix 1"
    return AudioError(path, "not mono", f"{num_channels} channels; {remedy}")


def _riff_is_cut(path: Path) -> bool:
    """Whether a wav file is shorter than its header says, which libsndfile repairs without a word."""
    with path.open("rb") as file:
        header = file.read(8)
    if header[:4] != b"RIFF" or len(header) < 8:
        return False
    (announced,) = struct.unpack("<I", header[4:])
    # Writers to a pipe cannot know the size and leave 0 or the largest number.
    return announced not in (0, 0xFFFFFFFF) and announced + 8 > path.stat().st_size

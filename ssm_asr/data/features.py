"""Computes log-mel filter bank features, offline and online, and reads the audio for them.

Shapes: S samples, C channels, T feature frames (10 ms), F mel bins.
"""

import importlib
import logging
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from math import gcd
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import soundfile
import torch
from lhotse import Fbank, FbankConfig
from lhotse.audio.utils import get_audio_duration_mismatch_tolerance
from lhotse.augmentation import AudioTransform, Speed
from lhotse.cut import Cut, MonoCut
from lhotse.features import FeatureExtractor
from lhotse.features.kaldifeat import (
    KaldifeatFbank,
    KaldifeatFbankConfig,
    KaldifeatFrameOptions,
    KaldifeatMelOptions,
)

from ssm_asr.data.containers import LARGEST_RATE_HZ, require_whole, with_its_size
from ssm_asr.data.errors import AudioError, CutError, first_line
from ssm_asr.data.fbank import batch_fbank
from ssm_asr.data.trust import require_files
from ssm_asr.units import FRAME_LENGTH_MS, FRAME_SHIFT_MS, NUM_MELS, SAMPLE_RATE_HZ

# Recordings in floating point may go a little beyond 1; 16-bit numbers that were not divided by 32768 go far beyond.
LARGEST_SAMPLE = 100.0
LEAST_RATE_HZ = 1000
BLOCK_SAMPLES = 1 << 22  # of all channels, that are read at once
# What can compute stored features: PyTorch, or the package kaldifeat.
BACKENDS = ("torch", "kaldifeat")


@contextmanager
def reading(cut: Cut) -> Iterator[None]:
    """Turns every exception within it into one line, where lhotse would print a hundred.

    Raises:
        CutError: in place of any other exception.
    """
    try:
        require_files(cut)
        yield
    except CutError:
        raise
    except Exception as error:
        raise CutError(f"cut {cut.id}: {first_line(error)}; if files were moved, prepare the corpus anew") from None


def cut_samples(cut: Cut) -> np.ndarray:
    """Returns the samples (S,) of a cut of one channel.

    Raises:
        CutError: if they cannot be read, are of several channels, or cannot be sound.
    """
    with reading(cut):
        samples_CS: np.ndarray = cut.load_audio()
        if len(samples_CS) != 1:
            raise ValueError(f"{len(samples_CS)} channels, where one is needed: give cuts of one channel each")
        require_sound(samples_CS[0])
    return samples_CS[0]


def cut_source(cut: Cut) -> tuple[np.ndarray, float]:
    """Returns the samples (S,) of a cut's first channel before its change of speed, and the factor of that.

    So `fbank.change_speed` can change the speeds of a whole batch at once. A cut with other lazy transforms than one
    change of speed, or with none, gives its samples and 1.0.

    Raises:
        CutError: if they cannot be read or cannot be sound, or have another rate than SAMPLE_RATE_HZ.
    """
    with reading(cut):
        if cut.sampling_rate != SAMPLE_RATE_HZ:
            raise ValueError(f"audio at {cut.sampling_rate} Hz, where {SAMPLE_RATE_HZ} Hz is needed")
        recording = cut.recording if isinstance(cut, MonoCut) else None
        transforms = [
            transform if isinstance(transform, AudioTransform) else AudioTransform.from_dict(transform)
            for transform in (recording and recording.transforms) or []
        ]
        if recording is None or len(transforms) != 1 or not isinstance(transforms[0], Speed):
            return cut_samples(cut), 1.0
        (speed,) = transforms
        # lhotse computes lengths from one another, with rounding; a whole recording is read to its end.
        whole = abs(cut.duration - recording.duration) < 1e-3
        offset_s, duration_s = speed.reverse_timestamps(cut.start, None if whole else cut.duration, SAMPLE_RATE_HZ)
        (source,) = (source for source in recording.sources if cut.channel in source.channels)
        samples_CS = source.load_audio(offset=offset_s, duration=duration_s, force_opus_sampling_rate=SAMPLE_RATE_HZ)
        samples_S: np.ndarray = np.atleast_2d(samples_CS)[source.channels.index(cut.channel)]
        require_sound(samples_S)
        missing_s = cut.duration - len(samples_S) / speed.factor / SAMPLE_RATE_HZ
        if missing_s > get_audio_duration_mismatch_tolerance():
            raise ValueError(f"{missing_s:.3f} s of the audio are missing")
        return samples_S, speed.factor


def sound_fault(samples: np.ndarray) -> tuple[str, str] | None:
    """Returns why samples of any shape cannot be sound, as (reason, detail); None if they can.

    One absurd sample would stay in the state of a recurrent encoder for the rest of a stream.
    """
    largest = float(np.abs(samples).max(initial=0.0))
    if not np.isfinite(largest):
        return "NaN or infinite samples", f"{(~np.isfinite(samples)).sum()} of them"
    if largest > LARGEST_SAMPLE:
        return f"samples up to {largest:.0f}", "give floats in [-1, 1]; 16-bit numbers become so by samples / 32768"
    return None


def require_sound(samples: np.ndarray) -> None:
    """Checks samples of any shape.

    Raises:
        ValueError: if they cannot be sound.
    """
    fault = sound_fault(samples)
    if fault:
        raise ValueError(": ".join(fault))


def require_backend(backend: str) -> None:
    """Checks that a backend of `make_fbank` can be used here.

    Raises:
        ValueError: if it is unknown, or is kaldifeat and cannot be imported.
    """
    if backend not in BACKENDS:
        raise ValueError(f"features backend {backend!r}: give one of {', '.join(BACKENDS)}")
    if backend == "kaldifeat":
        try:
            importlib.import_module("kaldifeat")
        except (ImportError, OSError) as error:  # OSError: its library was built for another PyTorch
            raise ValueError(
                f"features backend kaldifeat: cannot be imported ({first_line(error)}); install its build for PyTorch "
                f"{torch.__version__} from https://csukuangfj.github.io/kaldifeat, or take the backend torch"
            ) from None


class BatchFbank(Fbank):
    """lhotse's extractor, which computes the features of one utterance as `ssm_asr.data.fbank` those of a batch."""

    def extract(self, samples: np.ndarray | torch.Tensor, sampling_rate: int) -> np.ndarray | torch.Tensor:
        """Returns features_TF of samples (S,) or (1, S), as an array of the kind that was given."""
        if sampling_rate != SAMPLE_RATE_HZ:
            raise ValueError(f"audio at {sampling_rate} Hz, where {SAMPLE_RATE_HZ} Hz is needed")
        samples_1S = torch.as_tensor(samples, dtype=torch.float32).reshape(1, -1).to(self.device)
        features_TF = batch_fbank(samples_1S, torch.tensor([samples_1S.shape[1]]))[0]
        return features_TF if isinstance(samples, torch.Tensor) else features_TF.cpu().numpy()


def make_fbank(device: str = "cpu", backend: str = "torch") -> FeatureExtractor:
    """Returns the feature extractor of every recipe: `NUM_MELS` log-mel bins every 10 ms, with lhotse's defaults.

    Args:
        device: where the features are computed, such as cpu or cuda.
        backend: one of BACKENDS. Both compute the same features but for rounding.

    Raises:
        ValueError: as `require_backend` does.
    """
    require_backend(backend)
    frame_s = {"frame_length": FRAME_LENGTH_MS / 1000, "frame_shift": FRAME_SHIFT_MS / 1000}
    if backend == "torch":
        return BatchFbank(FbankConfig(sampling_rate=SAMPLE_RATE_HZ, num_filters=NUM_MELS, device=device, **frame_s))
    return KaldifeatFbank(
        KaldifeatFbankConfig(
            frame_opts=KaldifeatFrameOptions(sampling_rate=SAMPLE_RATE_HZ, **frame_s),
            mel_opts=KaldifeatMelOptions(num_bins=NUM_MELS),
            device=device,
        )
    )


class OnlineFbank:
    """Computes the features of `make_fbank` for audio that arrives piece by piece.

    The first frame is centred 5 ms into the audio and each frame is 25 ms long, so frame t is ready once
    t * 10 + 17.5 ms of audio were pushed. `finish` mirrors the last samples for the frames that reach beyond
    the end, as the offline extractor does. The values of both agree to 2e-3, since each rounds its own FFT
    to float32.
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
        """Adds samples in [-1, 1] and returns the frames that became ready, features_TF (T may be 0).

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
        """Ends the audio and returns the remaining frames, features_TF (T may be 0)."""
        if not self._finished:
            self._extractor.input_finished()
            self._finished = True
        return self._take()

    def _take(self) -> torch.Tensor:
        num_new = self._extractor.num_frames_ready - self._num_taken
        frames = [self._extractor.get_frame(self._num_taken + k).copy() for k in range(num_new)]
        self._extractor.pop(num_new)  # else hours of live audio would fill the memory
        self._num_taken += num_new
        return torch.from_numpy(np.stack(frames)) if frames else torch.empty(0, NUM_MELS)


def load_samples(path: Path | str) -> tuple[np.ndarray, int]:
    """Decodes a whole audio file.

    Returns:
        samples_SC in float32 with one column per channel, and the sample rate in Hz.

    Raises:
        AudioError: if the file is missing, no audio, empty or truncated, or holds samples that cannot be sound.
    """
    path = Path(path)
    if not path.is_file():
        if not path.exists():
            raise AudioError(path, "no such file")
        raise AudioError(path, "no regular file", "a directory" if path.is_dir() else "a pipe or a device")
    if path.stat().st_size == 0:
        raise AudioError(path, "empty audio", "0 bytes")
    try:
        require_whole(path)
        # soundfile cannot encode every file name itself.
        with soundfile.SoundFile(with_its_size(path) or os.fsencode(path)) as audio:
            sample_rate_hz, num_expected = audio.samplerate, audio.frames
            if not LEAST_RATE_HZ <= sample_rate_hz <= LARGEST_RATE_HZ:
                raise AudioError(
                    path, f"sample rate of {sample_rate_hz} Hz", "no recording has it; is the file damaged?"
                )
            # Memory is taken as samples come, whatever number the header announces.
            frames = max(1, BLOCK_SAMPLES // audio.channels)
            blocks = [audio.read(frames, dtype="float32", always_2d=True)]
            while len(blocks[-1]) == frames:
                blocks.append(audio.read(frames, dtype="float32", always_2d=True))
            samples_SC = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    except soundfile.LibsndfileError as error:
        detail = error.error_string
        if "not recognised" in detail:
            detail += f" Give wav, flac, ogg or mp3; ffmpeg -i {shlex.quote(str(path))} OUT.wav makes one."
        raise AudioError(path, "truncated or no audio", detail) from error
    except PermissionError as error:
        raise AudioError(path, "permission denied") from error
    if len(samples_SC) < num_expected:
        raise AudioError(path, "truncated audio", "the header announces more than the file holds")
    if len(samples_SC) == 0:
        raise AudioError(path, "empty audio", "0 samples")
    fault = sound_fault(samples_SC)
    if fault:
        raise AudioError(path, *fault)
    return samples_SC, sample_rate_hz


def read_audio(path: Path | str) -> np.ndarray:
    """Reads a mono file at `SAMPLE_RATE_HZ`.

    A file at another rate is resampled, with a warning: it can be recognised, but not quite as audio that was
    recorded at the right rate. Several channels are refused, since a guess could pick the wrong speaker.

    Returns:
        samples_S in float32, within [-1, 1].

    Raises:
        AudioError: as `load_samples` does, and if there are several channels or less audio than one frame.
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
    """Returns the error that refuses a file with several channels."""
    remedy = f"take the first with: sox {shlex.quote(str(path))} mono.wav remix 1"
    return AudioError(path, "not mono", f"{num_channels} channels; {remedy}")

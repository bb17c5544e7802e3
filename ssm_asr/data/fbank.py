"""Computes log-mel filter bank features of many utterances at once, on the device that trains or on a CPU.

They are the features of lhotse's `Fbank` and of kaldi-native-fbank: 25 ms frames every 10 ms, the first one centred
5 ms into the audio, which is mirrored at both ends. Each step is one operation over many utterances, so that a GPU
needs a few dozen launches a batch, and a CPU works through pieces that stay in its cache.

Nearly every batch has a shape of its own, for which libraries would plan a Fourier transform or a convolution anew on
the host, for milliseconds. So a GPU transforms frames so many at a time, and changes speeds by matrix products.

Shapes: B utterances, S samples, T feature frames (10 ms), W samples of a frame, F mel bins.
"""

from functools import lru_cache

import torch
from lhotse.augmentation.resample import Resample
from lhotse.features.kaldi.layers import create_frame_window, get_mel_banks
from torch import Tensor

from ssm_asr.units import FRAME_LENGTH_MS, FRAME_SHIFT_SAMPLES, NUM_MELS, SAMPLE_RATE_HZ

FRAME_SAMPLES = FRAME_LENGTH_MS * SAMPLE_RATE_HZ // 1000
FFT_SAMPLES = 512
PREEMPHASIS = 0.97
LOW_HZ, HIGH_HZ = 20.0, -400.0  # the second counts from half the sample rate
BEFORE_SAMPLES = (FRAME_SAMPLES - FRAME_SHIFT_SAMPLES) // 2  # the first frame begins so long before the audio does
AFTER_SAMPLES = FRAME_SAMPLES  # no frame ends later than this after the audio does
FRAMES_AT_A_TIME = 512  # on a CPU; 1 MB of frames stays in its cache
GPU_FRAMES_AT_A_TIME = 16384  # always as many; a batch of 600 s takes four times


def num_frames(num_samples: int) -> int:
    """Returns the number of frames of so many samples."""
    return (num_samples + FRAME_SHIFT_SAMPLES // 2) // FRAME_SHIFT_SAMPLES


class _Tables:
    """The constants of the computation on one device.

    Attributes:
        window_W: the window by which a frame is weighted. Its first weight is 0.
        mel_KF: the mel filters over K frequencies.
        least: the least mel power, which keeps logarithms finite.
    """

    def __init__(self, device: torch.device) -> None:
        self.window_W = create_frame_window(FRAME_SAMPLES, "povey").to(device)
        mel_FK, _ = get_mel_banks(NUM_MELS, FFT_SAMPLES, SAMPLE_RATE_HZ, LOW_HZ, HIGH_HZ)
        self.mel_KF = torch.nn.functional.pad(mel_FK, (0, 1)).T.contiguous().to(device)
        self.least = torch.finfo(torch.float32).eps


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> _Tables:
    return _Tables(device)


@torch.no_grad()
def batch_fbank(samples_BS: Tensor, num_samples_B: Tensor) -> Tensor:
    """Returns features_BTF of padded utterances, on their device, in float32.

    Utterance b has `num_frames(num_samples_B[b])` frames; what follows them has no meaning.

    Args:
        samples_BS: samples in [-1, 1], float32.
        num_samples_B: int64, on any device; each at least 1.
    """
    mirrored = _mirror(samples_BS, num_samples_B.to(samples_BS.device))
    total = num_frames(samples_BS.shape[1])
    if samples_BS.is_cuda and total:
        frames_BTW = _frames(mirrored, 0, total)
        return _log_mels_by_parts(frames_BTW.flatten(0, 1), GPU_FRAMES_AT_A_TIME).unflatten(0, (-1, total))
    features_BTF = samples_BS.new_empty(len(samples_BS), total, NUM_MELS)
    for row, features_TF in zip(mirrored, features_BTF, strict=True):
        for start in range(0, total, FRAMES_AT_A_TIME):
            stop = min(total, start + FRAMES_AT_A_TIME)
            features_TF[start:stop] = _log_mels(_frames(row[None], start, stop)[0])
    return features_BTF


def _mirror(samples_BS: Tensor, num_samples_B: Tensor) -> Tensor:
    """Adds what precedes and follows each utterance: its own samples, in reverse."""
    count, longest = samples_BS.shape
    device = samples_BS.device
    out = samples_BS.new_zeros(count, BEFORE_SAMPLES + longest + AFTER_SAMPLES)
    out[:, BEFORE_SAMPLES : BEFORE_SAMPLES + longest] = samples_BS
    size_B1 = num_samples_B[:, None]
    before = torch.arange(-BEFORE_SAMPLES, 0, device=device).expand(count, -1)
    after = size_B1 + torch.arange(AFTER_SAMPLES, device=device)
    outside = torch.cat([before, after], dim=1)
    # A very short utterance is mirrored more than once.
    phase = outside.remainder(2 * size_B1)
    source = torch.minimum(phase, 2 * size_B1 - 1 - phase)
    return out.scatter_(1, outside + BEFORE_SAMPLES, samples_BS.gather(1, source))


def _frames(samples_BS: Tensor, start: int, stop: int) -> Tensor:
    """Returns frames_BTW from start to stop, for the Fourier transform; one begins at each multiple of the shift."""
    samples_BS = samples_BS[:, start * FRAME_SHIFT_SAMPLES : (stop - 1) * FRAME_SHIFT_SAMPLES + FRAME_SAMPLES]
    mean_BT1 = samples_BS.unfold(1, FRAME_SAMPLES, FRAME_SHIFT_SAMPLES).mean(dim=2, keepdim=True)
    # Taking the mean m away before the pre-emphasis x[n] - c x[n - 1] takes (1 - c) m away after it. A frame's first
    # sample has no predecessor in the frame, but its weight in the window is 0.
    raised_BS = samples_BS.clone()
    raised_BS[:, 1:] -= PREEMPHASIS * samples_BS[:, :-1]
    frames_BTW = raised_BS.unfold(1, FRAME_SAMPLES, FRAME_SHIFT_SAMPLES) - (1 - PREEMPHASIS) * mean_BT1
    return frames_BTW.mul_(_tables(samples_BS.device).window_W)


def _log_mels(frames_TW: Tensor) -> Tensor:
    """Returns features_TF of frames."""
    tables = _tables(frames_TW.device)
    spectrum_TK = torch.fft.rfft(frames_TW, n=FFT_SAMPLES)
    power_TK = spectrum_TK.real.square() + spectrum_TK.imag.square()
    return (power_TK @ tables.mel_KF).clamp_(min=tables.least).log_()


def _log_mels_by_parts(frames_TW: Tensor, size: int) -> Tensor:
    """Returns features_TF of frames, `size` of which are transformed at a time, with zeros after the last."""
    padded_TW = torch.nn.functional.pad(frames_TW, (0, 0, 0, -len(frames_TW) % size))
    return torch.cat([_log_mels(part_TW) for part_TW in padded_TW.split(size)])[: len(frames_TW)]


@lru_cache(maxsize=32)
def _resampler(source_hz: int, device: torch.device) -> Resample:
    return Resample(source_hz, SAMPLE_RATE_HZ).to(device)


@torch.no_grad()
def change_speed(samples_BS: Tensor, factor: float) -> Tensor:
    """Returns padded utterances as they sound at another speed, and pitch, as `sox speed` and lhotse change it.

    Args:
        samples_BS: samples, padded with zeros.
        factor: 1.1 makes them a tenth faster, so that they have fewer samples.
    """
    resampler = _resampler(round(SAMPLE_RATE_HZ * factor), samples_BS.device)
    return _resample_by_products(samples_BS, resampler) if samples_BS.is_cuda else resampler(samples_BS)


def _resample_by_products(samples_BS: Tensor, resampler: Resample) -> Tensor:
    """Returns what the resampler does, whose filters are one matrix here."""
    if resampler.orig_freq == resampler.new_freq:
        return samples_BS
    taken, made = resampler.orig_freq // resampler.gcd, resampler.new_freq // resampler.gcd  # samples of a step
    padded_BS = torch.nn.functional.pad(samples_BS, (resampler.width, resampler.width + taken))
    windows_BNW = padded_BS.unfold(1, resampler.kernel.shape[-1], taken)
    return (windows_BNW @ resampler.kernel[:, 0].T).flatten(1)[:, : -(-made * samples_BS.shape[1] // taken)]

"""Features and speeds of batches, beside lhotse's own and kaldi-native-fbank's."""

import numpy as np
import pytest
import torch
from lhotse import Fbank
from lhotse.augmentation import Speed

from ssm_asr.data.fbank import (
    FRAMES_AT_A_TIME,
    _frames,
    _log_mels,
    _log_mels_by_parts,
    _resample_by_products,
    _resampler,
    batch_fbank,
    change_speed,
    num_frames,
)
from ssm_asr.data.features import OnlineFbank
from ssm_asr.units import SAMPLE_RATE_HZ

# Too short for a frame, shorter than one, odd lengths, and more than a CPU takes at a time.
LENGTHS = [1, 81, 401, 5000, 16000 * 3 - 79, (FRAMES_AT_A_TIME + 1) * 160 + 13]


def _speech(seed: int, length: int) -> np.ndarray:
    """Returns noise whose level changes as that of speech, so that quiet frames follow loud ones."""
    rng = np.random.default_rng(seed)
    level = np.interp(np.arange(length), np.linspace(0, length, 20), 10 ** rng.uniform(-4, -0.5, 20))
    return (np.cumsum(rng.normal(size=length)) * 0.01 + rng.normal(size=length)).clip(-3, 3).astype(np.float32) * level


def _batch(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    rows = [torch.from_numpy(_speech(i, length).astype(np.float32)) for i, length in enumerate(LENGTHS)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device), torch.tensor(LENGTHS)


def test_features_of_a_batch_equal_kaldis() -> None:
    samples_BS, num_samples_B = _batch()
    features_BTF = batch_fbank(samples_BS, num_samples_B)
    for samples_S, length, features_TF in list(zip(samples_BS, LENGTHS, features_BTF, strict=True))[2:]:
        online = OnlineFbank()
        expected_TF = torch.cat([online.push(samples_S[:length]), online.finish()])
        assert num_frames(length) == len(expected_TF)
        assert torch.allclose(features_TF[: len(expected_TF)], expected_TF, atol=2e-3)


def test_features_of_a_batch_equal_lhotses() -> None:
    samples_BS, num_samples_B = _batch()
    features_BTF = batch_fbank(samples_BS, num_samples_B)
    for samples_S, length, features_TF in list(zip(samples_BS, LENGTHS, features_BTF, strict=True))[2:]:
        expected_TF = torch.from_numpy(Fbank().extract(samples_S[:length].numpy(), SAMPLE_RATE_HZ))
        assert torch.allclose(features_TF[: len(expected_TF)], expected_TF, atol=1e-3)


@pytest.mark.parametrize("size", [1, 100, 4096])
def test_frames_are_transformed_so_many_at_a_time(size: int) -> None:
    """As on a GPU."""
    frames_TW = _frames(torch.from_numpy(_speech(1, 16000 * 3).astype(np.float32))[None], 0, 290)[0]
    assert torch.allclose(_log_mels_by_parts(frames_TW, size), _log_mels(frames_TW), atol=1e-4)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_speeds_by_products(factor: float) -> None:
    """As on a GPU."""
    samples_BS, _ = _batch()
    resampler = _resampler(round(SAMPLE_RATE_HZ * factor), samples_BS.device)
    changed_BS = _resample_by_products(samples_BS, resampler)
    assert changed_BS.shape == resampler(samples_BS).shape
    assert torch.allclose(changed_BS, resampler(samples_BS), atol=1e-6)


def test_features_do_not_depend_on_the_batch() -> None:
    samples_BS, num_samples_B = _batch()
    features_BTF = batch_fbank(samples_BS, num_samples_B)
    for b, length in enumerate(LENGTHS):
        alone_TF = batch_fbank(samples_BS[b : b + 1, :length], num_samples_B[b : b + 1])[0]
        assert torch.allclose(features_BTF[b, : num_frames(length)], alone_TF, atol=1e-4)


@pytest.mark.parametrize(("length", "frames"), [(1, 0), (79, 0), (80, 1), (160, 1)])
def test_audio_shorter_than_a_frame(length: int, frames: int) -> None:
    samples_BS = torch.from_numpy(_speech(0, length).astype(np.float32))[None]
    features_BTF = batch_fbank(samples_BS, torch.tensor([length]))
    assert features_BTF.shape == (1, frames, 80)
    assert features_BTF.isfinite().all()


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_speed_equals_lhotses(factor: float) -> None:
    samples_BS, _ = _batch()
    expected_BS = Speed(factor)(samples_BS.numpy(), SAMPLE_RATE_HZ)
    assert torch.equal(change_speed(samples_BS, factor), torch.from_numpy(expected_BS))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_what_a_cpu_computes() -> None:
    samples_BS, num_samples_B = _batch()
    on_gpu_BTF = batch_fbank(samples_BS.cuda(), num_samples_B).cpu()
    for length, a_TF, b_TF in zip(LENGTHS, batch_fbank(samples_BS, num_samples_B), on_gpu_BTF, strict=True):
        assert torch.allclose(a_TF[: num_frames(length)], b_TF[: num_frames(length)], atol=1e-3)
    faster_BS = change_speed(samples_BS.cuda(), 1.1).cpu()
    assert torch.allclose(faster_BS, change_speed(samples_BS, 1.1), atol=1e-5)

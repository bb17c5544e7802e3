"""Live features equal the offline ones, and unusable audio is refused with one clear line."""

import logging
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import soundfile
import torch
from lhotse.features.kaldifeat import KaldifeatFbank
from tones import tone

from ssm_asr.data.errors import AudioError
from ssm_asr.data.features import BatchFbank, OnlineFbank, make_fbank, read_audio

TOLERANCE = 2e-3  # on speech, the median difference is 2e-4 and the largest 1.4e-3, in bins near the floor


def speechlike(num_samples: int) -> np.ndarray:
    """Returns samples_S of bursts of pulses in noise, with digital silence between them."""
    rng = np.random.default_rng(1)
    samples_S = 0.02 * rng.standard_normal(num_samples)
    samples_S[::133] += 0.5
    samples_S[(np.arange(num_samples) // 4000) % 3 == 2] = 0
    return samples_S.astype(np.float32)


@pytest.mark.parametrize("push_samples", [1, 159, 160, 1600, 5000, 10**6])
@pytest.mark.parametrize("num_samples", [400, 8000, 8079, 8080, 8081, 23456])
def test_online_equals_offline(num_samples: int, push_samples: int) -> None:
    samples_S = speechlike(num_samples)
    if push_samples == 1:
        samples_S = samples_S[:1000]
    offline_TF = torch.from_numpy(make_fbank().extract(samples_S, 16000))
    extractor = OnlineFbank()
    pieces = [extractor.push(samples_S[k : k + push_samples]) for k in range(0, len(samples_S), push_samples)]
    online_TF = torch.cat([*pieces, extractor.finish()])
    assert online_TF.shape == offline_TF.shape
    torch.testing.assert_close(online_TF, offline_TF, rtol=0, atol=TOLERANCE)


def test_kaldifeat_computes_only_what_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    package = MagicMock(__spec__=ModuleSpec("kaldifeat", None))  # stands for the package, which is not installed
    monkeypatch.setitem(sys.modules, "kaldifeat", package)
    assert type(make_fbank()) is BatchFbank and type(make_fbank("cpu:0")) is BatchFbank
    extractor = make_fbank(backend="kaldifeat")
    assert type(extractor) is KaldifeatFbank and extractor.feature_dim(16000) == 80
    with pytest.raises(ValueError, match="features backend 'kaldi': give one of torch, kaldifeat"):
        make_fbank(backend="kaldi")


def test_frames_come_as_soon_as_their_window_is_full() -> None:
    extractor = OnlineFbank()
    num_frames = 0
    for num_samples in range(70, 16000, 70):
        num_frames += len(extractor.push(torch.zeros(70)))
        assert num_frames == max(0, (num_samples - 280) // 160 + 1)


def test_misuse_of_the_online_extractor() -> None:
    extractor = OnlineFbank()
    with pytest.raises(ValueError, match=r"shape \(2, 100\)"):
        extractor.push(np.zeros((2, 100)))
    assert extractor.finish().shape == (0, 80)
    assert extractor.finish().shape == (0, 80)
    with pytest.raises(ValueError, match="new OnlineFbank"):
        extractor.push(np.zeros(100))


def test_read_audio_returns_the_samples(tmp_path: Path) -> None:
    samples_S = tone(0.5)
    soundfile.write(tmp_path / "a.wav", samples_S, 16000, subtype="FLOAT")
    read_S = read_audio(tmp_path / "a.wav")
    assert read_S.dtype == np.float32
    np.testing.assert_array_equal(read_S, samples_S)


def test_read_audio_resamples_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    time_s = np.arange(44100) / 44100
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time_s), 44100)
    with caplog.at_level(logging.WARNING):
        samples_S = read_audio(tmp_path / "a.wav")
    assert "44100" in caplog.text and "16000" in caplog.text
    assert len(samples_S) == 16000
    assert np.abs(np.fft.rfft(samples_S)).argmax() == 440


def test_unusable_audio(tmp_path: Path) -> None:
    whole = tone(1.0)
    soundfile.write(tmp_path / "whole.wav", whole, 16000)
    soundfile.write(tmp_path / "whole.flac", whole, 16000)
    for name, size in (("cut.wav", 9000), ("head.wav", 30), ("cut.flac", 9000)):
        data = (tmp_path / f"whole{Path(name).suffix}").read_bytes()
        (tmp_path / name).write_bytes(data[:size])
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("this is no audio")
    soundfile.write(tmp_path / "nosamples.wav", whole[:0], 16000)
    soundfile.write(tmp_path / "short.wav", whole[:399], 16000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([whole, whole], 1), 16000)
    soundfile.write(tmp_path / "nan.wav", np.where(whole > 0.2, np.nan, whole), 16000, subtype="FLOAT")
    expected = {
        "missing.wav": "no such file",
        "empty.wav": "empty audio: 0 bytes",
        "nosamples.wav": "empty audio: 0 samples",
        "text.wav": "truncated or no audio",
        "head.wav": "truncated or no audio",
        "cut.wav": "truncated audio",
        "cut.flac": "truncated",
        "short.wav": "shorter than one frame: 399 samples",
        "stereo.wav": "not mono: 2 channels; take the first with: sox",
        "nan.wav": "NaN or infinite samples",
    }
    for name, message in expected.items():
        with pytest.raises(AudioError) as caught:
            read_audio(tmp_path / name)
        assert f"{name}: {message}" in str(caught.value)
        assert "\n" not in str(caught.value)
    read_audio(tmp_path / "whole.flac")

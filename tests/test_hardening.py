"""Odd files and closed or full outputs end in one line, and compiled activations keep their dropout."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from ssm_asr.data.features import AudioError, read_audio
from ssm_asr.data.pipe import read_blocks
from ssm_asr.ops.swoosh import Drop, swoosh
from ssm_asr.search.encoding import streaming_context
from ssm_asr.units import SAMPLE_RATE_HZ
from tests.toy import experiment, tones


def test_swoosh_drops_elements_when_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BTD = torch.randn(2, 5, 8)
    drop = Drop(torch.rand(2, 1, 8), 0.5)
    plain = swoosh(x_BTD, 4.0, 0.035, None, drop)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(swoosh(x_BTD, 4.0, 0.035, None, drop), plain)


def test_file_names_need_not_be_unicode(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"bad\xff.wav")
    with open(path, "wb") as file:
        soundfile.write(file, tones("LOW"), SAMPLE_RATE_HZ, format="WAV")
    assert len(read_audio(path)) == len(tones("LOW"))


def test_wav_pipes_of_incredible_rates_are_refused() -> None:
    fmt = struct.pack("<HHIIHH", 1, 1, 2**32 - 1, 0, 2, 16)
    wav = b"RIFF\0\0\0\0WAVEfmt " + struct.pack("<I", 16) + fmt + b"data\0\0\0\0" + bytes(100)
    with pytest.raises(AudioError, match="4294967295 Hz"):
        list(read_blocks(io.BytesIO(wav), SAMPLE_RATE_HZ))


def test_chunks_beyond_memory_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 100000 frames"):
        streaming_context(experiment().model.encoder, 4_999_950, 64)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_full_device_is_reported_in_one_line(option: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ssm_asr", option]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr

"""Audio from a pipe: whatever its header says and however it is divided, all of its samples come out."""

import io
import itertools
import struct
from math import gcd

import numpy as np
import pytest
from scipy.signal import resample_poly

from ssm_asr.data.features import AudioError
from ssm_asr.data.pipe import Resampler, read_blocks

SAMPLES = np.random.default_rng(0).integers(-32768, 32768, 5001).astype("<i2")
EXPECTED = SAMPLES.astype(np.float32) / 32768


def wav(
    data: bytes, riff: int | None = None, size: int | None = None, before: bytes = b"", tail: bytes = b"", **format: int
) -> bytes:
    """A wav file with these sizes in its header, and with chunks before and after the samples."""
    code, channels, rate, bits = (format.get(k, v) for k, v in dict(code=1, channels=1, rate=16000, bits=16).items())
    fields = struct.pack("<HHIIHH", code, channels, rate, rate * channels * bits // 8, channels * bits // 8, bits)
    if code == 0xFFFE:
        fields += struct.pack("<HHIH14x", 22, bits, 4, format["sub_code"])
    head = b"WAVEfmt " + struct.pack("<I", len(fields)) + fields + before + b"data"
    size = len(data) if size is None else size
    riff = len(head) + 4 + len(data) + len(tail) if riff is None else riff
    return b"RIFF" + struct.pack("<I", riff) + head + struct.pack("<I", size) + data + tail


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


class Slow(io.BytesIO):
    """A pipe that gives a few bytes at a time."""

    def read1(self, count: int = -1) -> bytes:
        return super().read1(min(count, 1 + self.tell() % 7))

    def read(self, count: int | None = -1) -> bytes:
        return super().read(min(count or 0, 3))


def read(content: bytes, rate_hz: int = 16000, kind: type[io.BytesIO] = io.BytesIO) -> np.ndarray:
    return np.concatenate(list(read_blocks(kind(content), rate_hz)))


DATA = SAMPLES.tobytes()


@pytest.mark.parametrize("kind", [io.BytesIO, Slow])
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(DATA, id="raw"),
        pytest.param(DATA + b"\x01", id="half a sample more"),
        pytest.param(wav(DATA), id="right"),
        pytest.param(wav(DATA, 0x7FFFF024, 0x7FFFF000), id="sox"),
        pytest.param(wav(DATA, 0x80000024, 0x80000000), id="arecord"),
        pytest.param(wav(DATA, 0xFFFFFFFF, 0xFFFFFFFF), id="ffmpeg"),
        pytest.param(wav(DATA, 0, 0), id="zero"),
        pytest.param(wav(DATA, 0x7FFFFFFF, 0x7FFFFFFF - 36), id="halfmax"),
        pytest.param(wav(DATA, 36, 0), id="gst"),
        pytest.param(wav(DATA, tail=chunk(b"LIST", b"INFOabc")), id="with a chunk after it"),
        pytest.param(wav(DATA, before=chunk(b"LIST", b"INFOISFT\5\0\0\0Lavf\0")), id="with a chunk before it"),
        pytest.param(wav(DATA, code=0xFFFE, sub_code=1), id="extensible"),
        pytest.param(b"RF64" + wav(DATA, 0xFFFFFFFF, 0xFFFFFFFF, before=chunk(b"ds64", bytes(28)))[4:], id="rf64"),
    ],
)
def test_all_samples_come(content: bytes, kind: type[io.BytesIO]) -> None:
    np.testing.assert_array_equal(read(content, kind=kind), EXPECTED)


@pytest.mark.parametrize(
    ("dtype", "code", "bits", "zero", "scale"),
    [("u1", 1, 8, 128, 128), ("<i4", 1, 32, 0, 2**31), ("<f4", 3, 32, 0, 1)],
)
def test_kinds_of_samples(dtype: str, code: int, bits: int, zero: int, scale: int) -> None:
    samples_S = np.round(EXPECTED.astype(np.float64) * 0.99 * scale + zero, 0 if code == 1 else 9).astype(dtype)
    got_S = read(wav(samples_S.tobytes(), code=code, bits=bits))
    np.testing.assert_allclose(got_S, 0.99 * EXPECTED, atol=1 / scale if code == 1 else 1e-8, rtol=1e-6)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 44100, 48000, 7999])
def test_other_rates_are_converted_as_at_once(rate_hz: int) -> None:
    common = gcd(rate_hz, 16000)
    expected = resample_poly(EXPECTED, 16000 // common, rate_hz // common)
    for content in (DATA, wav(DATA, rate=rate_hz)):
        got_S = read(content, rate_hz, Slow)
        assert got_S.dtype == np.float32
        np.testing.assert_allclose(got_S, expected, atol=1e-6, rtol=0)


def test_converted_samples_come_soon() -> None:
    """After 0.1 s at 48 kHz, all but a thousandth of a second is there; and what waits does not grow."""
    resampler = Resampler(48000)
    given = 0
    for _ in range(200):
        given += len(resampler.push(np.zeros(4800, np.float32)))
        assert len(resampler._waiting_S) < 10000
    assert 200 * 1600 - given < 16
    assert given + len(resampler.finish()) == 200 * 1600


def test_samples_come_before_the_end() -> None:
    """A pipe that is still open has given what was written to it."""

    class Open(io.BytesIO):
        def read1(self, count: int = -1) -> bytes:
            if self.tell() == len(DATA):
                raise TimeoutError
            return super().read1(1000)

    blocks = read_blocks(Open(DATA), 16000)
    got = []
    with pytest.raises(TimeoutError):
        for block in blocks:
            got.append(block)
    np.testing.assert_array_equal(np.concatenate(got), EXPECTED)
    assert len(got) > 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty audio: 0 bytes"),
        (b"fLaC" + bytes(40), "FLAC, neither wav nor raw samples: decode it first: ffmpeg -i - "),
        (b"OggS" + bytes(40), "Ogg, neither wav nor raw samples: decode it first: ffmpeg -i - "),
        (wav(DATA, channels=2), "not mono: 2 channels; record one, with arecord -c 1"),
        (wav(DATA, bits=24), "24-bit wav of format 1: give 16-bit samples, as arecord -f S16_LE does"),
        (wav(DATA, code=7, bits=8), "8-bit wav of format 7: give 16-bit samples"),
        (wav(DATA, rate=0), "wav at 0 Hz: give a sample rate"),
        (wav(DATA)[:30], "truncated audio: its wav header ends early"),
        (wav(DATA)[:38], "truncated or no audio: its wav header holds no format and no samples"),
        (b"RIFF\0\0\0\0AVI " + bytes(40), "no audio: it begins with RIFF but is no wav file"),
        (b"RIFF\0\0\0\0WAVEdata" + bytes(40), "truncated or no audio: its wav header holds no format and no samples"),
        (b"RIFF\0\0\0\0WAVEjunk\xff\xff\xff\xff", "truncated or no audio: its wav header holds no format"),
    ],
)
def test_what_cannot_be_used_is_one_line(content: bytes, message: str) -> None:
    for kind, rate_hz in itertools.product((io.BytesIO, Slow), (16000, 8000)):
        with pytest.raises(AudioError) as caught:
            read(content, rate_hz, kind)
        assert str(caught.value).startswith(f"standard input: {message}") and "\n" not in str(caught.value)

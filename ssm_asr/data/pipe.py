"""Audio that comes through a pipe: raw samples, or a wav file whose writer could not know its length.

Shapes: S samples.
"""

import struct
from collections.abc import Callable, Iterator
from math import gcd
from typing import BinaryIO, NamedTuple

import numpy as np
from scipy.signal import resample_poly

from ssm_asr.data.containers import LARGEST_RATE_HZ, LARGEST_SIZE
from ssm_asr.data.errors import AudioError
from ssm_asr.units import SAMPLE_RATE_HZ

NAME = "standard input"
READ_BYTES = 1 << 14  # at most, at a time; whatever has come is taken at once

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # format codes of wav files
# (format code, bits of a sample) -> type of a sample, its zero, its full scale
SAMPLE_TYPES = {
    (PCM, 8): ("u1", 128, 128),
    (PCM, 16): ("<i2", 0, 1 << 15),
    (PCM, 32): ("<i4", 0, 1 << 31),
    (FLOAT, 32): ("<f4", 0, 1),
}
OTHER_FORMATS = {b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3\x03": "MP3", b"ID3\x04": "MP3", b"RIFX": "big-endian wav"}


class Format(NamedTuple):
    """How samples are written."""

    rate_hz: int
    code: int = PCM
    bits: int = 16


def read_blocks(file: BinaryIO, rate_hz: int) -> Iterator[np.ndarray]:
    """Yields the samples of a pipe as they come, blocks (S,) of float32 in [-1, 1] at 16 kHz.

    A wav header is recognised by its first bytes. Without one, the samples are raw: 16-bit little-endian, one channel.
    Another rate is converted to 16 kHz. Half a sample at the end is left out.

    Args:
        file: binary; it is read to its end, or to the end that a wav header tells credibly.
        rate_hz: the rate of raw samples.

    Raises:
        AudioError: if there is none, or it is of another kind, or has several channels.
    """
    read = getattr(file, "read1", file.read)  # read1 returns what has come, and does not wait for more
    head = _exactly(file, 4)
    if not head:
        raise AudioError(NAME, "empty audio", "0 bytes")
    if head in OTHER_FORMATS:
        remedy = f"decode it first: ffmpeg -i - -ar {SAMPLE_RATE_HZ} -ac 1 -f s16le -"
        raise AudioError(NAME, f"{OTHER_FORMATS[head]}, neither wav nor raw samples", remedy)
    remaining: float = float("inf")
    format = Format(rate_hz)
    if head in (b"RIFF", b"RF64"):
        format, remaining = _wav_header(file)
        head = b""
    if format.rate_hz > LARGEST_RATE_HZ:  # the filter of the resampler grows with the rate
        raise AudioError(NAME, f"{format.rate_hz} Hz", f"give audio of at most {LARGEST_RATE_HZ} Hz")
    yield from _decode(_chunks(read, head, remaining), format)


def _chunks(read: Callable[[int], bytes], head: bytes, remaining: float) -> Iterator[bytes]:
    """What was read, and then what can be read of `remaining` bytes."""
    yield head
    while remaining > 0 and (part := read(int(min(READ_BYTES, remaining)))):
        remaining -= len(part)
        yield part


def _decode(parts: Iterator[bytes], format: Format) -> Iterator[np.ndarray]:
    """Samples at 16 kHz of bytes, which may be divided anywhere."""
    dtype, zero, full_scale = SAMPLE_TYPES[format.code, format.bits]
    resampler = Resampler(format.rate_hz)
    rest = b""
    for part in parts:
        rest += part
        whole = len(rest) - len(rest) % (format.bits // 8)
        samples_S = (np.frombuffer(rest[:whole], dtype).astype(np.float32) - zero) / np.float32(full_scale)
        rest = rest[whole:]
        yield resampler.push(samples_S)
    yield resampler.finish()


def _wav_header(file: BinaryIO) -> tuple[Format, float]:
    """Reads up to the first sample: the format, and the bytes of samples, infinite if the header cannot know them."""
    if _exactly(file, 8)[4:] != b"WAVE":
        raise AudioError(NAME, "no audio", "it begins with RIFF but is no wav file")
    format = None
    while True:
        name, size = struct.unpack("<4sI", _exactly(file, 8).ljust(8, b"\0"))
        if name == b"data" and format is not None:
            return format, size if 0 < size < LARGEST_SIZE else float("inf")
        if size >= LARGEST_SIZE or name in (b"data", b"\0\0\0\0"):
            raise AudioError(NAME, "truncated or no audio", "its wav header holds no format and no samples")
        content = _exactly(file, size + size % 2)
        if name == b"fmt ":
            format = _wav_format(content)


def _wav_format(content: bytes) -> Format:
    """The format that a wav header's chunk "fmt " tells."""
    if len(content) < 16:
        raise AudioError(NAME, "truncated audio", "its wav header ends early")
    code, channels, rate_hz, _, _, bits = struct.unpack("<HHIIHH", content[:16])
    if code == EXTENSIBLE and len(content) >= 26:
        (code,) = struct.unpack("<H", content[24:26])
    if channels != 1:
        raise AudioError(NAME, "not mono", f"{channels} channels; record one, with arecord -c 1")
    if (code, bits) not in SAMPLE_TYPES:
        raise AudioError(NAME, f"{bits}-bit wav of format {code}", "give 16-bit samples, as arecord -f S16_LE does")
    if rate_hz < 1:
        raise AudioError(NAME, f"wav at {rate_hz} Hz", "give a sample rate")
    return Format(rate_hz, code, bits)


def _exactly(file: BinaryIO, count: int) -> bytes:
    """The next `count` bytes; fewer only at the end."""
    parts = b""
    while len(parts) < count and (part := file.read(count - len(parts))):
        parts += part
    return parts


class Resampler:
    """Converts audio that comes piece by piece to 16 kHz, exactly as scipy's `resample_poly` does it at once."""

    def __init__(self, rate_hz: int) -> None:
        common = gcd(rate_hz, SAMPLE_RATE_HZ)
        self._up, self._down = SAMPLE_RATE_HZ // common, rate_hz // common
        # The filter has 10 max(up, down) taps on each side, at the rate that is `up` times the input's. So much of the
        # input must be known on each side of an output sample; a whole number of periods keeps the phase.
        self._margin = (10 * max(self._up, self._down) // (self._up * self._down) + 1) * self._down
        self._waiting_S = np.zeros(0, dtype=np.float32)
        self._known = 0  # input samples at the start of those that wait of which the output was given

    def push(self, samples_S: np.ndarray) -> np.ndarray:
        """Takes input samples, and returns the output samples (S,) that no later input changes."""
        if self._up == self._down:
            return samples_S
        self._waiting_S = np.concatenate([self._waiting_S, samples_S])
        periods = (len(self._waiting_S) - self._margin - self._known) // self._down
        return self._take(max(0, periods) * self._down)

    def finish(self) -> np.ndarray:
        """Returns the output samples (S,) that were held back for input that now does not come."""
        return self._take(len(self._waiting_S) - self._known)

    def _take(self, count: int) -> np.ndarray:
        """The output of the next `count` input samples."""
        if count == 0:
            return np.zeros(0, dtype=np.float32)
        resampled_S = resample_poly(self._waiting_S, self._up, self._down).astype(np.float32)
        first, end = (-(-n * self._up // self._down) for n in (self._known, self._known + count))
        used = max(0, self._known + count - self._margin) // self._down * self._down
        self._known += count - used
        self._waiting_S = self._waiting_S[used:]
        return resampled_S[first:end]

"""Rates and sizes of the signal path, each defined once; everything else is derived here.

audio (16 kHz) -> features (100 Hz) -> encoder frames (50 Hz) -> output frames (25 Hz)
"""

from typing import Any

SAMPLE_RATE_HZ = 16000
NUM_MELS = 80

FRAME_SHIFT_MS = 10  # features: one frame every 10 ms
FRAME_SHIFT_SAMPLES = SAMPLE_RATE_HZ * FRAME_SHIFT_MS // 1000
FRAME_LENGTH_MS = 25

EMBED_SUBSAMPLING = 2  # the convolutional front end: 100 Hz -> 50 Hz
OUTPUT_SUBSAMPLING = 2  # the last downsampling: 50 Hz -> 25 Hz
SUBSAMPLING = EMBED_SUBSAMPLING * OUTPUT_SUBSAMPLING

# Chunk and left context are counted in encoder frames.
ENCODER_FRAME_MS = FRAME_SHIFT_MS * EMBED_SUBSAMPLING
OUTPUT_FRAME_MS = FRAME_SHIFT_MS * SUBSAMPLING

# What features are padded with: below the log-mel energy of any recording.
LOG_MEL_SILENCE = -23.025850929940457  # log(1e-10)


def embed_frames(feature_frames: Any) -> Any:
    """Encoder frames (50 Hz) of so many feature frames, an int or a tensor of lengths; 8 or fewer give none."""
    return (feature_frames - 7) // EMBED_SUBSAMPLING


def feature_frames(encoder_frames: int) -> int:
    """The least feature frames of which the front end makes so many encoder frames (50 Hz)."""
    return encoder_frames * EMBED_SUBSAMPLING + 7


def output_frames(feature_frames: Any) -> Any:
    """Output frames (25 Hz) of so many feature frames, an int or a tensor of lengths; 0 if there are too few."""
    frames = (embed_frames(feature_frames) + 1) // OUTPUT_SUBSAMPLING
    return frames * (frames > 0)


def chunk_ms(chunk_frames: int) -> int:
    """Duration in ms of a chunk counted in encoder frames (50 Hz)."""
    return chunk_frames * ENCODER_FRAME_MS


def chunk_frames(chunk_ms: int) -> int:
    """Encoder frames (50 Hz) of a chunk in ms.

    Raises:
        ValueError: if the chunk is not a whole, positive number of frames.
    """
    frames, rest = divmod(chunk_ms, ENCODER_FRAME_MS)
    if rest or frames <= 0:
        raise ValueError(f"chunk of {chunk_ms} ms: give a positive multiple of {ENCODER_FRAME_MS} ms")
    return frames

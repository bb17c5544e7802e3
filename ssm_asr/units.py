"""Rates and sizes of the signal path. Each is defined once, here, and everything else is derived from it.

audio (16 kHz) -> features (100 Hz) -> encoder frames (50 Hz) -> output frames (25 Hz)

Chunks and left contexts are counted in encoder frames of 20 ms. `parse_frames` reads them as users write them.
"""

import re
from decimal import Decimal
from typing import Any

SAMPLE_RATE_HZ = 16000
NUM_MELS = 80

FRAME_SHIFT_MS = 10  # features: one frame every 10 ms
FRAME_SHIFT_SAMPLES = SAMPLE_RATE_HZ * FRAME_SHIFT_MS // 1000
FRAME_LENGTH_MS = 25

EMBED_SUBSAMPLING = 2  # the convolutional front end: 100 Hz -> 50 Hz
OUTPUT_SUBSAMPLING = 2  # the last downsampling: 50 Hz -> 25 Hz
SUBSAMPLING = EMBED_SUBSAMPLING * OUTPUT_SUBSAMPLING

ENCODER_FRAME_MS = FRAME_SHIFT_MS * EMBED_SUBSAMPLING
OUTPUT_FRAME_MS = FRAME_SHIFT_MS * SUBSAMPLING

# Features are padded with a value below the log-mel energy of any recording.
LOG_MEL_SILENCE = -23.025850929940457  # log(1e-10)


def embed_frames(feature_frames: Any) -> Any:
    """Encoder frames (50 Hz) that the front end makes of feature frames; 8 feature frames or fewer give none.

    Args:
        feature_frames: an int or a tensor of lengths.
    """
    return (feature_frames - 7) // EMBED_SUBSAMPLING


def feature_frames(encoder_frames: int) -> int:
    """The smallest number of feature frames of which the front end makes `encoder_frames` frames (50 Hz)."""
    return encoder_frames * EMBED_SUBSAMPLING + 7


def output_frames(feature_frames: Any) -> Any:
    """Output frames (25 Hz) that the encoder makes of feature frames; 0 if there are too few.

    Args:
        feature_frames: an int or a tensor of lengths.
    """
    frames = (embed_frames(feature_frames) + 1) // OUTPUT_SUBSAMPLING
    return frames * (frames > 0)


def chunk_ms(chunk_frames: int) -> int:
    """The duration in ms of a chunk or left context that is counted in encoder frames (50 Hz)."""
    return chunk_frames * ENCODER_FRAME_MS


def parse_frames(time: str | int) -> int:
    """The encoder frames (20 ms) of a chunk or left context, as users write it: "320ms", "0.32s", "16" or 16.

    A number without a unit counts frames of 20 ms. -1, without a unit, is returned as it is: it stands for everything
    there is.

    Raises:
        ValueError: if the time is written in another way, or is no whole number of frames.
    """
    written = re.fullmatch(r"(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}) ?(ms|s)", str(time))
    if written is None:
        if re.fullmatch(r"-1|\d{1,9}", str(time)):
            return int(time)
        raise ValueError(
            f"time {time!r}: give it with its unit, such as 320ms or 1.28s, or as a number of frames of "
            f"{ENCODER_FRAME_MS} ms, such as 16"
        )
    time_ms = Decimal(written[1]) * (1000 if written[2] == "s" else 1)
    frames = int(time_ms // ENCODER_FRAME_MS)
    if time_ms % ENCODER_FRAME_MS:
        below, above = chunk_ms(frames), chunk_ms(frames + 1)
        raise ValueError(
            f"time {time!r}: no whole number of frames of {ENCODER_FRAME_MS} ms; give {below}ms or {above}ms"
        )
    return frames

"""Makes tones, which tests use in place of speech."""

from pathlib import Path

import numpy as np
from lhotse import MonoCut, Recording, SupervisionSegment

WORDS = ["ONE", "TWO", "THREE", "FOUR"]
NUM_UTTERANCES = 40


def tone(seconds: float, seed: int = 0) -> np.ndarray:
    """Returns samples_S of a chirping tone with noise."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(int(seconds * 16000)) / 16000
    sound_S = 0.2 * np.sin(2 * np.pi * (200 + 50 * seed % 900) * time_s * (1 + 0.1 * time_s))
    return (sound_S + 0.01 * rng.standard_normal(len(time_s))).astype(np.float32)


def utterance(path: Path, name: str, text: str) -> MonoCut:
    """Returns a cut of a whole file with one transcript."""
    recording = Recording.from_file(path, recording_id=name)
    segment = SupervisionSegment(name, name, 0.0, recording.duration, text=text)
    return MonoCut(name, 0.0, recording.duration, 0, supervisions=[segment], recording=recording)

"""Gives noises to mix into training speech, from MUSAN or made here.

Made noises are coloured noise, whose power falls as 1/f^k, and babble, in which several talkers of the corpus speak at
once.

Shapes: S samples.
"""

import random
from pathlib import Path

import numpy as np
import soundfile
from lhotse import CutSet, Recording
from lhotse.cut import Cut
from tqdm import tqdm

from ssm_asr.units import SAMPLE_RATE_HZ

NOISE_S = 10.0  # a noise cut is this long
MIN_NOISE_S = 1.0  # shorter ends of MUSAN recordings are left out
NOISE_RMS = 0.05  # made noises have this level, full scale being 1
MAX_COLOUR = 2.0  # k of 1/f^k is at most this; 0 is white, 1 pink, 2 brown
TALKERS = (3, 8)  # babble has at least and at most this many talkers


def musan_noises(corpus: Path) -> CutSet:
    """Returns MUSAN's music, speech and noise in cuts of 10 s.

    Raises:
        ValueError: if the directory is no MUSAN.
    """
    parts = ("music", "speech", "noise")
    missing = [part for part in parts if not (corpus / part).is_dir()]
    if missing:
        raise ValueError(f"{corpus}: no MUSAN here, expected music/, speech/ and noise/ (no {missing[0]}/)")
    recordings = [Recording.from_file(path) for part in parts for path in sorted((corpus / part).rglob("*.wav"))]
    if not recordings:
        raise ValueError(f"{corpus}: no MUSAN here, there is no *.wav in music/, speech/ and noise/")
    cuts = CutSet.from_cuts(recording.to_cut() for recording in recordings)
    return CutSet.from_cuts(cut for cut in cuts.cut_into_windows(NOISE_S) if cut.duration >= MIN_NOISE_S)


def made_noises(directory: Path, cuts: CutSet, *, count: int, seed: int) -> CutSet:
    """Makes noises of 10 s, alternately coloured noise and babble, as flac files, and returns their cuts.

    Args:
        directory: gets the files.
        cuts: speech for the babble; it must be of training cuts alone, or models would be trained on the test set.
        count: number of noises.
        seed: decides what the noises are; an equal seed makes equal noises.
    """
    directory = directory.resolve()  # the manifest names the files by absolute path
    directory.mkdir(parents=True, exist_ok=True)
    speech = list(cuts)
    recordings = []
    for k in tqdm(range(count), desc="making noise", unit="file", mininterval=1.0):
        rng = random.Random(f"{seed} noise {k}")
        samples_S = _babble(speech, rng) if k % 2 else _coloured(rng)
        samples_S *= NOISE_RMS / np.sqrt(np.mean(samples_S**2))
        path = directory / f"{'babble' if k % 2 else 'coloured'}-{k:04d}.flac"
        soundfile.write(path, np.clip(samples_S, -1.0, 1.0), SAMPLE_RATE_HZ, subtype="PCM_16")
        recordings.append(Recording.from_file(path))
    return CutSet.from_cuts(recording.to_cut() for recording in recordings)


def _coloured(rng: random.Random) -> np.ndarray:
    """Returns Gaussian noise whose power falls as 1/f^k, with k drawn evenly from 0 to MAX_COLOUR."""
    num_samples = int(NOISE_S * SAMPLE_RATE_HZ)
    white_S = np.random.default_rng(rng.getrandbits(32)).standard_normal(num_samples)
    frequency_hz = np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE_HZ)
    gain = np.maximum(frequency_hz, 20.0) ** (-rng.uniform(0.0, MAX_COLOUR) / 2)
    return np.fft.irfft(np.fft.rfft(white_S) * gain, num_samples)


def _babble(speech: list[Cut], rng: random.Random) -> np.ndarray:
    """Returns several talkers of equal power who speak at once without a pause."""
    num_samples = int(NOISE_S * SAMPLE_RATE_HZ)
    babble_S = np.zeros(num_samples)
    for _ in range(rng.randint(*TALKERS)):
        pieces: list[np.ndarray] = []
        while sum(map(len, pieces)) < num_samples:
            samples_S = rng.choice(speech).load_audio()[0]
            pieces.append(samples_S / max(np.sqrt(np.mean(samples_S**2)), 1e-4))
        babble_S += np.concatenate(pieces)[:num_samples]
    return babble_S

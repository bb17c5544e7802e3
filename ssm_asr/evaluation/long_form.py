"""Error rate against the length of the audio, with the state carried throughout."""

import random
from collections.abc import Iterator

import numpy as np
from lhotse import CutSet

from ssm_asr import units
from ssm_asr.data.filtering import text_of
from ssm_asr.evaluation.scoring import Score, score
from ssm_asr.evaluation.streaming import Timing, recognise
from ssm_asr.search.recognizer import StreamingRecognizer

SILENCE_RMS = 10 ** (-70 / 20)  # of full scale: a quiet room, not digital zeros


def joined(cuts: CutSet, count: int, silence_s: float) -> Iterator[tuple[str, np.ndarray, str]]:
    """(id, samples_S, reference) of `count` utterances each, in a shuffled order that is always the same.

    Args:
        silence_s: pause at every second joint; 0 for none.
    """
    order = list(cuts)
    random.Random(0).shuffle(order)
    rng = np.random.default_rng(0)
    pause_S = rng.normal(0.0, SILENCE_RMS, round(silence_s * units.SAMPLE_RATE_HZ)).astype(np.float32)
    for start in range(0, len(order), count):
        group = order[start : start + count]
        parts = []
        for i, cut in enumerate(group):
            parts.append(cut.load_audio()[0])
            if i % 2 and i + 1 < len(group):
                parts.append(pause_S)
        yield f"{start}-{len(group)}", np.concatenate(parts), " ".join(text_of(cut) for cut in group)


def measure(
    recognizer: StreamingRecognizer, cuts: CutSet, count: int, silence_s: float, unit: str
) -> tuple[Score, float]:
    """The score of all groups of `count` utterances, and their mean length in s."""
    refs, hyps, lengths_s = {}, {}, []
    for name, samples_S, text in joined(cuts, count, silence_s):
        refs[name], hyps[name] = text, recognise(recognizer, samples_S, Timing(), show=False)
        lengths_s.append(len(samples_S) / units.SAMPLE_RATE_HZ)
    return score(refs, hyps, unit), float(np.mean(lengths_s))

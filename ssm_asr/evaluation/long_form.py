"""Error rate against the length of the audio, with the state carried from beginning to end.

Shapes: S samples.
"""

import random
from collections.abc import Iterator

import numpy as np
from lhotse import CutSet
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.data.features import cut_samples
from ssm_asr.data.filtering import text_of
from ssm_asr.evaluation.scoring import Score, bootstrap_interval, score
from ssm_asr.evaluation.streaming import Timing, recognise
from ssm_asr.search.recognizer import StreamingRecognizer

HEADER = "| model | joined | mean length s | pauses s | error rate % [95 %] | sub / del / ins |\n" + "|" + "---|" * 6
SILENCE_RMS = 10 ** (-70 / 20)  # of full scale: a quiet room, not digital zeros


def joined(cuts: CutSet, count: int, silence_s: float) -> Iterator[tuple[str, np.ndarray, str]]:
    """Joins utterances end to end, `count` at a time, in a shuffled order that never changes.

    Args:
        silence_s: the pause in s at every second joint; 0 for none.

    Yields:
        The id, samples_S and reference of each joined recording.
    """
    order = list(cuts)
    random.Random(0).shuffle(order)
    rng = np.random.default_rng(0)
    pause_S = rng.normal(0.0, SILENCE_RMS, round(silence_s * units.SAMPLE_RATE_HZ)).astype(np.float32)
    for start in range(0, len(order), count):
        group = order[start : start + count]
        parts = []
        for i, cut in enumerate(group):
            parts.append(cut_samples(cut))
            if i % 2 and i + 1 < len(group):
                parts.append(pause_S)
        yield f"{start}-{len(group)}", np.concatenate(parts), " ".join(text_of(cut) for cut in group)


def measure(
    recognizer: StreamingRecognizer, cuts: CutSet, count: int, silence_s: float, unit: str
) -> tuple[Score, float]:
    """Streams all groups of `count` utterances, and returns their score and their mean length in s.

    Args:
        silence_s: the pause in s at every second joint; 0 for none.
        unit: word or char.
    """
    refs, hyps, lengths_s = {}, {}, []
    for name, samples_S, text in joined(cuts, count, silence_s):
        refs[name], hyps[name] = text, recognise(recognizer, samples_S, Timing(), show=False)
        lengths_s.append(len(samples_S) / units.SAMPLE_RATE_HZ)
    return score(refs, hyps, unit), float(np.mean(lengths_s))


def table_rows(
    name: str, recognizer: StreamingRecognizer, cuts: CutSet, joins: list[int], silence_s: float, unit: str
) -> Iterator[str]:
    """Measures a model at several lengths, and yields a row of the Markdown table below HEADER for each.

    Args:
        name: the name of the model in the table.
        joins: the numbers of utterances joined. From 3 on, each is measured without and with pauses.
        silence_s: the pauses in s.
        unit: word or char.
    """
    lengths = [(count, pause_s) for count in joins for pause_s in (0.0, silence_s) if count > 2 or not pause_s]
    for count, pause_s in tqdm(lengths, desc=name, unit="length"):
        result, length_s = measure(recognizer, cuts, count, pause_s, unit)
        low, high = bootstrap_interval(result.errors_U, result.totals_U)
        yield (
            f"| {name} | {count} | {length_s:.0f} | {pause_s:g} "
            f"| {100 * result.rate:.2f} [{100 * low:.2f}, {100 * high:.2f}] "
            f"| {result.substitutions} / {result.deletions} / {result.insertions} |"
        )

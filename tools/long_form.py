"""Error rate against the length of the audio: python tools/long_form.py --checkpoint FILE … --cuts FILE

Test utterances are joined, 1, 2, 5, 10 and 30 at a time, without a pause and with 10 s of near silence at every second
joint, and recognised chunk by chunk with the state carried from the first sample to the last, as in a call or a meeting
that is never reset. Prints a Markdown table, a row a model and length; a model that drifts gets worse down the table.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lhotse import CutSet
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.checkpoint import load_model
from ssm_asr.data.filtering import text_of
from ssm_asr.data.store import read_cuts
from ssm_asr.decode import scoring_unit
from ssm_asr.program import positives, run
from ssm_asr.scoring import Score, bootstrap_interval, score
from ssm_asr.search.recognizer import StreamingRecognizer
from ssm_asr.stream import Timing, recognise

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


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", type=Path, help="checkpoints to compare")
    parser.add_argument("--cuts", required=True, type=Path, help="lhotse cuts with audio and transcripts")
    parser.add_argument(
        "--joins", type=positives, default="1,2,5,10,30", help="utterances joined (default: 1,2,5,10,30)"
    )
    parser.add_argument("--silence-s", type=float, default=10.0, help="pause at every second joint (default: 10)")
    parser.add_argument("--chunk", type=int, help="frames of 20 ms (default: the checkpoint's)")
    parser.add_argument("--left", type=int, help="left context, frames of 20 ms (default: the checkpoint's)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pauses = [(count, pause) for count in options.joins for pause in (0.0, options.silence_s) if count > 2 or not pause]
    rows = []
    try:
        cuts = read_cuts(options.cuts).to_eager()
        for path in options.checkpoint:
            loaded = load_model(path)
            recognizer = StreamingRecognizer(loaded, options.chunk, options.left)
            unit, name = scoring_unit(loaded, None), f"{path.parent.name}/{path.stem}"
            for count, pause in tqdm(pauses, desc=name, unit="length"):
                result, length_s = measure(recognizer, cuts, count, pause, unit)
                low, high = bootstrap_interval(result.errors_U, result.totals_U)
                rows.append(
                    f"| {name} | {count} | {length_s:.0f} | {pause:g} "
                    f"| {100 * result.rate:.2f} [{100 * low:.2f}, {100 * high:.2f}] "
                    f"| {result.substitutions} / {result.deletions} / {result.insertions} |"
                )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("| model | joined | mean length s | pauses s | error rate % [95 %] | sub / del / ins |")
    print("|" + "---|" * 6)
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

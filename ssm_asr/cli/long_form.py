"""Error rate against the length of the audio: ssm-asr long-form --checkpoint FILE … --cuts FILE

Test utterances are joined, 1, 2, 5, 10 and 30 at a time, without a pause and with 10 s of near silence at every second
joint, and recognised chunk by chunk with the state carried from the first sample to the last, as in a call or a meeting
that is never reset. Prints a Markdown table, a row a model and length; a model that drifts gets worse down the table.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from ssm_asr.checkpoint import load_model
from ssm_asr.cli.program import positives
from ssm_asr.data.store import read_cuts
from ssm_asr.evaluation.long_form import measure
from ssm_asr.evaluation.scoring import bootstrap_interval
from ssm_asr.evaluation.test_sets import scoring_unit
from ssm_asr.search.recognizer import StreamingRecognizer


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

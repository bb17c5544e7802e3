"""Error rate against the length of the audio: ssm-asr long-form --checkpoint FILE … --cuts FILE

Test utterances are joined, 1, 2, 5, 10 and 30 at a time, without a pause and with 10 s of near silence at every second
joint, and recognised chunk by chunk with the state carried from the first sample to the last, as in a call or a meeting
that is never reset. Prints a Markdown table, a row a model and length; a model that drifts gets worse down the table.
"""

import argparse
import sys
from pathlib import Path

import torch

from ssm_asr.checkpoint import load_model
from ssm_asr.cli.arguments import chunk_arguments, trust_arguments
from ssm_asr.cli.program import positives
from ssm_asr.data.store import read_cuts
from ssm_asr.evaluation.long_form import HEADER, table_rows
from ssm_asr.evaluation.test_sets import scoring_unit
from ssm_asr.search.recognizer import StreamingRecognizer


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, nargs="+", type=Path, help="checkpoints to compare")
    parser.add_argument("--cuts", required=True, type=Path, help="lhotse cuts with audio and transcripts")
    parser.add_argument(
        "--joins", type=positives, default="1,2,5,10,30", help="utterances joined (default: 1,2,5,10,30)"
    )
    parser.add_argument("--silence-s", type=float, default=10.0, help="pause at every second joint (default: 10)")
    chunk_arguments(parser)
    trust_arguments(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[str] = []
    try:
        cuts = read_cuts(options.cuts).to_eager()
        for path in options.checkpoint:
            loaded = load_model(path)
            recognizer = StreamingRecognizer(loaded, options.chunk, options.left)
            name, unit = f"{path.parent.name}/{path.stem}", scoring_unit(loaded, None)
            rows += table_rows(name, recognizer, cuts, options.joins, options.silence_s, unit)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join([HEADER, *rows]))
    return 0

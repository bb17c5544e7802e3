"""Check an export in stock sherpa-onnx: ssm-asr check-export --checkpoint FILE --export DIR --cuts FILE

sherpa_onnx.OnlineRecognizer, as pip installs it, decodes every utterance, several streams at once, and our own
recogniser decodes the audio as well: in fp32, all token sequences must be equal. Then the utterances go into one
stream, joined with pauses, with endpoints detected as in production: tokens must be equal again, and the resident
memory flat. In fp16 and int8, where tokens may differ, the error rate must not be more than 0.3 % (absolute) above the
one of our own recogniser, as far as the size of the test set can tell (95 %).
"""

import argparse
import sys
from pathlib import Path

import torch
from lhotse import CutSet

from ssm_asr.checkpoint import load_model
from ssm_asr.cli.arguments import trust_arguments
from ssm_asr.cli.program import positive
from ssm_asr.config import load_experiment
from ssm_asr.evaluation.check_export import check_long, check_utterances
from ssm_asr.evaluation.test_sets import read_test_cuts, scoring_unit
from ssm_asr.exporting.onnx_files import PRECISIONS
from ssm_asr.search.recognizer import StreamingRecognizer


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="what was exported")
    parser.add_argument("--export", required=True, type=Path, help="directory of an export in format sherpa")
    parser.add_argument("--cuts", required=True, type=Path, help="lhotse cuts with audio and transcripts")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="files to check (default: fp32)"
    )
    parser.add_argument("--streams", type=positive, default=8, help="streams at once (default: 8)")
    parser.add_argument(
        "--limit", type=int, default=0, help="utterances to take, from the first on; 0 is all (default: 0)"
    )
    parser.add_argument(
        "--hours", type=float, default=0.0, help="length of the long stream; 0 has each utterance once (default: 0)"
    )
    trust_arguments(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        loaded = load_model(options.checkpoint)
        decode = load_experiment(options.export / "config.yaml").decode
        reference = StreamingRecognizer(loaded, decode.chunk_frames, decode.left_context_frames, "greedy")
        manifest: CutSet = read_test_cuts(options.cuts)
        cuts = list(manifest.subset(first=options.limit) if options.limit else manifest)
        unit = scoring_unit(loaded, None)
        good = [
            check_utterances(options.export, precision, reference, cuts, options.streams, unit)
            for precision in options.precision
        ]
        if "fp32" in options.precision:
            good.append(check_long(options.export, reference, cuts, options.hours))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("all as it should be" if all(good) else "FAILED")
    return 0 if all(good) else 1

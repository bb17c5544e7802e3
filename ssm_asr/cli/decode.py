"""Decode whole utterances: ssm-asr decode --checkpoint FILE --cuts FILE … [--chunk TIME] [--left TIME]

Attention and convolutions are masked to chunks, so that the result is what streaming would give, computed in one pass.
--chunk -1 decodes without chunks, --left -1 with all the left context there is. The checkpoint carries model, tokens
and settings; results go to a directory beside it.
"""

import argparse
import sys
from pathlib import Path

from ssm_asr.checkpoint import load_model
from ssm_asr.cli.arguments import decoding_arguments, result_dir, scoring_arguments, trust_arguments
from ssm_asr.evaluation.offline import decode_cuts
from ssm_asr.evaluation.results import rate_text, write_results
from ssm_asr.evaluation.test_sets import marked_texts, read_test_sets, scoring_unit, start_reading
from ssm_asr.ops.devices import find_device
from ssm_asr.search.offline import OfflineRecognizer


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    decoding_arguments(parser)
    scoring_arguments(parser)
    parser.add_argument("--cuts", required=True, nargs="+", type=Path, help="lhotse cuts with transcripts")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--max-duration-s", type=float, default=200.0, help="seconds of audio a batch (default: 200)")
    trust_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        device = find_device(options.device)
        start_reading(device)
        loaded = load_model(options.checkpoint, device)
        recognizer = OfflineRecognizer(loaded, options.chunk, options.left, options.method, options.beam)
        if options.max_duration_s <= 0:
            raise ValueError(f"--max-duration-s {options.max_duration_s:g}: give a positive number of seconds")
        sets = read_test_sets(options.cuts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    settings = recognizer.chunk, recognizer.left_context, recognizer.method, recognizer.beam
    outs = {name: result_dir(options, f"decode-{name}", *settings) for name in sets}
    unit, checkpoint = scoring_unit(loaded, options.unit), str(options.checkpoint.resolve())
    failed = 0
    for name, cuts in sets.items():
        refs, hyps, facts = decode_cuts(recognizer, cuts, options.max_duration_s)
        facts |= {"cuts": name, "checkpoint": checkpoint}
        summary = write_results(outs[name], refs, hyps, unit, facts, marked_texts(cuts))
        print(f"{name}: {rate_text(summary)}; details in {outs[name]}")
        failed += len(facts["faults"])
    return 1 if failed else 0

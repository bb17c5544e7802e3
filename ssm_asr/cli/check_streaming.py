"""Check that streaming equals the chunk-masked pass: ssm-asr check-streaming --checkpoint FILE --cuts FILE

For each chunk size, encodes utterances twice, from one set of features: chunk after chunk with explicit state, and
in one pass masked to chunks. Prints the worst absolute difference of the outputs, and fails if one is above 1e-4.
"""

import argparse
import sys
from pathlib import Path

from ssm_asr import units
from ssm_asr.checkpoint import load_model
from ssm_asr.cli.arguments import frames, frames_list, trust_arguments
from ssm_asr.data.loading import load_features
from ssm_asr.data.store import read_cuts
from ssm_asr.evaluation.check_streaming import TOLERANCE, worst_difference
from ssm_asr.ops.devices import find_device
from ssm_asr.search.encoding import streaming_context


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint of a causal model")
    parser.add_argument("--cuts", required=True, type=Path, help="lhotse cuts")
    parser.add_argument(
        "--chunks",
        type=frames_list,
        metavar="TIME,…",
        default="160ms,320ms,640ms,1280ms,2560ms",
        help="with their units, or as bare numbers of frames of 20 ms (default: %(default)s)",
    )
    parser.add_argument(
        "--left",
        type=frames,
        metavar="TIME",
        default="1280ms",
        help="left context, written in one of these ways (default: %(default)s)",
    )
    parser.add_argument(
        "--limit", type=int, default=20, help="utterances to take, from the first on; 0 is all (default: 20)"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: cpu)")
    trust_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        device = find_device(options.device)
        loaded = load_model(options.checkpoint, device)
        contexts = {
            chunk: streaming_context(loaded.experiment.model.encoder, chunk, options.left) for chunk in options.chunks
        }
        cuts = read_cuts(options.cuts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    chosen = cuts.subset(first=options.limit) if options.limit else cuts
    utterances = [load_features(cut).to(device) for cut in chosen]
    seconds = sum(len(features_TF) for features_TF in utterances) * units.FRAME_SHIFT_MS / 1000
    print(f"{len(utterances)} utterances, {seconds:.1f} s\nchunk ms  left ms  worst difference  largest output")
    failed = False
    for chunk, left in contexts.items():
        worst, largest = worst_difference(loaded.model, utterances, chunk, left)
        print(f"{units.chunk_ms(chunk):8d} {units.chunk_ms(left):8d} {worst:17.2e} {largest:15.2f}")
        failed |= not worst <= TOLERANCE  # NaN fails, too
    print(f"{'FAILED: above' if failed else 'all within'} {TOLERANCE:g}")
    return 1 if failed else 0

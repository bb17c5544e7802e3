"""Decode whole utterances: ssm-asr decode --checkpoint FILE --cuts FILE … [--chunk C] [--left L]

Attention and convolutions are masked to chunks, so that the result is what streaming would give, computed in one pass.
The checkpoint carries model, tokens and settings; results go to a directory beside it.
"""

import argparse
import sys
from pathlib import Path

from ssm_asr.checkpoint import Loaded, load_model
from ssm_asr.cli.arguments import decoding_arguments, result_dir
from ssm_asr.evaluation.offline import decode_cuts
from ssm_asr.evaluation.results import rate_text, write_results
from ssm_asr.evaluation.test_sets import marked_texts, read_test_sets, scoring_unit
from ssm_asr.ops.devices import find_device
from ssm_asr.search import make_search
from ssm_asr.search.recognizer import streaming_context
from ssm_asr.search.scorer import TransducerScorer


def _chunk_and_left(loaded: Loaded, options: argparse.Namespace) -> tuple[int, int]:
    """The masking that is asked for: -1 for all there is."""
    settings, encoder = loaded.experiment.decode, loaded.experiment.model.encoder
    chunk = settings.chunk_frames if options.chunk is None else options.chunk
    left = settings.left_context_frames if options.left is None else options.left
    if options.chunk is None and not encoder.causal:
        chunk = -1
    if chunk == -1:
        if options.left not in (None, -1):
            raise ValueError(
                f"--left {options.left}: whole utterances are decoded, which see all there is; leave it out"
            )
        return -1, -1
    visible = streaming_context(encoder, chunk, 0 if left == -1 else left)
    return chunk, -1 if left == -1 else visible


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    decoding_arguments(parser)
    parser.add_argument("--cuts", required=True, nargs="+", type=Path, help="lhotse cuts with transcripts")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--max-duration-s", type=float, default=200.0, help="seconds of audio a batch")
    options = parser.parse_args(arguments)
    try:
        loaded = load_model(options.checkpoint, find_device(options.device))
        settings = loaded.experiment.decode
        chunk, left = _chunk_and_left(loaded, options)
        method, beam = options.method or settings.method, settings.beam if options.beam is None else options.beam
        search = make_search(method, TransducerScorer(loaded.model, loaded.tokenizer.unk_id), beam)
        if options.max_duration_s <= 0:
            raise ValueError(f"--max-duration-s {options.max_duration_s:g}: give a positive number of seconds")
        sets = read_test_sets(options.cuts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    outs = {name: result_dir(options, f"decode-{name}", chunk, left, method, beam) for name in sets}
    for name, cuts in sets.items():
        refs, hyps, seconds = decode_cuts(loaded, cuts, chunk, left, search, options.max_duration_s)
        audio_s = sum(cut.duration for cut in cuts)
        facts = {
            "mode": "chunk-masked" if chunk > 0 else "whole utterance",
            "cuts": name,
            "chunk_frames": chunk,
            "left_context_frames": left,
            "method": method,
            "beam": beam if method == "beam" else None,
            "state_bytes": None,
            "audio_s": audio_s,
            "real_time_factor": seconds / audio_s,
            "device": str(next(loaded.model.parameters()).device),
            "checkpoint": str(options.checkpoint.resolve()),
        }
        summary = write_results(outs[name], refs, hyps, scoring_unit(loaded, options.unit), facts, marked_texts(cuts))
        print(f"{name}: {rate_text(summary)}; details in {outs[name]}")
    return 0

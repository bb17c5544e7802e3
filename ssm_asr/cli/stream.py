"""Recognise audio chunk by chunk: ssm-asr stream --checkpoint FILE --wav FILE … | --cuts FILE …

As in production, audio goes in in blocks of 100 ms, features are computed as it comes, and text comes out after every
chunk. With --wav, partial results are printed as they change, each with the seconds of audio heard so far, and a last
line says what the computation took; `ssm-asr transcribe` prints text alone. With --cuts, all cuts are recognised and
scored.
"""

import argparse
import sys
from pathlib import Path

import torch
from lhotse import CutSet
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.checkpoint import load_model
from ssm_asr.cli.arguments import decoding_arguments, result_dir, scoring_arguments, trust_arguments
from ssm_asr.data.features import AudioError, read_audio
from ssm_asr.evaluation.results import rate_text, write_results
from ssm_asr.evaluation.streaming import Timing, recognise, stream_cuts, timing_text
from ssm_asr.evaluation.test_sets import marked_texts, read_test_sets, scoring_unit
from ssm_asr.ops.devices import find_device
from ssm_asr.search.recognizer import StreamingRecognizer


def _stream_files(recognizer: StreamingRecognizer, paths: list[Path]) -> int:
    """Recognises audio files and prints what comes; a file that cannot be read is reported and passed over."""
    failed = 0
    for path in paths:
        try:
            samples_S = read_audio(path)
        except AudioError as error:
            print(error, file=sys.stderr)
            failed += 1
            continue
        print(f"{path} ({len(samples_S) / units.SAMPLE_RATE_HZ:.2f} s)")
        timing = Timing()
        text = recognise(recognizer, samples_S, timing, show=True)
        print(f"  final      {text}\n  {timing_text(timing.facts(recognizer.chunk))}")
    return 2 if failed else 0


def _score_cuts(
    recognizer: StreamingRecognizer, sets: dict[str, CutSet], unit: str, options: argparse.Namespace
) -> int:
    """Recognises and scores test sets; returns how many utterances could not be read."""
    settings = recognizer.chunk, recognizer.left_context, recognizer.method, recognizer.beam
    outs = {name: result_dir(options, f"stream-{name}", *settings) for name in sets}
    failed = 0
    for name, cuts in sets.items():
        if options.limit:
            print(f"{name}: the first {len(cuts)} utterances")
        with tqdm(total=len(cuts), desc="stream", unit="utt") as bar:
            refs, hyps, facts = stream_cuts(recognizer, cuts, bar.update, options.streams)
        facts |= {"cuts": name, "checkpoint": str(options.checkpoint.resolve())}
        summary = write_results(outs[name], refs, hyps, unit, facts, marked_texts(cuts))
        print(f"{name}: {rate_text(summary)}; details in {outs[name]}\n  {timing_text(facts)}")
        failed += len(facts["faults"])
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    decoding_arguments(parser)
    scoring_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--wav", nargs="+", type=Path, help="audio files (wav, flac, …)")
    what.add_argument("--cuts", nargs="+", type=Path, help="lhotse cuts with transcripts, to be scored")
    parser.add_argument(
        "--limit",
        type=int,
        default=0,
        help="utterances to take of each --cuts, from the first on; 0 is all (default: 0)",
    )
    parser.add_argument(
        "--streams", type=int, help="utterances of --cuts recognised at once (default: 1 on a CPU, 128 on a GPU)"
    )
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the computation (default: 1)")
    trust_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads}: give 1 or more")
        if options.streams is not None and options.streams < 1:
            raise ValueError(f"--streams {options.streams}: give 1 or more")
        torch.set_num_threads(options.threads)
        loaded = load_model(options.checkpoint, find_device(options.device))
        recognizer = StreamingRecognizer(loaded, options.chunk, options.left, options.method, options.beam)
        sets = read_test_sets(options.cuts or [], from_audio=True, limit=options.limit)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.wav:
        return _stream_files(recognizer, options.wav)
    return 1 if _score_cuts(recognizer, sets, scoring_unit(loaded, options.unit), options) else 0

"""Recognise audio chunk by chunk: python -m ssm_asr.stream --checkpoint FILE --wav FILE … | --cuts FILE

As in production, audio goes in in blocks of 100 ms, features are computed as it comes, and text comes out after every
chunk. With --wav, partial results are printed as they change; with --cuts, all cuts are recognised and scored.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from lhotse import CutSet
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.checkpoint import Loaded, load_model
from ssm_asr.data.features import AudioError, cut_samples, read_audio
from ssm_asr.data.filtering import text_of
from ssm_asr.decode import decoding_arguments, marked_texts, read_test_sets, result_dir, scoring_unit
from ssm_asr.describe import FLOAT_BYTES
from ssm_asr.distributed import find_device
from ssm_asr.encoder.state import state_sizes
from ssm_asr.encoder.subsampling import CHUNK_OVERLAP
from ssm_asr.program import run
from ssm_asr.results import rate_text, write_results
from ssm_asr.search.recognizer import Stream, StreamingRecognizer

BLOCK_SAMPLES = units.SAMPLE_RATE_HZ // 10


@dataclass
class Timing:
    """Computation of every chunk and of the features, and the audio that it was for."""

    chunk_ms: list[float] = field(default_factory=list)
    features_ms: float = 0.0
    audio_s: float = 0.0

    def facts(self, chunk_frames: int) -> dict[str, float]:
        """Milliseconds a chunk, real-time factor, and lag: how long after the first sound of a chunk its text is there.

        The lag takes a slow chunk, the 95 % quantile.
        """
        times_ms = np.array(self.chunk_ms or [0.0])
        wait_ms = units.chunk_ms(chunk_frames) + CHUNK_OVERLAP * units.FRAME_SHIFT_MS
        return {
            "chunk_compute_ms_median": float(np.median(times_ms)),
            "chunk_compute_ms_p95": float(np.quantile(times_ms, 0.95)),
            "lag_ms": wait_ms + float(np.quantile(times_ms, 0.95)),
            "real_time_factor": float((times_ms.sum() + self.features_ms) / 1000 / max(self.audio_s, 1e-9)),
            "audio_s": self.audio_s,
        }

    def text(self, chunk_frames: int) -> str:
        """`facts` for a reader."""
        facts = self.facts(chunk_frames)
        return (
            f"{facts['chunk_compute_ms_median']:.1f} ms a chunk (95 % below {facts['chunk_compute_ms_p95']:.1f}), "
            f"lag {facts['lag_ms']:.0f} ms, real-time factor {facts['real_time_factor']:.3f}"
        )


def recognise(recognizer: StreamingRecognizer, samples_S: np.ndarray, timing: Timing, show: bool) -> str:
    """Streams one recording; with `show`, prints every partial result that differs from the last."""
    stream = recognizer.open()
    shown = ""
    for start in range(0, len(samples_S), BLOCK_SAMPLES):
        begin = time.perf_counter()
        stream.accept(samples_S[start : start + BLOCK_SAMPLES])
        timing.features_ms += 1000 * (time.perf_counter() - begin)
        end_s = min(len(samples_S), start + BLOCK_SAMPLES) / units.SAMPLE_RATE_HZ
        shown = _decode_ready(recognizer, stream, timing, shown, end_s if show else None)
    recognizer.finish(stream)
    _decode_ready(recognizer, stream, timing, shown, len(samples_S) / units.SAMPLE_RATE_HZ if show else None)
    timing.audio_s += len(samples_S) / units.SAMPLE_RATE_HZ
    return recognizer.text(stream)


def _decode_ready(
    recognizer: StreamingRecognizer, stream: Stream, timing: Timing, shown: str, print_at_s: float | None
) -> str:
    while recognizer.ready(stream):
        begin = time.perf_counter()
        recognizer.decode([stream])
        timing.chunk_ms.append(1000 * (time.perf_counter() - begin))
        text = recognizer.text(stream)
        if print_at_s is not None and text != shown:
            print(f"  {print_at_s:7.2f} s  {text}", flush=True)
            shown = text
    return shown


def stream_files(recognizer: StreamingRecognizer, paths: list[Path]) -> int:
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
        print(f"  final      {text}\n  {timing.text(recognizer.chunk)}")
    return 2 if failed else 0


def stream_cuts(recognizer: StreamingRecognizer, cuts: CutSet) -> tuple[dict[str, str], dict[str, str], Timing]:
    """Recognises cuts one after the other: references and hypotheses by cut id, and the timing."""
    timing = Timing()
    refs: dict[str, str] = {}
    hyps: dict[str, str] = {}
    for cut in tqdm(cuts, total=len(cuts), desc="stream", unit="utt"):
        refs[cut.id] = text_of(cut)
        hyps[cut.id] = recognise(recognizer, cut_samples(cut), timing, show=False)
    return refs, hyps, timing


def _score_cuts(
    loaded: Loaded, recognizer: StreamingRecognizer, sets: dict[str, CutSet], options: argparse.Namespace
) -> None:
    state = recognizer.open().state
    asked = recognizer.chunk, recognizer.left_context, recognizer.method, recognizer.beam
    outs = {name: result_dir(options, f"stream-{name}", *asked) for name in sets}
    for name, cuts in sets.items():
        if options.limit:
            print(f"{name}: the first {len(cuts)} utterances")
        refs, hyps, timing = stream_cuts(recognizer, cuts)
        facts = {
            "mode": "streaming",
            "cuts": name,
            "chunk_frames": recognizer.chunk,
            "left_context_frames": recognizer.left_context,
            "method": recognizer.method,
            "beam": recognizer.beam if recognizer.method == "beam" else None,
            "state_bytes": FLOAT_BYTES * sum(state_sizes(state).values()),
            "device": str(recognizer.device),
            "checkpoint": str(options.checkpoint.resolve()),
        } | timing.facts(recognizer.chunk)
        out = outs[name]
        summary = write_results(out, refs, hyps, scoring_unit(loaded, options.unit), facts, marked_texts(cuts))
        print(f"{name}: {rate_text(summary)}; details in {out}\n  {timing.text(recognizer.chunk)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    decoding_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--wav", nargs="+", type=Path, help="audio files (wav, flac, …)")
    what.add_argument("--cuts", nargs="+", type=Path, help="lhotse cuts with transcripts, to be scored")
    parser.add_argument("--limit", type=int, default=0, help="first so many utterances of --cuts; 0 is all")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the computation (default: 1)")
    options = parser.parse_args(arguments)
    try:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads}: give 1 or more")
        torch.set_num_threads(options.threads)
        loaded = load_model(options.checkpoint, find_device(options.device))
        recognizer = StreamingRecognizer(loaded, options.chunk, options.left, options.method, options.beam)
        sets = read_test_sets(options.cuts or [], from_audio=True, limit=options.limit)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.wav:
        return stream_files(recognizer, options.wav)
    _score_cuts(loaded, recognizer, sets, options)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))

"""Decode whole utterances: python -m ssm_asr.decode --checkpoint FILE --cuts FILE … [--chunk C] [--left L]

Attention and convolutions are masked to chunks, so that the result is what streaming would give, computed in one pass.
The checkpoint carries model, tokens and settings; results go to a directory beside it.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from lhotse import CutSet
from tqdm import tqdm

from ssm_asr import units
from ssm_asr.checkpoint import Loaded, load_model
from ssm_asr.data.batches import eval_batches
from ssm_asr.data.filtering import text_of
from ssm_asr.data.store import read_cuts
from ssm_asr.distributed import find_device
from ssm_asr.results import rate_text, write_results
from ssm_asr.search import Search, make_search
from ssm_asr.search.recognizer import encode_as_streamed, streaming_context
from ssm_asr.search.scorer import TransducerScorer


@torch.inference_mode()
def decode_cuts(
    loaded: Loaded,
    cuts: CutSet,
    chunk: int,
    left_context: int,
    search: Search,
    max_duration_s: float,
) -> tuple[dict[str, str], dict[str, str], float]:
    """Decodes every cut.

    Args:
        chunk, left_context: in frames of 20 ms; chunk -1 for whole utterances.

    Returns:
        References and hypotheses by cut id, and the seconds of computation.
    """
    device = next(loaded.model.parameters()).device
    refs: dict[str, str] = {}
    hyps: dict[str, str] = {}
    begin = time.perf_counter()
    with tqdm(total=len(cuts), desc="decode", unit="utt") as bar:
        for batch in eval_batches(cuts, loaded.tokenizer, max_duration_s=max_duration_s):
            batch = batch.to(device)
            encoder_out, lens = encode_as_streamed(
                loaded.model, batch.features_BTF, batch.feature_lens_B, chunk, left_context
            )
            states = search.step(loaded.model.joiner.encoder_proj(encoder_out), lens, [search.start() for _ in lens])
            for i, text, state in zip(batch.ids, batch.texts, states, strict=True):
                refs[i] = text
                hyps[i] = loaded.tokenizer.decode(search.tokens(state))
            bar.update(len(lens))
    return refs, hyps, time.perf_counter() - begin


def decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that decode and stream share."""
    parser.add_argument("--checkpoint", required=True, type=Path, help="checkpoint, best from average")
    parser.add_argument("--chunk", type=int, help="frames of 20 ms: 16 is 320 ms (default: the checkpoint's)")
    parser.add_argument("--left", type=int, help="left context in frames of 20 ms (default: the checkpoint's)")
    parser.add_argument("--method", choices=["greedy", "beam"], help="search (default: the checkpoint's)")
    parser.add_argument("--beam", type=int, help="hypotheses that beam search keeps (default: the checkpoint's)")
    parser.add_argument("--unit", choices=["word", "char"], help="error rate of (default: char for char tokens)")
    parser.add_argument("--out", type=Path, help="directory for the results (default: one beside the checkpoint)")


def scoring_unit(loaded: Loaded, asked: str | None) -> str:
    """Words, or characters for character tokens, unless the user says."""
    return asked or ("char" if loaded.tokenizer.kind == "char" else "word")


def cuts_name(path: Path) -> str:
    """A short name of a manifest: cuts_test-clean.jsonl.gz -> test-clean."""
    return path.name.split(".")[0].removeprefix("cuts_")


def read_test_cuts(path: Path) -> CutSet:
    """The cuts of a manifest, to be recognised and scored.

    Raises:
        ValueError: if they cannot be read, have no transcripts, or are not of audio at 16 kHz.
    """
    cuts = read_cuts(path).to_eager()
    rates_hz = {cut.sampling_rate for cut in cuts}
    if rates_hz != {units.SAMPLE_RATE_HZ}:
        raise ValueError(f"{path}: audio at {sorted(rates_hz)} Hz, not {units.SAMPLE_RATE_HZ}; resample the cuts")
    if not any(text_of(cut) for cut in cuts):
        raise ValueError(f"{path}: no cut has a transcript, so nothing can be scored; stream --wav needs none")
    return cuts


def marked_texts(cuts: CutSet) -> dict[str, str]:
    """Transcripts with their disfluencies in parentheses, by cut id, of the cuts that carry one: custom["marked"]."""
    segments = {cut.id: cut.supervisions[0].custom or {} for cut in cuts if len(cut.supervisions) == 1}
    return {i: custom["marked"] for i, custom in segments.items() if "marked" in custom}


def result_dir(options: argparse.Namespace, name: str) -> Path:
    """Where the results of one manifest go: --out, divided if there are several manifests."""
    if options.out is None:
        return options.checkpoint.parent / name
    return options.out / name if len(options.cuts) > 1 else options.out


def _chunk_and_left(loaded: Loaded, options: argparse.Namespace) -> tuple[int, int]:
    """The masking that is asked for: -1 for all there is."""
    settings, encoder = loaded.experiment.decode, loaded.experiment.model.encoder
    chunk = settings.chunk_frames if options.chunk is None else options.chunk
    left = settings.left_context_frames if options.left is None else options.left
    if chunk == -1 or not encoder.causal:
        return -1, -1
    visible = streaming_context(encoder, chunk, max(0, left))
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
        manifests = {path: read_test_cuts(path) for path in options.cuts}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for path, cuts in manifests.items():
        refs, hyps, seconds = decode_cuts(loaded, cuts, chunk, left, search, options.max_duration_s)
        audio_s = sum(cut.duration for cut in cuts)
        facts = {
            "mode": "chunk-masked" if chunk > 0 else "whole utterance",
            "cuts": cuts_name(path),
            "chunk_frames": chunk,
            "left_context_frames": left,
            "method": method,
            "beam": beam if method == "beam" else None,
            "state_bytes": None,
            "audio_s": audio_s,
            "real_time_factor": seconds / audio_s,
            "device": str(next(loaded.model.parameters()).device),
            "checkpoint": str(options.checkpoint),
        }
        name = f"decode-{cuts_name(path)}-chunk{chunk}-left{left}-{method}"
        out = result_dir(options, name)
        summary = write_results(out, refs, hyps, scoring_unit(loaded, options.unit), facts, marked_texts(cuts))
        print(f"{cuts_name(path)}: {rate_text(summary)}; details in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

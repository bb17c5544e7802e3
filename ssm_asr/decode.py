"""Decode whole utterances: python -m ssm_asr.decode --checkpoint FILE --cuts FILE … [--chunk C] [--left L]

Attention and convolutions are masked to chunks, so that the result is what streaming would give, computed in one pass.
The checkpoint carries model, tokens and settings; results go to a directory beside it.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from lhotse import CutSet, load_manifest
from tqdm import tqdm

from ssm_asr.checkpoint import CheckpointError, Loaded, load_model
from ssm_asr.data.batches import eval_batches
from ssm_asr.results import rate_text, write_results
from ssm_asr.search import make_search
from ssm_asr.search.recognizer import encode_as_streamed
from ssm_asr.search.scorer import TransducerScorer


@torch.inference_mode()
def decode_cuts(
    loaded: Loaded,
    cuts: CutSet,
    chunk: int,
    left_context: int,
    method: str,
    beam: int,
    max_duration_s: float,
) -> tuple[dict[str, str], dict[str, str], float]:
    """Decodes every cut.

    Args:
        chunk, left_context: in frames of 20 ms; chunk -1 for whole utterances.

    Returns:
        References and hypotheses by cut id, and the seconds of computation.
    """
    device = next(loaded.model.parameters()).device
    scorer = TransducerScorer(loaded.model, loaded.tokenizer.unk_id)
    search = make_search(method, scorer, beam)
    refs: dict[str, str] = {}
    hyps: dict[str, str] = {}
    begin = time.perf_counter()
    with tqdm(total=len(cuts), desc="decode", unit="utt") as bar:
        for batch in eval_batches(cuts, loaded.tokenizer, max_duration_s=max_duration_s):
            batch = batch.to(device)
            encoder_out, lens = encode_as_streamed(
                loaded.model, batch.features_BTF, batch.feature_lens_B, chunk, left_context
            )
            states = search.step(scorer.project(encoder_out), lens, [search.start() for _ in lens])
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
    parser.add_argument("--out", type=Path, help="directory for the results (default: beside the checkpoint)")


def scoring_unit(loaded: Loaded, asked: str | None) -> str:
    """Words, or characters for character tokens, unless the user says."""
    return asked or ("char" if loaded.tokenizer.kind == "char" else "word")


def cuts_name(path: Path) -> str:
    """A short name of a manifest: cuts_test-clean.jsonl.gz -> test-clean."""
    return path.name.split(".")[0].removeprefix("cuts_")


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    decoding_arguments(parser)
    parser.add_argument("--cuts", required=True, nargs="+", type=Path, help="lhotse cuts with transcripts")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--max-duration-s", type=float, default=200.0, help="seconds of audio a batch")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        loaded = load_model(options.checkpoint, device)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    settings = loaded.experiment.decode
    chunk = settings.chunk_frames if options.chunk is None else options.chunk
    left = settings.left_context_frames if options.left is None else options.left
    method, beam = options.method or settings.method, options.beam or settings.beam
    if not loaded.experiment.model.encoder.causal:
        chunk = left = -1
    for path in options.cuts:
        cuts = load_manifest(path).to_eager()
        refs, hyps, seconds = decode_cuts(loaded, cuts, chunk, left, method, beam, options.max_duration_s)
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
            "device": device,
            "checkpoint": str(options.checkpoint),
        }
        name = f"decode-{cuts_name(path)}-chunk{chunk}-left{left}-{method}"
        out = options.out or options.checkpoint.parent / name
        summary = write_results(out, refs, hyps, scoring_unit(loaded, options.unit), facts)
        print(f"{cuts_name(path)}: {rate_text(summary)}; details in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

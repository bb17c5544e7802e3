"""Decode whole utterances: python -m ssm_asr.decode --checkpoint FILE --cuts FILE … [--chunk C] [--left L]

Attention and convolutions are masked to chunks, so that the result is what streaming would give, computed in one pass.
The checkpoint carries model, tokens and settings; results go to a directory beside it.
"""

import argparse
import re
import sys
import time
from collections import Counter
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
from ssm_asr.program import run
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
    return re.sub(r"(\.jsonl(\.gz)?|\.shar)$", "", path.name).removeprefix("cuts_")


def read_test_cuts(path: Path, *, from_audio: bool = False, limit: int = 0) -> CutSet:
    """The cuts of a manifest, or the first so many of them, to be recognised and scored.

    Args:
        from_audio: whether their audio is to be recognised, not stored features.
        limit: 0 takes all.

    Raises:
        ValueError: if they cannot be read, have no transcripts or no audio, are not of audio at 16 kHz, or two have one
            id.
    """
    if limit < 0:
        raise ValueError(f"--limit {limit}: give a number of utterances, 0 for all")
    cuts = read_cuts(path).to_eager()
    if limit:
        cuts = cuts.subset(first=min(limit, len(cuts)))
    rates_hz = {cut.sampling_rate for cut in cuts}
    if rates_hz != {units.SAMPLE_RATE_HZ}:
        raise ValueError(f"{path}: audio at {sorted(rates_hz)} Hz, not {units.SAMPLE_RATE_HZ}; resample the cuts")
    repeated, count = Counter(cut.id for cut in cuts).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{path}: {count} cuts have the id {repeated!r}; results go by id, so give each its own")
    silent = next((cut.id for cut in cuts if not cut.has_recording), None)
    if from_audio and silent is not None:
        raise ValueError(
            f"{path}: cut {silent!r} comes without audio; give the manifest with recordings, or use decode"
        )
    if not any(text_of(cut) for cut in cuts):
        raise ValueError(f"{path}: no cut has a transcript, so nothing can be scored; stream --wav needs none")
    return cuts


def read_test_sets(paths: list[Path], *, from_audio: bool = False, limit: int = 0) -> dict[str, CutSet]:
    """The cuts of several manifests by their short names.

    Raises:
        ValueError: as `read_test_cuts`, or if two have one name.
    """
    sets: dict[str, CutSet] = {}
    for path in paths:
        name = cuts_name(path)
        if name in sets:
            raise ValueError(f"{path}: another manifest is called {name!r} as well, and so are its results; rename one")
        sets[name] = read_test_cuts(path, from_audio=from_audio, limit=limit)
    return sets


def marked_texts(cuts: CutSet) -> dict[str, str]:
    """Transcripts with their disfluencies in parentheses, by cut id, of the cuts that carry one: custom["marked"]."""
    segments = {cut.id: cut.supervisions[0].custom or {} for cut in cuts if len(cut.supervisions) == 1}
    return {i: custom["marked"] for i, custom in segments.items() if "marked" in custom}


def result_dir(options: argparse.Namespace, what: str, chunk: int, left: int, method: str, beam: int) -> Path:
    """Makes the directory for the results of one manifest: --out, divided if there are several manifests."""
    out: Path = options.out or options.checkpoint.parent
    if options.out is None or len(options.cuts) > 1:
        out /= f"{what}-chunk{chunk}-left{left}-{method}{beam if method == 'beam' else ''}"
    out.mkdir(parents=True, exist_ok=True)
    return out


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


if __name__ == "__main__":
    sys.exit(run(main))

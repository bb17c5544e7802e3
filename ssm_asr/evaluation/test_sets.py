"""Test sets: the cuts that are recognised and scored, and the unit of their error rate."""

import os
import re
from collections import Counter
from pathlib import Path

import torch
from lhotse import CutSet

from ssm_asr import units
from ssm_asr.checkpoint import Loaded
from ssm_asr.data.filtering import text_of
from ssm_asr.data.parallel import LOADING, start_server
from ssm_asr.data.store import read_cuts

MOST_WORKERS = 8  # processes that read audio for one GPU; more are no faster


def workers_for(device: torch.device) -> int:
    """Returns how many processes should read audio: on a CPU none, since recognition itself takes its cores."""
    return min(MOST_WORKERS, max(1, (os.cpu_count() or 1) - 1)) if device.type == "cuda" else 0


def start_reading(device: torch.device) -> None:
    """Starts what the processes of `workers_for` are forked from, if there are any, while the caller goes on."""
    if workers_for(device):
        start_server(LOADING)


def scoring_unit(loaded: Loaded, asked: str | None) -> str:
    """Returns the unit of the error rate: the one asked for, else char for character tokens and word for others."""
    return asked or ("char" if loaded.tokenizer.kind == "char" else "word")


def cuts_name(path: Path) -> str:
    """Returns the short name of a manifest: test-clean for cuts_test-clean.jsonl.gz."""
    return re.sub(r"(\.jsonl(\.gz)?|\.shar)$", "", path.name).removeprefix("cuts_")


def read_test_cuts(path: Path, *, from_audio: bool = False, limit: int = 0) -> CutSet:
    """Reads the cuts of a manifest that are to be recognised and scored.

    Args:
        from_audio: whether the audio of the cuts is to be recognised, not their stored features.
        limit: the number of cuts to take; 0 takes all.

    Raises:
        ValueError: if the cuts cannot be read, have no transcripts or no audio, are not at 16 kHz, or share an id.
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
    """Reads the cuts of several manifests, by their short names; `read_test_cuts` explains the options.

    Raises:
        ValueError: as `read_test_cuts` does, and if two manifests have one name.
    """
    sets: dict[str, CutSet] = {}
    for path in paths:
        name = cuts_name(path)
        if name in sets:
            raise ValueError(f"{path}: another manifest is called {name!r} as well, and so are its results; rename one")
        sets[name] = read_test_cuts(path, from_audio=from_audio, limit=limit)
    return sets


def marked_texts(cuts: CutSet) -> dict[str, str]:
    """Returns transcripts with disfluencies in parentheses, by cut id, of the cuts whose custom["marked"] has one."""
    segments = {cut.id: cut.supervisions[0].custom or {} for cut in cuts if len(cut.supervisions) == 1}
    return {i: custom["marked"] for i, custom in segments.items() if "marked" in custom}

"""Compute and store the features of a cut manifest: in parallel, resumable, complete or absent.

Features are numpy files, or shards of them, which need no package beyond lhotse's own: float32, 115 MB per hour of
speech.
"""

import gzip
import hashlib
import json
import os
import random
import shutil
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.features import FeatureExtractor
from lhotse.features.io import FeaturesWriter, NumpyFilesWriter
from lhotse.utils import fastcopy

from ssm_asr.data.features import make_fbank, reason_of
from ssm_asr.data.parallel import parallel_map
from ssm_asr.data.shar import MemoryWriter, read_shards, write_shard

SPEED_FACTORS = (0.9, 1.0, 1.1)
CUTS_PER_PART = 100
SHUFFLE_SEED = 1


class _Part(NamedTuple):
    """One unit of work."""

    cuts: list[Cut]
    done: Path  # manifest of the part; exists only when the part is complete
    features: Path | None  # directory; None leaves the features to be computed on the fly
    shard: bool  # the part is a shard, which holds its features
    device: str


def read_cuts(manifest: Path) -> CutSet:
    """The cuts of a manifest (.jsonl.gz), or of a directory of shards, read lazily, in the order of the files.

    Raises:
        ValueError: if it is no cut manifest, is damaged or has no cuts, or as `read_shards`.
    """
    if manifest.is_dir():
        return read_shards(manifest)
    cuts: list[Cut] = []
    try:
        cuts.extend(iter(CutSet.from_jsonl_lazy(manifest)))  # the set itself would be asked for its length first
    except Exception as error:  # whatever lhotse, json and gzip make of a foreign file
        if cuts:
            raise ValueError(f"{manifest}: damaged ({error}); make it anew") from error
        raise ValueError(f"{manifest}: no cut manifest ({type(error).__name__}: {error})") from error
    if not cuts:
        raise ValueError(f"{manifest}: no cuts in this manifest")
    return CutSet.from_cuts(cuts)


def prepare_cuts(
    source: Path,
    out: Path,
    *,
    speed_perturb: bool,
    shuffle: bool,
    on_the_fly: bool,
    num_jobs: int,
    device: str = "cpu",
    shar: bool = False,
) -> Path:
    """Write OUT/NAME.jsonl.gz for a manifest .../NAME.jsonl.gz, with features in OUT/NAME.features/, or OUT/NAME.shar/.

    What a stopped run had finished is kept. All is made anew when the manifest or the settings changed, and
    nothing is done when they did not.

    Args:
        source: cut manifest.
        out: another directory than the manifest's.
        speed_perturb: add copies of every cut at 0.9 and 1.1 times the speed (Ko et al., Interspeech 2015).
        shuffle: mix the order of the cuts. Training on a large corpus needs it, since its sampler sees only a
            window of the manifest at a time.
        on_the_fly: store no features; they are computed from the audio when a batch is loaded.
        num_jobs: processes.
        device: where features are computed.
        shar: write a directory of shards, which holds cuts and features, instead of a manifest.

    Returns:
        The path of the manifest or directory written.

    Raises:
        ValueError: if the manifest is unusable or would be overwritten, or the audio of a cut cannot be read.
    """
    name = source.name.removesuffix(".gz").removesuffix(".jsonl")
    out = out.resolve()  # the manifest names the features by absolute path
    manifest, features, work = out / f"{name}.jsonl.gz", out / f"{name}.features", out / f"{name}.parts"
    target = out / f"{name}.shar" if shar else manifest
    if target.resolve() == source.resolve():
        raise ValueError(f"{source}: would be overwritten; choose another --out")
    settings = {"speed_perturb": speed_perturb, "shuffle": shuffle, "on_the_fly": on_the_fly}
    if shar:
        settings["shar"] = True
    inputs = json.dumps({"sha256": hashlib.sha256(source.read_bytes()).hexdigest(), **settings})
    inputs_file = out / f"{name}.inputs.json"
    if not inputs_file.is_file() or inputs_file.read_text() != inputs:
        for path in (manifest, out / f"{name}.shar", features, work):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        inputs_file.write_text(inputs)
    if target.exists():
        return target
    work.mkdir(exist_ok=True)
    factors = SPEED_FACTORS if speed_perturb else (1.0,)
    cuts = [cut if f == 1.0 else cut.perturb_speed(f) for cut in read_cuts(source) for f in factors]
    if shar and shuffle:  # what lies in one shard is decided before it is written
        random.Random(SHUFFLE_SEED).shuffle(cuts)
    size = CUTS_PER_PART * len(factors)
    parts = [
        _Part(
            cuts[start : start + size],
            work / (f"cuts.{start // size:06d}.jsonl.gz" if shar else f"{start // len(factors):09d}.jsonl.gz"),
            None if on_the_fly or shar else features / f"{start // len(factors):09d}",
            shar,
            device,
        )
        for start in range(0, len(cuts), size)
    ]
    for _ in parallel_map(_do_part, parts, num_jobs, f"features of {name}", "part"):
        pass
    if shar:
        os.replace(work, target)
        return target
    _merge([part.done for part in parts], target, shuffle)
    shutil.rmtree(work)
    return target


def _do_part(part: _Part) -> None:
    """Make the manifest and the features of one part, unless an earlier run did."""
    if part.done.is_file():
        return
    if part.shard or part.features is not None:
        torch.set_num_threads(1)  # the parts are the parallelism
    if part.shard:
        write_shard((_with_features(cut, MemoryWriter(), part.device) for cut in part.cuts), part.done)
        return
    cuts = part.cuts
    if part.features is not None:
        shutil.rmtree(part.features, ignore_errors=True)
        with NumpyFilesWriter(part.features) as storage:
            cuts = [_with_features(cut, storage, part.device) for cut in cuts]
    unfinished = part.done.with_name(f"unfinished-{part.done.name}")
    CutSet.from_cuts(cuts).to_file(unfinished)
    os.replace(unfinished, part.done)


def _with_features(cut: Cut, storage: FeaturesWriter, device: str) -> Cut:
    """The cut with its features stored and named in it."""
    try:
        samples_1S = cut.load_audio()
    except Exception as error:  # lhotse raises many kinds, depending on its backend
        remedy = "leave it out with python -m ssm_asr.prepare check"
        raise ValueError(f"{cut.id}: audio cannot be read ({reason_of(error)}); {remedy}") from error
    stored = _fbank(device).extract_from_samples_and_store(
        samples_1S, storage, cut.sampling_rate, offset=cut.start, channel=cut.channel
    )
    return fastcopy(cut, features=stored)


@lru_cache(maxsize=1)
def _fbank(device: str) -> FeatureExtractor:
    return make_fbank(device)


def _merge(parts: list[Path], target: Path, shuffle: bool) -> None:
    """Join manifests line by line into one that appears only when complete."""
    lines: list[str] = []
    for part in parts:
        with gzip.open(part, "rt", encoding="utf-8") as file:
            lines += file
    if shuffle:
        random.Random(SHUFFLE_SEED).shuffle(lines)
    unfinished = target.with_name(f"unfinished-{target.name}")
    with gzip.open(unfinished, "wt", encoding="utf-8") as file:
        file.writelines(lines)
    os.replace(unfinished, target)

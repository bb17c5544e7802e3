"""Computes and stores the features of a cut manifest in parallel; a stopped run resumes, and no output is partial.

Features are stored as numpy files, or as shards of them, in float32: they take 115 MB per hour of speech and need no
package beyond lhotse's own.
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

from ssm_asr.data.errors import first_line
from ssm_asr.data.features import make_fbank, require_backend
from ssm_asr.data.parallel import parallel_map
from ssm_asr.data.shar import MemoryWriter, read_shards, write_shard
from ssm_asr.data.trust import require_trusted

SPEED_FACTORS = (0.9, 1.0, 1.1)
CUTS_PER_PART = 100
SHUFFLE_SEED = 1


class _Part(NamedTuple):
    """A part is one unit of work.

    Attributes:
        cuts: the cuts of the part.
        done: the manifest of the part, which exists only when the part is complete.
        features: the directory for its features; None leaves them to be computed on the fly.
        shard: whether the part is a shard, which holds its features itself.
        device, backend: arguments of `make_fbank`.
    """

    cuts: list[Cut]
    done: Path
    features: Path | None
    shard: bool
    device: str
    backend: str


def read_cuts(manifest: Path) -> CutSet:
    """Returns the cuts of a manifest (.jsonl.gz) or of a directory of shards, in the order of the files.

    Raises:
        ValueError: if the file is no cut manifest, is damaged or has no cuts, or as `read_shards` and
            `require_trusted` do.
    """
    if manifest.is_dir():
        return read_shards(manifest)
    cuts: list[Cut] = []
    try:
        cuts.extend(iter(CutSet.from_jsonl_lazy(manifest)))  # iter: extend would ask the set for its length first
    except Exception as error:  # lhotse, json and gzip raise many kinds for a foreign file
        if cuts:
            raise ValueError(f"{manifest}: damaged ({error}); make it anew") from error
        raise ValueError(f"{manifest}: no cut manifest ({type(error).__name__}: {error})") from error
    if not cuts:
        raise ValueError(f"{manifest}: no cuts in this manifest")
    other = next((type(item).__name__ for item in cuts if not isinstance(item, Cut)), None)
    if other:
        raise ValueError(f"{manifest}: a manifest of {other}s, not of cuts, which ssm-asr prepare check makes of it")
    require_trusted(manifest, cuts)
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
    backend: str = "torch",
    shar: bool = False,
) -> Path:
    """Writes OUT/NAME.jsonl.gz for a manifest …/NAME.jsonl.gz, with features in OUT/NAME.features/, or OUT/NAME.shar/.

    A run keeps what a stopped run has finished. It makes everything anew if the manifest or the settings have changed,
    and does nothing if the output is complete.

    Args:
        source: cut manifest.
        out: another directory than the manifest's.
        speed_perturb: adds copies of every cut at 0.9 and 1.1 times the speed (Ko et al., Interspeech 2015).
        shuffle: mixes the order of the cuts. Training on a large corpus needs it, since its sampler sees only a
            window of the manifest at a time.
        on_the_fly: stores no features; they are computed from the audio when a batch is loaded.
        num_jobs: number of processes.
        device: where features are computed; see `make_fbank`.
        backend: what computes features; see `make_fbank`.
        shar: writes a directory of shards, which holds cuts and features, instead of a manifest.

    Returns:
        The path of the manifest or directory written.

    Raises:
        ValueError: if the manifest is unusable or would be overwritten, the audio of a cut cannot be read, or
            `require_backend` refuses the backend.
    """
    if not on_the_fly:
        require_backend(backend)
    name = source.name.removesuffix(".gz").removesuffix(".jsonl")
    out = out.resolve()  # the manifest names the features by absolute path
    manifest, features, work = out / f"{name}.jsonl.gz", out / f"{name}.features", out / f"{name}.parts"
    target = out / f"{name}.shar" if shar else manifest
    if target.resolve() == source.resolve():
        raise ValueError(f"{source}: would be overwritten; choose another --out")
    settings: dict[str, bool | str] = {"speed_perturb": speed_perturb, "shuffle": shuffle, "on_the_fly": on_the_fly}
    # A setting that is absent has its default, so outputs of earlier versions stay valid.
    settings |= {"shar": True} if shar else {}
    settings |= {"backend": backend} if backend != "torch" and not on_the_fly else {}
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
    if shar and shuffle:  # shards are shuffled before they are written, manifests when they are merged
        random.Random(SHUFFLE_SEED).shuffle(cuts)
    size = CUTS_PER_PART * len(factors)
    parts = [
        _Part(
            cuts[start : start + size],
            work / (f"cuts.{start // size:06d}.jsonl.gz" if shar else f"{start // len(factors):09d}.jsonl.gz"),
            None if on_the_fly or shar else features / f"{start // len(factors):09d}",
            shar,
            device,
            backend,
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
    """Makes the manifest and the features of one part, unless an earlier run did."""
    if part.done.is_file():
        return
    if part.shard or part.features is not None:
        torch.set_num_threads(1)  # the processes work in parallel already
    if part.shard:
        write_shard((_with_features(cut, MemoryWriter(), part) for cut in part.cuts), part.done)
        return
    cuts = part.cuts
    if part.features is not None:
        shutil.rmtree(part.features, ignore_errors=True)
        with NumpyFilesWriter(part.features) as storage:
            cuts = [_with_features(cut, storage, part) for cut in cuts]
    unfinished = part.done.with_name(f"unfinished-{part.done.name}")
    CutSet.from_cuts(cuts).to_file(unfinished)
    os.replace(unfinished, part.done)


def _with_features(cut: Cut, storage: FeaturesWriter, part: _Part) -> Cut:
    """Stores the features of a cut and returns the cut with a reference to them."""
    try:
        samples_1S = cut.load_audio()
    except Exception as error:  # lhotse raises many kinds, which depend on its backend
        remedy = "leave it out with ssm-asr prepare check"
        raise ValueError(f"{cut.id}: audio cannot be read ({first_line(error)}); {remedy}") from error
    stored = _fbank(part.device, part.backend).extract_from_samples_and_store(
        samples_1S, storage, cut.sampling_rate, offset=cut.start, channel=cut.channel
    )
    return fastcopy(cut, features=stored)


@lru_cache(maxsize=1)
def _fbank(device: str, backend: str) -> FeatureExtractor:
    return make_fbank(device, backend)


def _merge(parts: list[Path], target: Path, shuffle: bool) -> None:
    """Joins manifests line by line into one, which appears only when it is complete."""
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

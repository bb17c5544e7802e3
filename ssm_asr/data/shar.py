"""Shards in lhotse's Shar format: a few large files instead of one a cut, for disks that a whole cluster shares.

Shard N of a directory is cuts.N.jsonl.gz and features.N.tar. lhotse's own reader takes shards in sequence, so that a
run cannot go back to where it was; here the headers of the tar files are listed once, and cuts are then read where they
lie, in any order. A directory of shards thus trains as a manifest does: the same batches, resumed as exactly. It can be
moved, since it names no other file.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.features.io import FeaturesReader, FeaturesWriter, register_reader
from lhotse.shar import SharWriter
from lhotse.utils import fastcopy


class MemoryWriter(FeaturesWriter):
    """Keeps features in their manifest, until a shard is written of them."""

    name = "memory_npy"  # of lhotse's reader

    @property
    def storage_path(self) -> Any:
        """None: there is no file."""

    def write(self, key: str, value: np.ndarray) -> Any:
        """The features as the bytes of a numpy file."""
        stream = BytesIO()
        np.save(stream, value, allow_pickle=False)
        return stream.getvalue()


@register_reader
class TarOffsetReader(FeaturesReader):
    """Reads a numpy file at its offset in an uncompressed tar file."""

    name = "numpy_in_tar"

    def __init__(self, storage_path: str, *args: Any, **options: Any) -> None:
        self._tar = storage_path

    def read(self, key: Any, left_offset_frames: int = 0, right_offset_frames: int | None = None) -> np.ndarray:
        """features_TF, from and to the given frames; the key is the offset in bytes."""
        with open(self._tar, "rb") as file:
            file.seek(int(key))
            return np.load(file, allow_pickle=False)[left_offset_frames:right_offset_frames]


def write_shard(cuts: Iterable[Cut], cuts_file: Path) -> None:
    """Write cuts.N.jsonl.gz, which appears only when the shard is complete, and features.N.tar beside it.

    The cuts lose their recordings.
    """
    number = cuts_file.name.split(".")[1]
    unfinished = cuts_file.with_name(f"unfinished-{number}")
    unfinished.mkdir(exist_ok=True)
    with SharWriter(unfinished, {"features": "numpy"}, shard_size=None, shard_suffix=f".{number}") as writer:
        for cut in cuts:
            writer.write(fastcopy(cut, recording=None))
    tar = _tar_of(cuts_file)
    os.replace(unfinished / tar.name, tar)
    os.replace(unfinished / cuts_file.name, cuts_file)
    unfinished.rmdir()


def read_shards(directory: Path) -> CutSet:
    """All cuts of a directory of shards, in its order; the features stay where they are.

    Raises:
        ValueError: if there are no shards with features as numpy files.
    """
    files = sorted(directory.glob("cuts.*.jsonl.gz"))
    if not files:
        raise ValueError(f"{directory}: no shards here, expected cuts.000000.jsonl.gz and features.000000.tar")
    return CutSet.from_cuts(cut for file in files for cut in _read_shard(file))


def _read_shard(cuts_file: Path) -> Iterator[Cut]:
    tar = _tar_of(cuts_file)
    try:
        with tarfile.open(tar, "r:") as members:
            offsets = {member.name: member.offset_data for member in members}
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{tar}: features of this shard cannot be read ({error}); make them anew") from error
    for cut in CutSet.from_jsonl_lazy(cuts_file):
        offset = offsets.get(f"{cut.id}.npy")
        if offset is None:
            raise ValueError(f"{tar}: no {cut.id}.npy; write shards with fields={{'features': 'numpy'}}")
        stored = fastcopy(
            cut.features, storage_type=TarOffsetReader.name, storage_path=str(tar), storage_key=str(offset)
        )
        yield fastcopy(cut, features=stored)


def _tar_of(cuts_file: Path) -> Path:
    return cuts_file.with_name(f"features.{cuts_file.name.split('.')[1]}.tar")

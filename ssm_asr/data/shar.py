"""Reads and writes shards in lhotse's Shar format: a few large files for many cuts suit the disks of a cluster.

Shard N of a directory is cuts.N.jsonl.gz and features.N.tar. lhotse's own reader takes shards in sequence, so a run
could not go back to where it was. Here the headers of the tar files are listed once, and then the features of a cut are
read at their offset, in any order. So a directory of shards gives the batches that a manifest gives, and training
resumes as exactly. The directory can be moved, since it names no other file.
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

from ssm_asr.data.trust import require_trusted


class MemoryWriter(FeaturesWriter):
    """Keeps features in their manifest until they are written to a shard."""

    name = "memory_npy"  # lhotse's reader of this format has this name

    @property
    def storage_path(self) -> Any:
        """Is None, since there is no file."""

    def write(self, key: str, value: np.ndarray) -> Any:
        """Returns the features as the bytes of a numpy file."""
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
        """Returns features_TF between the given frames; the key is the offset in bytes."""
        with open(self._tar, "rb") as file:
            file.seek(int(key))
            return np.load(file, allow_pickle=False)[left_offset_frames:right_offset_frames]


def write_shard(cuts: Iterable[Cut], cuts_file: Path) -> None:
    """Writes features.N.tar and then cuts.N.jsonl.gz, which appears only when the shard is complete.

    The cuts in it have no recordings.
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
    """Returns all cuts of a directory of shards in the order of its files; their features are not read.

    Raises:
        ValueError: if there are no shards with features as numpy files, or as `require_trusted` does.
    """
    files = sorted(directory.glob("cuts.*.jsonl.gz"))
    if not files:
        raise ValueError(
            f"{directory}: no shards here, expected cuts.000000.jsonl.gz and features.000000.tar; "
            "give a file cuts_NAME.jsonl.gz, or a directory NAME.shar"
        )
    cuts = CutSet.from_cuts(cut for file in files for cut in _read_shard(file))
    require_trusted(directory, cuts)
    return cuts


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

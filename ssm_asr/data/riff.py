"""Wav files whose header does not tell how long they are, or tells of more than there is."""

import struct
from io import BytesIO
from pathlib import Path

from ssm_asr.data.errors import AudioError

# A writer to a pipe cannot go back to write the sizes. It leaves 0 or nearly the largest signed or unsigned number.
LARGEST_SIZE = 0x7FFF0000
CHUNKS_AFTER_SAMPLES = (b"LIST", b"id3 ", b"ID3 ", b"fact", b"cue ", b"bext")


def with_its_size(path: Path) -> BytesIO | None:
    """Returns a wav file with the sizes that its header should have, if they were never filled in; else None.

    Raises:
        AudioError: if the header announces more samples than the file holds.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return None
        place, size = 12, path.stat().st_size
        while True:
            file.seek(place)
            chunk = file.read(8)
            if len(chunk) < 8:
                return None  # libsndfile says what is wrong with it
            (announced,) = struct.unpack("<I", chunk[4:])
            if chunk[:4] == b"data":
                break
            place += 8 + announced + announced % 2
        held = size - place - 8
        if 0 < announced < LARGEST_SIZE or (announced == 0 and file.read(4) in CHUNKS_AFTER_SAMPLES):
            if announced > held:
                raise AudioError(path, "truncated audio", "the header announces more than the file holds")
            return None
        file.seek(0)
        whole = bytearray(file.read())
    struct.pack_into("<I", whole, 4, min(size - 8, 0xFFFFFFFF))
    struct.pack_into("<I", whole, place + 4, min(held, 0xFFFFFFFF))
    return BytesIO(whole)

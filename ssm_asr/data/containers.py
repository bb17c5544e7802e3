"""Audio files that are shorter than their headers say, which libsndfile reads as if they were whole.

Wav files that were written to a pipe say nothing of their length; these are read whole.
"""

import struct
from io import BytesIO
from pathlib import Path

from ssm_asr.data.errors import AudioError

# A writer to a pipe cannot go back to write the sizes. It leaves 0 or nearly the largest signed or unsigned number.
LARGEST_SIZE = 0x7FFF0000
LARGEST_RATE_HZ = 768_000  # no recorder has a higher one
CHUNKS_AFTER_SAMPLES = (b"LIST", b"id3 ", b"ID3 ", b"fact", b"cue ", b"bext")

LARGEST_OGG_PAGE = 27 + 255 + 255 * 255  # bytes: the head, the table of segments, the segments


def require_whole(path: Path) -> None:
    """Checks the length of files of the kinds AIFF, AU, Wave64 and Ogg, of which each says it in its own way.

    Raises:
        AudioError: if a file has been cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(24)
        if head[:4] == b"OggS":
            file.seek(max(0, size - LARGEST_OGG_PAGE))
            if not _ends_ogg(file.read()):
                raise AudioError(path, "truncated audio", "its last page is missing")
            return
    announced = 0
    if head[:4] == b"FORM" and len(head) >= 8:
        announced = 8 + int(struct.unpack(">I", head[4:8])[0])
    elif head[:4] == b".snd" and len(head) >= 12:
        offset, samples = struct.unpack(">II", head[4:12])
        announced = 0 if samples == 0xFFFFFFFF else offset + samples  # which stands for an unknown length
    elif head[:4] == b"riff" and len(head) == 24:
        (announced,) = struct.unpack("<Q", head[16:])
    if announced > size:
        raise AudioError(path, "truncated audio", "the header announces more than the file holds")


def _ends_ogg(end: bytes) -> bool:
    """Tells whether the end of an Ogg file has a whole page that says that it is the last one."""
    place = end.rfind(b"OggS")
    if place < 0 or len(end) < place + 27:
        return False
    is_last, segments = end[place + 5] & 4, end[place + 26]
    table = end[place + 27 : place + 27 + segments]
    return bool(is_last) and len(table) == segments and len(end) >= place + 27 + segments + sum(table)


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

"""A tiny corpus in the layout of CSJ, written word by word; its audio is noise."""

import importlib
import sys
from pathlib import Path

import numpy as np
import soundfile
from script import Done, call

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "egs" / "csj" / "local"))


def line(talk: str, segment: int, start_s: float, end_s: float, text: str, said: str = "", channel: str = "L") -> str:
    """A line of an SDB."""
    place = f"{segment:04d} {start_s:09.3f}-{end_s:09.3f} {channel}:-001-001"
    return "\t".join(["CSJ", "1", talk, place, "", text, "", "", "", text, said or text, "名詞", "", "", "", "", ""])


def plain(talk: str, channel: str = "L") -> list[str]:
    """Two utterances with a pause of 2 s between them."""
    return [
        line(talk, 1, 0.5, 2.0, "(F えー)", channel=channel),
        line(talk, 1, 0.5, 2.0, "(A 二十;２０)", "ニジュー", channel=channel),
        line(talk, 2, 4.0, 5.0, "京都", channel=channel),
    ]


class Corpus:
    """MORPH/ and WAV/ in a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def sdb(self, talk: str) -> Path:
        return self.root / "MORPH" / "SDB" / "core" / f"{talk}.sdb"

    def wav(self, name: str) -> Path:
        return self.root / "WAV" / "core" / f"{name}.wav"

    def add(self, talk: str, lines: list[str], duration_s: float = 10.0) -> None:
        """A talk; of a dialogue, with two wavs."""
        for path in (self.sdb(talk), self.wav(talk)):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.sdb(talk).write_bytes("".join(f"{text}\n" for text in lines).encode("shift_jis"))
        for name in [f"{talk}-L", f"{talk}-R"] if talk[0] == "D" else [talk]:
            noise = 0.1 * np.random.default_rng(1).standard_normal(int(16000 * duration_s))
            soundfile.write(self.wav(name), noise, 16000, subtype="PCM_16")


def run(script: str, *arguments: object) -> Done:
    """Runs a script of the recipe in this process."""
    return call(importlib.import_module(script.removesuffix(".py")).main, *arguments)

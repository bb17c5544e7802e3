"""Make a small corpus of synthetic speech in the directory layout of LibriSpeech.

    OUT/LibriSpeech/{train-clean-5,dev-clean-2,test-clean}/SPK/CHAP/SPK-CHAP-UTT.flac and SPK-CHAP.trans.txt

One text-to-speech voice, which is inside the wheel of hibari-tts, becomes many pseudo-speakers: its pitch is scaled,
its spectrum is warped down and its tempo is changed. The speakers and the texts of dev and test do not occur in train.
Equal options make equal corpora. The corpus is a smoke test and a teaching aid, no benchmark.

Shapes: M spectrum bins (20 Hz apart, up to 12 kHz), F synthesis frames, S samples.
"""

import argparse
import json
import multiprocessing
import random
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import texts
from hibari import Hibari, dsp
from scipy.signal import resample_poly
from tqdm import tqdm

from ssm_asr.cli.program import run
from ssm_asr.data.made import is_made, making
from ssm_asr.units import SAMPLE_RATE_HZ

DIRECTORIES = {"train": "train-clean-5", "dev": "dev-clean-2", "test": "test-clean"}
SPEAKERS = {"train": 20, "dev": 3, "test": 5}
DEFAULT_MINUTES = {"digits": 37.0, "sentences": 600.0}
DEV_SHARE, TEST_SHARE = 1.5 / 37, 4.0 / 37  # dev and test have these shares of the training minutes
CHAPTER_S = 60.0  # a chapter, which one process makes at a time, has about this much speech

README = """\
The speech in this directory is synthetic: it was made by make_corpus.py with the hibari-tts voice "heart"
(Apache-2.0), whose pitch, spectrum and tempo were changed to make pseudo-speakers. No person spoke it.
The layout is LibriSpeech's. Error rates on it say whether the software works, not how good a model is.
Made with: {settings}
"""


class Speaker(NamedTuple):
    """A pseudo-speaker.

    Attributes:
        pitch: factor on the fundamental frequency.
        warp: factor on every frequency of the spectral envelope; above 1, speech cannot be understood.
        tempo, gain: factors on the voice's own.
    """

    id: int
    pitch: float
    warp: float
    tempo: float
    gain: float


class Chapter(NamedTuple):
    """A chapter is one unit of work: a speaker reads texts of one part until there is enough speech."""

    part: str
    speaker: Speaker
    number: int
    seconds: float
    size: str
    seed: int
    out: Path


def make_speakers(part: str, seed: int) -> list[Speaker]:
    """Returns the pseudo-speakers of a part, spread evenly (golden-ratio sequence) over pitch and warp."""
    first_id = {"train": 1001, "dev": 2001, "test": 3001}[part]
    rng = random.Random(f"{seed} {part} speakers")
    start, speakers = rng.random(), []
    for k in range(SPEAKERS[part]):
        pitch = 0.55 + 0.45 * (k + rng.random()) / SPEAKERS[part]
        warp = 0.88 + 0.12 * ((start + k * 0.618034) % 1.0)
        tempo, gain_db = rng.uniform(0.8, 1.1), rng.uniform(-6.0, 6.0)
        speakers.append(Speaker(first_id + k, pitch, warp, tempo, 10 ** (gain_db / 20)))
    return speakers


def plan_chapters(args: argparse.Namespace, out: Path) -> list[Chapter]:
    """Returns all chapters of the corpus; the speakers of a part read equally many minutes of it."""
    minutes = {"train": args.minutes, "dev": args.minutes * DEV_SHARE, "test": args.minutes * TEST_SHARE}
    chapters = []
    for part, directory in DIRECTORIES.items():
        for speaker in make_speakers(part, args.seed):
            seconds = 60 * minutes[part] / SPEAKERS[part]
            count = max(1, round(seconds / CHAPTER_S))
            folder = out / directory / str(speaker.id)
            chapters += [
                Chapter(part, speaker, number, seconds / count, args.size, args.seed, folder / str(number))
                for number in range(1, count + 1)
            ]
    return chapters


_tts: Hibari | None = None  # a process loads it once, since that takes half a second


def synthesize(text: str, speaker: Speaker, noise_seed: int) -> np.ndarray:
    """Synthesizes speech of a pseudo-speaker at 16 kHz.

    Between hibari's network and its vocoder, pitch is scaled and the spectral envelope is warped, which takes hardly
    any time: bin m of the new envelope is bin m / warp of the old one.

    Returns:
        samples_S in float32, with 0.1 - 0.3 s of silence before and after the speech.
    """
    global _tts
    _tts = _tts or Hibari()
    ids = np.asarray([_tts.ids(" ".join(_tts.phonemize(text + ".")))], np.int64)
    outputs = _tts.sess.run(None, {"ids": ids, "speed": np.asarray([speaker.tempo], np.float32)})
    *envelopes_MF, f0_F = (output[0] for output in outputs)
    bins_M = np.arange(envelopes_MF[0].shape[0])
    source_M = np.minimum(np.rint(bins_M / speaker.warp).astype(int), bins_M[-1])
    rng = np.random.default_rng(noise_seed)
    wave_24k_S = dsp.synth(*(e_MF[source_M] for e_MF in envelopes_MF), f0_F * speaker.pitch, rng)
    samples_S = resample_poly(wave_24k_S, 2, 3).astype(np.float32)
    (loud,) = np.nonzero(np.abs(samples_S) > 0.02)
    margin_s = rng.uniform(0.1, 0.3, size=2)
    first = max(0, loud[0] - int(margin_s[0] * SAMPLE_RATE_HZ))
    samples_S = speaker.gain * samples_S[first : loud[-1] + int(margin_s[1] * SAMPLE_RATE_HZ)]
    samples_S += 3e-4 * rng.standard_normal(len(samples_S), dtype=np.float32)  # a room always has some noise
    return samples_S * min(1.0, 0.95 / np.abs(samples_S).max())


def with_pauses(text: str, rng: random.Random) -> str:
    """Returns the text with a comma after some of its words, so that digits are also read in groups."""
    return " ".join(word + ("," if rng.random() < 0.12 else "") for word in text.split())


def make_chapter(chapter: Chapter) -> float:
    """Writes the flac files and the transcript of one chapter, and returns the seconds of speech."""
    speaker = chapter.speaker
    chapter.out.mkdir(parents=True)
    rng = random.Random(f"{chapter.seed} {chapter.size} {speaker.id} {chapter.number}")
    lines: list[str] = []
    seconds = 0.0
    while seconds < chapter.seconds:
        text = texts.draw(chapter.size, chapter.part, rng)
        spoken = with_pauses(text, rng) if chapter.size == "digits" else text
        name = f"{speaker.id}-{chapter.number}-{len(lines):04d}"
        samples_S = synthesize(spoken, speaker, zlib.crc32(f"{chapter.seed} {name}".encode()))
        soundfile.write(chapter.out / f"{name}.flac", samples_S, SAMPLE_RATE_HZ, subtype="PCM_16")
        lines.append(f"{name} {text.upper()}\n")
        seconds += len(samples_S) / SAMPLE_RATE_HZ
    (chapter.out / f"{speaker.id}-{chapter.number}.trans.txt").write_text("".join(lines))
    return seconds


def run_chapters(chapters: list[Chapter], jobs: int) -> Iterator[float]:
    """Makes the chapters in `jobs` spawned processes, or in this one if jobs is 1."""
    if jobs == 1:
        yield from map(make_chapter, chapters)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(make_chapter, chapters)


def make_corpus(args: argparse.Namespace) -> None:
    """Makes the corpus in a temporary directory beside the final one, and renames it when it is complete.

    Raises:
        SystemExit: if OUT/LibriSpeech exists and was not made by this script.
    """
    out: Path = args.out
    final = out / "LibriSpeech"
    settings = {"size": args.size, "minutes": args.minutes, "seed": args.seed}
    try:
        if is_made(final, settings):
            print(f"{final} is there already, made with the same settings: nothing to do")
            return
    except ValueError as error:
        sys.exit(str(error))
    with making(final, settings) as root:
        chapters = plan_chapters(args, root)
        total_s = sum(chapter.seconds for chapter in chapters)
        bar = tqdm(total=round(total_s), unit="s", desc="speech made", mininterval=1.0)
        for seconds in run_chapters(chapters, args.jobs):
            bar.update(round(seconds))
        bar.close()
        (root / "README.txt").write_text(README.format(settings=json.dumps(settings)))
    print(f"made {final}: {args.minutes:g} minutes of training speech")


def parse_args() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory that gets LibriSpeech/")
    parser.add_argument(
        "--size",
        choices=sorted(DEFAULT_MINUTES),
        default="digits",
        help="digits: strings of 3-7 digits and a few command words, learnt in minutes on a CPU; "
        "sentences: everyday sentences of some hundreds of words, for a GPU (default: digits)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"minutes of training speech (default: {DEFAULT_MINUTES['digits']:g} for digits, "
        f"{DEFAULT_MINUTES['sentences']:g} for sentences); dev and test come on top, 4 and 11 %% of it",
    )
    parser.add_argument("--seed", type=int, default=1, help="another seed makes another corpus (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    if args.minutes is None:
        args.minutes = DEFAULT_MINUTES[args.size]
    if args.minutes <= 0 or args.jobs < 1:
        parser.error(f"--minutes {args.minutes:g} --jobs {args.jobs}: both must be positive")
    return args


if __name__ == "__main__":
    sys.exit(run(lambda: make_corpus(parse_args())))

"""Make a small corpus of synthetic speech in the directory layout of CSJ (the Corpus of Spontaneous Japanese).

    OUT/CSJ/MORPH/SDB/{core,noncore}/TALK.sdb and WAV/{core,noncore}/TALK.wav (TALK-L.wav and -R.wav of a dialogue)

It has all talks of the evaluation sets under their ids, and others to train on. One text-to-speech voice
(pyopenjtalk-plus, inside its wheel) becomes a speaker for each talk by its pitch, its tempo, and by reading its samples
at another rate. The sentences of test and development talks do not occur in training talks. The same options always
make the same corpus. It is a smoke test and a teaching aid, no benchmark.

Shapes: S samples.
"""

import argparse
import json
import random
import re
import sys
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import grammar
import numpy as np
import pyopenjtalk
import soundfile
import talks
from pyopenjtalk.types import NJDFeature
from scipy.signal import resample_poly

from ssm_asr.cli.program import run
from ssm_asr.data.made import is_made, making
from ssm_asr.data.parallel import parallel_map
from ssm_asr.units import SAMPLE_RATE_HZ

PROGRAM = ("grammar", "make_corpus", "talks")  # what decides on the corpus, beside the options
TRAIN_SPEAKERS = 24
UTTERANCES = {"dev": 2, "test": 4, "excluded": 1}  # a talk and channel; of training talks, --minutes says
VOICE_RATE_HZ = 48000
JOINED = 0.15  # of the pauses are short, so that the utterances beside them are joined
SHORT_PAUSE_S, LONG_PAUSE_S = (0.2, 0.6), (1.1, 1.8)
NOISE = 3e-4  # a room is never quite silent
DIGITS = re.compile(f"[{grammar.DIGITS}十]+")

README = """\
The speech in this directory is synthetic: it was made by make_corpus.py with the voice "mei" of pyopenjtalk-plus
(CC BY 3.0, MMDAgent project team, Nagoya Institute of Technology), whose pitch, tempo and sampling rate were changed to
make speakers. No person spoke it. The layout and the ids of the evaluation talks are those of CSJ, nothing else is.
Error rates on it say whether the software works, not how good a model is.
Made with: {settings}
"""


class Speaker(NamedTuple):
    """A speaker of one channel of a talk."""

    half_tones: float  # added to the pitch of the voice
    rate: float  # the samples are read at so many times their rate (two decimals), which moves pitch and formants
    tempo: float
    gain: float


class Channel(NamedTuple):
    """One unit of work: a speaker, and how much he says."""

    talk: str
    suffix: str  # of the wav's name
    kind: str  # train, dev or test: which sentences he says
    utterances: int  # at least
    seconds: float  # of speech, at least
    voice: tuple[float, float]  # pitch and rate of the speaker, from 0 to 1 of what there is
    seed: int
    root: Path


class Row(NamedTuple):
    """A word of the transcript."""

    surface: str  # with tags
    plain: str
    pronunciation: str  # with tags
    features: tuple[str, ...]  # part of speech, conjugation form, conjugation type, second part of speech


def volume(talk: str) -> str:
    """The directory of a talk: core or noncore."""
    return "core" if zlib.crc32(talk.encode()) % 4 == 0 else "noncore"


def plan(minutes: float, seed: int, root: Path) -> list[Channel]:
    """All channels of the corpus."""
    train = [f"{'AS'[k % 2]}{k % 10:02d}{'FM'[k // 2 % 2]}{2001 + k}" for k in range(TRAIN_SPEAKERS - 2)]
    train.append("D01F2101")  # the other two
    channels: list[Channel] = []
    for talk in [*train, *(talk for ids in talks.SETS.values() for talk in ids)]:
        kind = talks.set_of(talk).split("-")[0]
        seconds = 60 * minutes / TRAIN_SPEAKERS if kind == "train" else 0.0
        said = "train" if kind == "excluded" else kind
        for suffix in talks.channels_of(talk):
            # Evenly over both (the additive recurrence of the plastic number): with few speakers, chance leaves gaps.
            voice = (len(channels) * 0.754878 % 1, len(channels) * 0.569840 % 1)
            channels.append(Channel(talk, suffix, said, UTTERANCES.get(kind, 1), seconds, voice, seed, root))
    random.Random(0).shuffle(channels)  # so that what is done foretells what is left: training talks take longer
    return channels


def make_speaker(channel: Channel) -> Speaker:
    """The speaker of a channel: lower in pitch and formants if the id says that it is a man."""
    rng = random.Random(f"{channel.seed} {channel.talk} {channel.suffix} speaker")
    pitch, rate = channel.voice
    is_man = channel.talk[3] == "M"
    half_tones = 4 * pitch - (6 if is_man else 2)
    rate = 0.9 + 0.06 * rate if is_man else 0.96 + 0.09 * rate
    return Speaker(half_tones, rate, rng.uniform(0.8, 1.0), 10 ** (rng.uniform(-12, -6) / 20))


@lru_cache(maxsize=1000)
def analyse(text: str) -> list[NJDFeature]:
    """The morphemes of a phrase, by pyopenjtalk's dictionary."""
    return pyopenjtalk.run_frontend(text, use_vanilla=True)


def arabic(kanji: str) -> str:
    """A number below 100 in full-width digits."""
    tens, ten, ones = kanji.rpartition("十")
    value = grammar.DIGITS.index(ones) + 1 if ones else 0
    if ten:
        value += 10 * (grammar.DIGITS.index(tens) + 1 if tens else 1)
    return str(value).translate(str.maketrans("0123456789", "０１２３４５６７８９"))


def rows(phrase: grammar.Phrase, rng: random.Random) -> list[Row]:
    """The words of a phrase as CSJ tags them.

    (F filler), (D fragment), (D2 particle), (A 三十;３０) and (A ディーブイディー;ＤＶＤ) in the surface, and
    (W said;meant) in the pronunciation of some words, as if they were slurred.
    """
    words: list[Row] = []
    number = ""
    for morpheme in analyse(phrase.text):
        plain, said = number + morpheme["string"], morpheme["pron"].replace("’", "")
        if number:
            said = words.pop().pronunciation + said
        number = plain if DIGITS.fullmatch(plain) else ""  # becomes one word with what it counts
        surface = DIGITS.sub(lambda digits: f"(A {digits[0]};{arabic(digits[0])})", plain)
        if re.fullmatch("[Ａ-Ｚ]+", plain):
            surface = f"(A {said};{plain})"
        tagged = said
        if phrase.tag:
            surface, tagged = f"({phrase.tag} {plain})", f"({phrase.tag} {said})"
        elif len(said) > 2 and not number and rng.random() < 0.03:
            tagged = f"(W {said[:-1]};{said})"
        features = (morpheme["pos"], morpheme["cform"], morpheme["ctype"], morpheme["pos_group1"])
        words.append(Row(surface, plain, tagged, features))
    return words


def synthesize(phrases: list[grammar.Phrase], speaker: Speaker) -> np.ndarray:
    """Speech at 16 kHz, samples_S, of a sentence with a pause after every filler and fragment."""
    morphemes = [m for phrase in phrases for m in analyse(phrase.text + ("、" if phrase.tag else ""))]
    labels = pyopenjtalk.make_label(morphemes)
    wave_S, rate_hz = pyopenjtalk.synthesize(labels, speaker.tempo / speaker.rate, speaker.half_tones)
    assert rate_hz == VOICE_RATE_HZ
    samples_S = resample_poly(wave_S / 32768, 100 * SAMPLE_RATE_HZ, VOICE_RATE_HZ * round(100 * speaker.rate))
    (loud,) = np.nonzero(np.abs(samples_S) > 0.01)
    margin = SAMPLE_RATE_HZ // 10
    samples_S = speaker.gain * samples_S[max(0, loud[0] - margin) : loud[-1] + margin]
    return samples_S * min(1.0, 0.95 / np.abs(samples_S).max())


def make_channel(channel: Channel) -> tuple[Channel, list[str], float]:
    """Write the wav of one channel; returns its lines of the transcript and the seconds of speech."""
    speaker = make_speaker(channel)
    rng = random.Random(f"{channel.seed} {channel.talk} {channel.suffix}")
    pieces = [np.zeros(SAMPLE_RATE_HZ // 2)]
    position, seconds = len(pieces[0]), 0.0
    lines: list[str] = []
    utterances = 0
    while utterances < channel.utterances or seconds < channel.seconds:
        phrases = grammar.draw(channel.kind, rng)
        samples_S = synthesize(phrases, speaker)
        start_s, end_s = position / SAMPLE_RATE_HZ, (position + len(samples_S)) / SAMPLE_RATE_HZ
        words = [row for phrase in phrases for row in rows(phrase, rng)]
        if channel.kind == "train" and utterances == 2:  # a name that was made unrecognisable, as in the real corpus
            words = [Row("(R ××)", "××", "(R ××)", ("名詞", "", "", "固有名詞"))]
        utterances += 1
        time = f"{utterances:04d} {start_s:09.3f}-{end_s:09.3f} {channel.suffix.removeprefix('-') or 'L'}:"
        lines += [_line(channel.talk, time, number, row) for number, row in enumerate(words, start=1)]
        pause_s = rng.uniform(*(SHORT_PAUSE_S if rng.random() < JOINED else LONG_PAUSE_S))
        pieces += [samples_S, np.zeros(round(pause_s * SAMPLE_RATE_HZ))]
        position += len(pieces[-2]) + len(pieces[-1])
        seconds += end_s - start_s
    path = channel.root / "WAV" / volume(channel.talk) / f"{channel.talk}{channel.suffix}.wav"
    noise = np.random.default_rng(zlib.crc32(path.name.encode()) + channel.seed)
    soundfile.write(
        path, np.concatenate(pieces) + NOISE * noise.standard_normal(position), SAMPLE_RATE_HZ, subtype="PCM_16"
    )
    return channel, lines, seconds


def _line(talk: str, time: str, number: int, row: Row) -> str:
    """A line of an SDB: the columns that nobody reads hold little."""
    pos1, form, kind, pos2 = (feature.replace("*", "") for feature in row.features)
    word = ["CSJ", f"{number:05d}", talk, f"{time}-001-{number:03d}", "", row.surface, "", "", "", row.plain]
    return "\t".join([*word, row.pronunciation, pos1, form, kind, pos2, "", ""])


def make_corpus(args: argparse.Namespace) -> None:
    """Make the corpus, unless it is there."""
    final: Path = args.out / "CSJ"
    sources = sorted(Path(__file__).parent.glob("*.py"))
    program = zlib.crc32(b"".join(path.read_bytes() for path in sources if path.stem in PROGRAM))
    settings = {"minutes": args.minutes, "seed": args.seed, "program": program}
    if is_made(final, settings):
        print(f"{final} is there already, made by the same program with the same settings: nothing to do")
        return
    with making(final, settings) as root:
        for folder in ("MORPH/SDB", "WAV"):
            for name in ("core", "noncore"):
                (root / folder / name).mkdir(parents=True)
        total_s = 0.0
        text: dict[str, list[str]] = {}
        channels = plan(args.minutes, args.seed, root)
        for channel, lines, seconds in parallel_map(make_channel, channels, args.jobs, "speech made", "wav"):
            text.setdefault(channel.talk, []).extend(lines)
            total_s += seconds
        for talk, lines in text.items():
            path = root / "MORPH" / "SDB" / volume(talk) / f"{talk}.sdb"
            path.write_bytes("".join(f"{line}\n" for line in _by_time(lines)).encode("shift_jis"))
        (root / "README.txt").write_text(README.format(settings=json.dumps(settings)))
    print(f"made {final}: {total_s / 60:.1f} minutes of speech, {args.minutes:g} of them to train on")


def _by_time(lines: list[str]) -> Iterator[str]:
    """The lines of both speakers of a dialogue in the order of time, their segments numbered anew."""
    ordered = sorted(lines, key=lambda line: line.split("\t")[3].split()[1])  # the order within a segment stays
    segment, number = ("", ""), 0
    for line in ordered:
        columns = line.split("\t")
        _, time, place = columns[3].split()
        number += (time, place[0]) != segment
        segment = (time, place[0])
        columns[3] = f"{number:04d} {time} {place}"
        yield "\t".join(columns)


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory that gets CSJ/")
    parser.add_argument(
        "--minutes",
        type=float,
        default=40.0,
        help="minutes of training speech; the other talks come on top, about 10 minutes (default: 40)",
    )
    parser.add_argument("--seed", type=int, default=1, help="another seed, another corpus (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    args = parser.parse_args()
    if args.minutes <= 0 or args.jobs < 1:
        parser.error(f"--minutes {args.minutes:g} --jobs {args.jobs}: both must be positive")
    try:
        make_corpus(args)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    sys.exit(run(main))

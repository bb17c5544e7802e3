"""Make a small corpus of synthetic speech in the directory layout of CSJ (the Corpus of Spontaneous Japanese).

    OUT/CSJ/MORPH/SDB/{core,noncore}/TALK.sdb and WAV/{core,noncore}/TALK.wav (TALK-L.wav and -R.wav of a dialogue)

It has all talks of the evaluation sets under their ids, and others to train on. One text-to-speech voice, which is
inside the wheel of pyopenjtalk-plus, becomes another speaker for each talk: its pitch and tempo are changed, and its
samples are read at another rate. The sentences of test and development talks do not occur in training talks. Equal
options make equal corpora. The corpus is a smoke test and a teaching aid, no benchmark.

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

PROGRAM = ("grammar", "make_corpus", "talks")  # the corpus depends on these files and on the options
TRAIN_SPEAKERS = 24
UTTERANCES = {"dev": 2, "test": 4, "excluded": 1}  # in each channel of a talk; --minutes decides for training talks
VOICE_RATE_HZ = 48000
JOINED = 0.15  # this part of the pauses is so short that the utterances beside them are joined
SHORT_PAUSE_S, LONG_PAUSE_S = (0.2, 0.6), (1.1, 1.8)
NOISE = 3e-4  # a room always has some noise
DIGITS = re.compile(f"[{grammar.DIGITS}十]+")

README = """\
The speech in this directory is synthetic: it was made by make_corpus.py with the voice "mei" of pyopenjtalk-plus
(CC BY 3.0, MMDAgent project team, Nagoya Institute of Technology), whose pitch, tempo and sampling rate were changed to
make speakers. No person spoke it. The layout and the ids of the evaluation talks are those of CSJ, nothing else is.
Error rates on it say whether the software works, not how good a model is.
Made with: {settings}
"""


class Speaker(NamedTuple):
    """This speaker speaks in one channel of a talk.

    Attributes:
        half_tones: how much the pitch of the voice is raised.
        rate: the samples are read at this many times their rate, which moves pitch and formants; it has two decimals.
        tempo, gain: factors on the voice's own.
    """

    half_tones: float
    rate: float
    tempo: float
    gain: float


class Channel(NamedTuple):
    """A channel is one unit of work: a speaker, and how much is said.

    Attributes:
        talk: the id of the talk.
        suffix: what the name of the wav adds to the id.
        kind: train, dev or test, which decides on the sentences.
        utterances, seconds: how many utterances, and seconds of speech, the channel has at least.
        voice: pitch and rate of the speaker, from 0 (lowest) to 1 (highest).
        seed: decides on everything that is random.
        root: the directory of the corpus.
    """

    talk: str
    suffix: str
    kind: str
    utterances: int
    seconds: float
    voice: tuple[float, float]
    seed: int
    root: Path


class Row(NamedTuple):
    """A row is one word of the transcript.

    Attributes:
        surface, pronunciation: how the word is written and said, with tags.
        plain: how it is written without tags.
        features: part of speech, conjugation form, conjugation type, second part of speech.
    """

    surface: str
    plain: str
    pronunciation: str
    features: tuple[str, ...]


def volume(talk: str) -> str:
    """Returns the directory of a talk: core or noncore."""
    return "core" if zlib.crc32(talk.encode()) % 4 == 0 else "noncore"


def plan(minutes: float, seed: int, root: Path) -> list[Channel]:
    """Returns all channels of the corpus."""
    train = [f"{'AS'[k % 2]}{k % 10:02d}{'FM'[k // 2 % 2]}{2001 + k}" for k in range(TRAIN_SPEAKERS - 2)]
    train.append("D01F2101")  # a dialogue has the last two speakers
    channels: list[Channel] = []
    for talk in [*train, *(talk for ids in talks.SETS.values() for talk in ids)]:
        kind = talks.set_of(talk).split("-")[0]
        seconds = 60 * minutes / TRAIN_SPEAKERS if kind == "train" else 0.0
        said = "train" if kind == "excluded" else kind
        for suffix in talks.channels_of(talk):
            # The additive recurrence of the plastic number spreads few voices evenly; chance would leave gaps.
            voice = (len(channels) * 0.754878 % 1, len(channels) * 0.569840 % 1)
            channels.append(Channel(talk, suffix, said, UTTERANCES.get(kind, 1), seconds, voice, seed, root))
    random.Random(0).shuffle(channels)  # training talks take longer, so else the progress bar would mislead
    return channels


def make_speaker(channel: Channel) -> Speaker:
    """Returns the speaker of a channel, whose pitch and formants are lower if the id says that it is a man."""
    rng = random.Random(f"{channel.seed} {channel.talk} {channel.suffix} speaker")
    pitch, rate = channel.voice
    is_man = channel.talk[3] == "M"
    half_tones = 4 * pitch - (6 if is_man else 2)
    rate = 0.9 + 0.06 * rate if is_man else 0.96 + 0.09 * rate
    return Speaker(half_tones, rate, rng.uniform(0.8, 1.0), 10 ** (rng.uniform(-12, -6) / 20))


@lru_cache(maxsize=1000)
def analyse(text: str) -> list[NJDFeature]:
    """Returns the morphemes of a phrase, by pyopenjtalk's dictionary."""
    return pyopenjtalk.run_frontend(text, use_vanilla=True)


def arabic(kanji: str) -> str:
    """Returns a number below 100, given in kanji, in full-width digits."""
    tens, ten, ones = kanji.rpartition("十")
    value = grammar.DIGITS.index(ones) + 1 if ones else 0
    if ten:
        value += 10 * (grammar.DIGITS.index(tens) + 1 if tens else 1)
    return str(value).translate(str.maketrans("0123456789", "０１２３４５６７８９"))


def rows(phrase: grammar.Phrase, rng: random.Random) -> list[Row]:
    """Returns the words of a phrase as CSJ tags them.

    The surface has (F filler), (D fragment), (D2 particle), (A 三十;３０) and (A ディーブイディー;ＤＶＤ).
    The pronunciation of some words has (W said;meant), as if they were slurred.
    """
    words: list[Row] = []
    number = ""
    for morpheme in analyse(phrase.text):
        plain, said = number + morpheme["string"], morpheme["pron"].replace("’", "")
        if number:
            said = words.pop().pronunciation + said
        number = plain if DIGITS.fullmatch(plain) else ""  # a number becomes one word with its counter
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
    """Returns speech at 16 kHz, samples_S, of a sentence with a pause after every filler and fragment."""
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
    """Writes the wav of one channel, and returns its lines of the transcript and the seconds of speech."""
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
        if channel.kind == "train" and utterances == 2:  # the real corpus has names that were made unrecognisable
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
    """Returns a line of an SDB; the columns that nobody reads are mostly empty."""
    pos1, form, kind, pos2 = (feature.replace("*", "") for feature in row.features)
    word = ["CSJ", f"{number:05d}", talk, f"{time}-001-{number:03d}", "", row.surface, "", "", "", row.plain]
    return "\t".join([*word, row.pronunciation, pos1, form, kind, pos2, "", ""])


def make_corpus(args: argparse.Namespace) -> None:
    """Makes the corpus, unless it is there."""
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
    """Yields the lines of both speakers of a dialogue in the order of time, their segments numbered anew."""
    ordered = sorted(lines, key=lambda line: line.split("\t")[3].split()[1])  # sorting keeps the order in a segment
    segment, number = ("", ""), 0
    for line in ordered:
        columns = line.split("\t")
        _, time, place = columns[3].split()
        number += (time, place[0]) != segment
        segment = (time, place[0])
        columns[3] = f"{number:04d} {time} {place}"
        yield "\t".join(columns)


def main() -> None:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory that gets CSJ/")
    parser.add_argument(
        "--minutes",
        type=float,
        default=40.0,
        help="minutes of training speech; the other talks come on top, about 10 minutes (default: 40)",
    )
    parser.add_argument("--seed", type=int, default=1, help="another seed makes another corpus (default: 1)")
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

"""Draws sentences for the made corpus: about thirty words in about fifty characters, in any order before the verb.

The next word can hardly be guessed. With one order of phrases it could, and a small model learnt to guess instead of
listening: half of the characters were wrong after a training run that gives good results with these sentences.

A hash of its words assigns a sentence to the training, development or test talks, so none occurs in two of them.
Fillers and fragments are put in afterwards and differ every time.
"""

import random
import zlib
from typing import NamedTuple

DIGITS = "一二三四五六七八九"
NOUNS = {  # each noun has the moras of its beginning that a fragment of it has
    **{"東京": "と", "京都": "きょ", "大阪": "お", "今日": "きょ", "明日": "あ"},
    **{"写真": "しゃ", "言葉": "こと", "車": "く", "時計": "と", "電話": "で", "ＤＶＤ": "で"},
}
PARTICLES = ["は", "を", "と", "の", "で"]
COUNTERS = ["枚", "番", "台", "円"]
VERBS = ["見ます", "買います", "調べました", "話します"]
FILLERS = ["えー", "あのー", "まー"]
FILLER_AT_START, FILLER_INSIDE, FRAGMENT, WRONG_PARTICLE = 0.35, 0.06, 0.1, 0.05


class Phrase(NamedTuple):
    """A phrase is a few morphemes that are read in one breath.

    Attributes:
        tag: F for a filler, D for a fragment of a word, D2 for a particle that is corrected at once, "" for all else.
    """

    text: str
    tag: str = ""


def number(rng: random.Random) -> str:
    """Returns a number from 1 to 99 in kanji."""
    tens, ones = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.4 or not tens + ones:
        tens, ones = 0, rng.randint(1, 9)
    text = "" if tens == 0 else "十" if tens == 1 else DIGITS[tens - 1] + "十"
    return text + (DIGITS[ones - 1] if ones else "")


def sentence(rng: random.Random) -> list[str]:
    """Returns the phrases of a fluent sentence: one to three, and often a verb."""
    nouns = rng.sample(sorted(NOUNS), 3)
    phrases = [
        number(rng) + rng.choice(COUNTERS) if rng.random() < 0.4 else noun + rng.choice(PARTICLES)
        for noun in nouns[: rng.randint(1, 3)]
    ]
    return [*phrases, rng.choice(VERBS)] if len(phrases) == 1 or rng.random() < 0.7 else phrases


def kind_of(phrases: list[str]) -> str:
    """Returns the kind of talk that a sentence may occur in: "train", "dev" or "test" (about 70, 10 and 20 %)."""
    bucket = zlib.crc32("".join(phrases).encode()) % 10
    return "dev" if bucket == 0 else "test" if bucket <= 2 else "train"


def spoil(phrases: list[str], rng: random.Random) -> list[Phrase]:
    """Returns the sentence as people say it unprepared: with fillers, fragments and corrected particles."""
    said = []
    for position, phrase in enumerate(phrases):
        if rng.random() < (FILLER_INSIDE if position else FILLER_AT_START):
            said.append(Phrase(rng.choice(FILLERS), "F"))
        noun = next((noun for noun in NOUNS if phrase.startswith(noun)), None)
        if noun and rng.random() < FRAGMENT:
            said.append(Phrase(NOUNS[noun], "D"))
        if noun and rng.random() < WRONG_PARTICLE:
            said += [Phrase(noun), Phrase("が", "D2"), Phrase(phrase[len(noun) :])]
        else:
            said.append(Phrase(phrase))
    return said


def draw(kind: str, rng: random.Random) -> list[Phrase]:
    """Draws a random sentence, as it is said, for the given kind of talk ("train", "dev" or "test")."""
    while True:
        phrases = sentence(rng)
        if kind_of(phrases) == kind:
            return spoil(phrases, rng)
